"""Patterns of a user's own: functions of the lengths, by name. In attention and in models the matrices of ``cases.py``
and ``test_modes.py`` run one too."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_training
import torch
from cases import THIRD, every_third
from models import tiny
from torch import Tensor

import flux_ext
from flux_ext import BlockSparse, FluxConfig, FluxRouters, register_pattern
from flux_ext.examples import Example
from flux_ext.operators import pattern_functions, prompt_and_answer, reference, select_blocks
from flux_ext.operators.patterns import dense_mask
from flux_ext.training import Recipe, RouterDataset


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """A test may register what it likes."""
    kept = dict(pattern_functions._functions)
    yield
    pattern_functions._functions.clear()
    pattern_functions._functions.update(kept)


def obvious(q_len: int, kv_len: int, width: int) -> Tensor:
    """Every third key block and the diagonal, one pair of tokens after the other."""
    mask = torch.zeros(q_len, kv_len, dtype=torch.bool)
    for i in range(q_len):
        first_of_block = kv_len - q_len + i // 128 * 128
        for j in range(min(kv_len - q_len + i + 1, kv_len)):
            mask[i, j] = j // width % 3 == 0 or (j // width + 1) * width > first_of_block
    return mask


LENGTHS = [(300, 300), (1, 1), (130, 400), (128, 129), (300, 100)]  # the last has queries before the first key


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize(("q_len", "kv_len"), LENGTHS)
def test_lists_show_what_the_function_says(q_len: int, kv_len: int, width: int) -> None:
    named, want = BlockSparse(name="every third", width=width), obvious(q_len, kv_len, width)
    assert torch.equal(dense_mask(named, q_len, kv_len), want)
    q, k = torch.randn(2, q_len, 4, 16), torch.randn(2, kv_len, 2, 16)
    for lists in (select_blocks(named, q, k), reference.select_blocks(named, q, k)):
        assert torch.equal(dense_mask(lists, q_len, kv_len), want.expand(2, 2, -1, -1))


def test_lists_are_as_long_as_the_longest() -> None:
    blocks = select_blocks(
        BlockSparse(name="every third"), torch.randn(1, 1280, 2, 8), torch.randn(1, 1280, 2, 8)
    ).blocks
    assert blocks is not None and blocks.shape == (1, 2, 10, 4)


def test_the_function_is_asked_once_for_each_pair_of_lengths() -> None:
    asked: list[tuple[int, int]] = []

    def counted(q_len: int, kv_len: int, width: int, device: torch.device) -> Tensor:
        asked.append((q_len, kv_len))
        return every_third(q_len, kv_len, width, device)

    register_pattern("counted", counted)
    x = torch.randn(3, 200, 2, 8)
    ends = torch.tensor([200, 150, 150], dtype=torch.int32)
    for _ in range(2):
        flux_ext.attention(x, x, x, torch.ones(3, dtype=torch.int32), sparse=BlockSparse(name="counted"), seq_end=ends)
    assert asked == [(200, 200), (150, 150)]


def test_a_large_batch_of_different_lengths_is_asked_about_once() -> None:
    class Counted:
        """Not to be hashed, as an ordinary dataclass."""

        __hash__ = None  # type: ignore[assignment]
        calls = 0

        def __call__(self, q_len: int, kv_len: int, width: int, device: torch.device) -> Tensor:
            self.calls += 1
            return every_third(q_len, kv_len, width, device)

    counted = Counted()
    register_pattern("counted", counted)
    x = torch.randn(60, 70, 1, 8)
    ends = torch.arange(1, 61, dtype=torch.int32)
    for _ in range(3):
        flux_ext.attention(x, x, x, torch.ones(60, dtype=torch.int32), sparse=BlockSparse(name="counted"), seq_end=ends)
    assert counted.calls == 60


def test_a_function_that_fails_is_named() -> None:
    register_pattern("broken", lambda q_len, kv_len, width, device: 1 // 0)  # type: ignore[arg-type, return-value]
    x = torch.randn(1, 200, 2, 8)
    with pytest.raises(ValueError, match=r"pattern 'broken' \(q_len 200, kv_len 200, width 128\) failed: ZeroDiv"):
        flux_ext.attention(x, x, x, None, full=BlockSparse(name="broken"))


def test_lengths_on_another_device_are_refused_before_they_are_read() -> None:
    x, ends = torch.randn(2, 200, 2, 8), torch.empty(2, dtype=torch.int32, device="meta")
    with pytest.raises(ValueError, match=r"kv_len must be on the device of q \(cpu\), got meta"):
        flux_ext.attention(x, x, x, None, full=BlockSparse(name="every third"), kv_len=ends)


def test_lists_kept_in_inference_mode_serve_training() -> None:
    x = torch.randn(1, 222, 2, 8)
    with torch.inference_mode():
        flux_ext.attention(x, x, x, torch.ones(1), sparse=THIRD)
    x.requires_grad_()
    flux_ext.attention(x, x, x, torch.ones(1, dtype=torch.int32), sparse=THIRD).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


def everything(q_len: int, kv_len: int, width: int, device: torch.device) -> Tensor:
    return torch.ones(-(-q_len // 128), -(-kv_len // width), dtype=torch.bool, device=device)


BAD: list[tuple[Any, type[Exception], str]] = [
    (lambda *_: None, TypeError, "must return a tensor, got None"),
    (lambda *_: [[True]], TypeError, "must return a tensor, got list"),
    (lambda q, k, w, d: everything(q + 128, k, w, d), ValueError, r"q_blocks, kv_blocks\] = \[3, 3\], got \[4, 3\]"),
    (lambda q, k, w, d: everything(q, k + w, w, d), ValueError, r"\[3, 3\], got \[3, 4\]"),
    (lambda *x: everything(*x)[None], ValueError, r"\[3, 3\], got \[1, 3, 3\]"),
    (lambda *x: everything(*x).int(), ValueError, r"must return booleans, got torch\.int32"),
    (lambda *x: everything(*x).to("meta"), ValueError, "must return a tensor on cpu, got one on meta"),
    (lambda *x: ~everything(*x), ValueError, r"leaves the query at position 0 no key: query block 0 has .* \[\]"),
    (lambda *x: everything(*x).triu(1), ValueError, "leaves the query at position 0 no key"),
    (
        lambda *x: everything(*x).triu(1) | (torch.arange(3)[:, None] == 0),
        ValueError,
        r"leaves the query at position 128 no key: query block 1 has the key blocks \[\]; keep those on the diagonal",
    ),
]


@pytest.mark.parametrize(("function", "kind", "message"), BAD, ids=[message for *_, message in BAD])
def test_what_a_function_may_not_return(function: Any, kind: type[Exception], message: str) -> None:
    """Name, lengths, rule and value; the operator and its twin alike."""
    register_pattern("wrong", function)
    x = torch.randn(1, 290, 2, 8)
    for attention in (flux_ext.attention, reference.attention):
        with pytest.raises(kind, match=r"pattern 'wrong' \(q_len 290, kv_len 290, width 128\) .*" + message):
            attention(x, x, x, torch.ones(1, dtype=torch.int32), sparse=BlockSparse(name="wrong"))


def test_a_wrong_function_is_found_when_a_model_is_patched() -> None:
    register_pattern("wrong", lambda *_: torch.ones(1))
    model = tiny()
    with pytest.raises(
        ValueError, match=r"pattern 'wrong' .* must return \[q_blocks, kv_blocks\] = \[1, 1\], got \[1\]"
    ):
        flux_ext.patch(model, FluxConfig(pattern="wrong"))
    assert not flux_ext.is_patched(model)


def test_names() -> None:
    with pytest.raises(TypeError, match="name must be a string, got int 3"):
        register_pattern(3, every_third)  # type: ignore[call-overload]
    for name in ("", "full", "streaming", "triangle", "block_sparse"):
        with pytest.raises(ValueError, match=f"name must be other than .*, got '{name}'"):
            register_pattern(name, every_third)
    with pytest.raises(TypeError, match="function must take .*, got str 'x'"):
        register_pattern("x", "x")  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="name must be a string, got int 3"):
        BlockSparse(name=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one of blocks, threshold and name, got threshold and name"):
        BlockSparse(threshold=0.5, name="every third")
    x = torch.randn(1, 20, 2, 8)
    with pytest.raises(
        ValueError, match=r"pattern 'nobody' is not registered: call flux_ext.register_pattern\('nobody'"
    ):
        flux_ext.attention(x, x, x, sparse=BlockSparse(name="nobody"))


def test_wrong_bounds_are_refused_as_ever() -> None:
    """Where there are lists to make, the operator's own messages still come."""
    x, none = torch.randn(2, 20, 2, 8), torch.zeros(3, dtype=torch.int32)
    for arguments in ({"seq_start": none}, {"kv_len": none + 30}, {"kv_len": none[:2] - 4}):
        for sparse in (THIRD, BlockSparse(threshold=0.5)):
            with pytest.raises(ValueError, match="q_begin|kv_begin|kv_len"):
                flux_ext.attention(x, x, x, sparse=sparse, **arguments)


def test_a_name_registered_again_means_the_new_function() -> None:
    """In a compiled graph too, which holds the name alone."""
    x = torch.randn(1, 300, 2, 8)
    route = torch.ones(1, dtype=torch.int32)

    def attend(x: Tensor) -> Tensor:
        return flux_ext.attention(x, x, x, route, sparse=BlockSparse(name="changing"))

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    for function in (every_third, everything):
        register_pattern("changing", function)
        want = reference.attention(x, x, x, route, sparse=BlockSparse(name="changing"))
        torch.testing.assert_close(attend(x), want)
        torch.testing.assert_close(compiled(x), want)
    torch.testing.assert_close(want, flux_ext.attention(x, x, x))


def test_a_compiled_model_over_ragged_prompts_is_one_graph() -> None:
    model = flux_ext.patch(tiny(), FluxConfig(pattern="every third", block_width=64, sink=4, window=16))
    ids, mask = torch.randint(2, 128, (2, 330)), torch.ones(2, 330, dtype=torch.long)
    mask[1, :70] = 0
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad(), flux_ext.routes(model, "sparse"):
        want = model(ids, attention_mask=mask, use_cache=False).logits
        torch.testing.assert_close(compiled(ids, attention_mask=mask, use_cache=False).logits, want)


def test_saved_routers_name_it_and_bring_no_code(tmp_path: Path) -> None:
    """Who loads them must have registered it; an error says so before a model is changed."""
    config = FluxConfig(pattern="every third", full="every third", block_width=64, num_layers=4, head_dim=16)
    FluxRouters(config).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "flux_config.json").read_text())
    assert values["pattern"] == values["full"] == "every third" and values["block_width"] == 64
    assert 'register_pattern("every third"' in (tmp_path / "README.md").read_text()
    assert FluxRouters.from_pretrained(tmp_path).config == config
    del pattern_functions._functions["every third"]
    model = tiny()
    with pytest.raises(
        ValueError, match=r"flux_config.json: full must be .* flux_ext.register_pattern .* 'every third'"
    ):
        flux_ext.patch(model, routers=tmp_path)
    assert not flux_ext.is_patched(model)


def long_prompts() -> RouterDataset:
    generator = torch.Generator().manual_seed(3)

    def text(length: int) -> str:
        return "".join(chr(97 + int(c)) for c in torch.randint(26, (length,), generator=generator))

    examples = [Example(text(170 + 13 * i % 50), text(3), text(2 + i % 3), "ab"[i % 2]) for i in range(6)]
    return RouterDataset(examples, tiny_training.Bytes())


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("granularity", ["layer", "head"])
@pytest.mark.parametrize("objective", ["counterfactual", "soft", "straight_through", "even_odds"])
def test_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, objective: Any, granularity: str, packed: bool
) -> None:
    """Two steps: losses and gradients of the routers are those of dense masks in plain PyTorch, not streaming's."""
    found = []
    for kind in ("ours", "reference", "streaming"):
        with monkeypatch.context() as patches:
            if kind == "reference":
                patches.setattr(prompt_and_answer, "attend", reference.attend)
                patches.setattr(prompt_and_answer, "attention", reference.attention)
            pattern = "streaming" if kind == "streaming" else "every third"
            model = tiny_training.model(granularity, pattern=pattern, decode="dense", block_width=64)
            grads: list[Tensor] = []
            t = tiny_training.trainer(
                tmp_path, model, Recipe(objective=objective, targets={"a": 0.5}, whiten=0), long_prompts(),
                packed=packed, max_steps=2, per_device_train_batch_size=3, callbacks=[tiny_training.Grab(grads)],
            )  # fmt: skip
            t.train()
            losses = [log["loss"] for log in t.state.log_history if "loss" in log]
            found.append((torch.tensor(losses), torch.stack(grads)))
    (loss, grad), (want_loss, want_grad), (other, _) = found
    assert want_grad.abs().max() > 0
    torch.testing.assert_close(loss, want_loss, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(grad, want_grad, atol=2e-5, rtol=2e-3)
    assert not torch.allclose(other, want_loss, atol=1e-4, rtol=1e-4)


def test_the_operator_is_sound() -> None:
    """Its shapes without values, where queries are packed and where they are not."""
    named_blocks, x = torch.ops.flux_ext.named_blocks.default, torch.randn(2, 300, 2, 8)
    bounds = torch.tensor([0, 140, 300], dtype=torch.int32)
    starts = torch.tensor([10, 0], dtype=torch.int32)
    torch.library.opcheck(named_blocks, ("every third", 64, x, x, None, None, None, None, None))
    torch.library.opcheck(named_blocks, ("every third", 128, x, x, starts, None, starts, None, None))
    torch.library.opcheck(named_blocks, ("every third", 64, x[0], x[0], bounds, None, bounds, None, None))
