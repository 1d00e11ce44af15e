"""What a patched layer asks of the host beside a stock one: operators of torch, those that launch a kernel, and Python.

On a GPU each costs the host several microseconds, however small its tensors are, and a decode step is bound by them.
"""

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import SMALL, tiny
from torch.utils._python_dispatch import TorchDispatchMode

import flux_ext
from flux_ext import FluxCache, FluxConfig, FluxStaticCache
from flux_ext.transformers_seam import CACHE

NO_LAUNCH = (
    "aten::detach",
    "aten::new_empty",
    "aten::empty.memory_format",
    "aten::lift_fresh",
    "aten::_local_scalar_dense",
)
"""They launch nothing, beside views; the last one is a check on the CPU."""


class Operators(TorchDispatchMode):
    """Counts the operators that run, ``view`` left out, and those that do more than make a view or an empty tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.all: Counter[str] = Counter()
        self.launched: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() != "aten::view":  # of which releases of transformers make more or fewer
            self.all[func.name()] += 1
        if not func.is_view and func.name() not in NO_LAUNCH:
            self.launched[func.name()] += 1
        return func(*args, **(kwargs or {}))


def counted(run: Callable[[], object]) -> Operators:
    with Operators() as operators:
        run()
    return operators


def prompt_and_step(
    num_layers: int,
    granularity: str | None,
    static: bool = False,
    count: Callable[[Callable[[], object]], Any] = counted,
) -> tuple[Any, Any]:
    """What is counted of a prompt that makes its cache, and of a step over it; ``granularity`` None: of the stock
    model."""
    model = tiny("llama", num_hidden_layers=num_layers)
    if granularity is None:
        model.set_attn_implementation("sdpa")
    else:
        flux_ext.patch(model, FluxConfig(granularity=granularity, **SMALL))
    ids = torch.randint(2, 128, (1, 40))
    caches: list[Any] = [None]
    if static:
        caches = [FluxStaticCache(model.config, flux_ext.get_routers(model).config, 60)]

    def forward(tokens: torch.Tensor, **positions: Any) -> None:
        caches.append(model(tokens, use_cache=True, **{CACHE: caches[-1]}, **positions).past_key_values)

    with torch.no_grad():  # as generate runs it
        prompt = count(lambda: forward(ids))
        assert static or granularity is None or isinstance(caches[-1], FluxCache)
        forward(ids[:, :1], position_ids=torch.tensor([[40]]))  # once in many steps, something is sent to the device
        step = count(lambda: forward(ids[:, :1], position_ids=torch.tensor([[41]])))
    return prompt, step


def per_layer(part: int, *how: Any) -> Operators:
    """Of a prompt (0) or a step (1): what one layer more makes more."""
    more: Operators = prompt_and_step(3, *how)[part]
    fewer: Operators = prompt_and_step(2, *how)[part]
    more.all.subtract(fewer.all)
    more.launched.subtract(fewer.launched)
    return more


@pytest.mark.parametrize("granularity", ["layer", "head"])
@pytest.mark.parametrize(
    "what, operators, launched",
    [
        # Keys and values are written instead of concatenated.
        pytest.param(("step", False), 2, 0, id="step"),
        # One operator writes both.
        pytest.param(("step", True), 4, -1, id="static step"),
        # The router, whose route is made one piece to be copied to the host; three that say where the tokens of a page
        # are, and one each that takes keys and values from there, instead of a concatenation.
        pytest.param(("prompt", False), 17, 5, id="prompt"),
        # A route with an address of its own, six numbers of a sequence head, and keys and values written.
        pytest.param(("prompt", True), 36, 13, id="static prompt"),
    ],
)
def test_operators_of_a_layer(what: tuple[str, bool], operators: int, launched: int, granularity: str) -> None:
    """No more than so many more than a stock layer's."""
    kind, static = what
    part = ("prompt", "step").index(kind)
    ours, stock = per_layer(part, granularity, static), per_layer(part, None)
    for name, allowed in (("all", operators), ("launched", launched)):
        own, theirs = getattr(ours, name), getattr(stock, name)
        difference = {n: own[n] - theirs[n] for n in {*own, *theirs} if own[n] != theirs[n]}
        assert own.total() - theirs.total() <= allowed, (name, difference)


def own_calls(run: Callable[[], object]) -> Counter[str]:
    """How often each of the package's Python functions is called."""
    folder = str(Path(flux_ext.__file__).parent)
    calls: Counter[str] = Counter()

    def note(frame: Any, event: str, arg: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(folder):
            calls[f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}"] += 1

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(before)
    return calls


@pytest.mark.parametrize("granularity", ["layer", "head"])
def test_python_calls_of_a_layer(granularity: str) -> None:
    """No more than so many functions of the package; none of those that autograd calls."""
    prompt, step = (
        prompt_and_step(3, granularity, count=own_calls)[i] - prompt_and_step(2, granularity, count=own_calls)[i]
        for i in (0, 1)
    )
    assert not [name for name in (*prompt, *step) if name.startswith("autograd.")]
    assert step.total() <= 39, step
    assert prompt.total() <= 97, prompt
