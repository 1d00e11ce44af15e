"""The static cache is the dynamic one with fixed addresses, and its step is one graph."""

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from models import SMALL, ragged, tiny
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.generation import CompileConfig

import flux_ext
from flux_ext import FluxCache, FluxConfig, FluxStaticCache
from flux_ext.forward_context import ForwardContext
from flux_ext.models.patching import get_routers


@pytest.fixture(autouse=True)
def nan_memory() -> Iterator[None]:
    """torch fills new memory with NaN, so that a page's unused end cannot hide."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


ROUTES = torch.tensor([[[0, 0], [0, 1], [1, 1]], [[0, 1], [1, 1], [1, 1]], [[1, 1], [1, 1], [0, 0]]])


@pytest.mark.parametrize("page_size", [1, 4, 16, 64])
@pytest.mark.parametrize("align", [1, 8])
@pytest.mark.parametrize("lengths", [(40, 31, 22), (5, 2, 1)], ids=str)
def test_equals_the_dynamic_cache(lengths: tuple[int, ...], align: int, page_size: int) -> None:
    model = flux_ext.patch(tiny("qwen3", num_hidden_layers=3), FluxConfig(align=align, **SMALL))
    ids, mask = ragged(lengths)
    kwargs: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 60, "do_sample": False}
    with flux_ext.routes(model, ROUTES):
        want = model.generate(ids, **kwargs)
        cache = FluxStaticCache(model.config, get_routers(model).config, 120, page_size=page_size)
        got = model.generate(ids, past_key_values=cache, disable_compile=True, **kwargs)
    assert torch.equal(got, want)
    assert torch.equal(cache.routes, ROUTES.int()) and int(cache.get_seq_length()) == max(lengths) + 59


def test_bytes_of_sparse_heads_do_not_grow_with_the_cache() -> None:
    model = flux_ext.patch(tiny("llama"), FluxConfig(**SMALL))

    def nbytes(route: str, length: int) -> int:
        cache = FluxStaticCache(model.config, get_routers(model).config, length, page_size=4)
        with flux_ext.routes(model, route):
            model(torch.randint(2, 128, (1, 30)), past_key_values=cache)
        return cache.nbytes()

    assert nbytes("sparse", 100) == nbytes("sparse", 400) < nbytes("full", 100) / 2
    assert nbytes("full", 400) == 4 * nbytes("full", 100)


def test_generate_compiles_one_step() -> None:
    """generate's own compilation: fullgraph, and the steps after the first ones compile nothing."""
    model = flux_ext.patch(tiny("llama", num_hidden_layers=2), FluxConfig(**SMALL))
    ids, mask = ragged((30, 21))
    kwargs: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 30, "do_sample": False}
    routes = torch.tensor([[0, 1], [1, 1]])
    config = CompileConfig(backend="eager", fullgraph=True, mode=None)
    config._compile_all_devices = True
    torch._dynamo.utils.counters.clear()
    with flux_ext.routes(model, routes):
        want = model.generate(ids, **kwargs)
        got = model.generate(ids, cache_implementation="static", compile_config=config, **kwargs)
    assert torch.equal(got, want)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


class Calls(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_a_step_is_stored_by_one_operator() -> None:
    model = flux_ext.patch(tiny("llama"), FluxConfig(**SMALL))
    cache = FluxStaticCache(model.config, get_routers(model).config, 60)
    model(torch.randint(2, 128, (2, 40)), past_key_values=cache)
    k = torch.randn(2, 2, 1, 16)
    cache.layers[0].begin(ForwardContext())
    with Calls() as calls:
        cache.layers[0].update(k, k)
    work = [n for n in calls.names if n not in ("aten::detach", "aten::_local_scalar_dense")]  # views; the CPU's check
    assert work == ["flux_ext::append"], calls.names


def test_what_it_cannot_do() -> None:
    model = flux_ext.patch(tiny("llama"), FluxConfig(**SMALL))
    ids = torch.randint(2, 128, (1, 20))
    config = get_routers(model).config
    with pytest.raises(ValueError, match="max_cache_len is 10"):
        model(ids, past_key_values=FluxStaticCache(model.config, config, 10))
    cache = FluxStaticCache(model.config, config, 40)
    model(ids, past_key_values=cache)
    for call, message in (
        (lambda: model(ids[:, :2], past_key_values=cache), "single tokens"),
        (lambda: cache.crop(-1), "cropped"),
        (lambda: cache.reorder_cache(torch.tensor([0])), "beam search"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ValueError, match="full attention in every layer"):
        FluxStaticCache(tiny("gemma3").config, config, 40)


def test_a_full_cache_refuses_a_token_before_writing() -> None:
    model, ids = flux_ext.patch(tiny("llama"), FluxConfig(**SMALL)), torch.randint(2, 128, (1, 21))
    cache = FluxStaticCache(model.config, get_routers(model).config, 20)
    model(ids[:, :19], past_key_values=cache)
    model(ids[:, 19:20], past_key_values=cache)
    pools = [layer.k_pool.clone() for layer in cache.layers]
    with pytest.raises(ValueError, match="full: max_cache_len is 20"):
        model(ids[:, 20:], past_key_values=cache)
    assert int(cache.get_seq_length()) == 20
    for layer, pool in zip(cache.layers, pools, strict=True):
        assert torch.equal(layer.k_pool.nan_to_num(), pool.nan_to_num())


def test_a_cache_made_in_inference_mode_goes_on_outside() -> None:
    model, ids = flux_ext.patch(tiny("llama"), FluxConfig(**SMALL)), torch.randint(2, 128, (1, 43))
    cache = FluxStaticCache(model.config, get_routers(model).config, 60)
    with flux_ext.routes(model, "sparse"):
        want = model(ids, use_cache=False).logits
        with torch.inference_mode():
            model(ids[:, :40], past_key_values=cache)
            model(ids[:, 40:41], past_key_values=cache)
    for t in (41, 42):
        got = model(ids[:, t : t + 1], past_key_values=cache).logits[:, 0]
        torch.testing.assert_close(got, want[:, t], rtol=1e-4, atol=2e-4)


def new_static(model: Any, max_cache_len: int = 60, **kwargs: Any) -> FluxStaticCache:
    return FluxStaticCache(model.config, get_routers(model).config, max_cache_len, page_size=4, **kwargs)


def tensors_of(cache: FluxStaticCache) -> dict[str, torch.Tensor]:
    return {
        f"{i}.{n}": t for i, x in enumerate(cache.layers) for n, t in vars(x).items() if isinstance(t, torch.Tensor)
    }


@pytest.mark.parametrize("any_routes", [False, True])
def test_reset_keeps_every_address(any_routes: bool) -> None:
    """A compiled or captured step goes on with the next prompt: other routes, other lengths, the same tensors."""
    model = flux_ext.patch(tiny("qwen3", num_hidden_layers=3), FluxConfig(**SMALL))
    cache = new_static(model, any_routes=any_routes)
    later = ROUTES.flip(0) if not any_routes else torch.zeros_like(ROUTES)  # as many full heads, or all
    addresses = None
    for routes, lengths in ((ROUTES, (40, 31, 22)), (later, (9, 30, 2)), (ROUTES, (3, 3, 3))):
        ids, mask = ragged(lengths)
        kwargs: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False}
        with flux_ext.routes(model, routes):
            want = model.generate(ids, **kwargs)
            got = model.generate(ids, past_key_values=cache, disable_compile=True, **kwargs)
        assert torch.equal(got, want)
        assert torch.equal(cache.routes, routes.int())
        now = {name: t.data_ptr() for name, t in tensors_of(cache).items()}
        addresses = addresses or now
        assert now == addresses
        cache.reset()
        assert int(cache.get_seq_length()) == 0 and {n: t.data_ptr() for n, t in tensors_of(cache).items()} == {
            n: a for n, a in addresses.items() if not n.endswith(".route")
        }


def test_a_prompt_that_does_not_fit_after_reset() -> None:
    model = flux_ext.patch(tiny("llama"), FluxConfig(**SMALL))
    ids, cache = torch.randint(2, 128, (2, 20)), new_static(model)
    with flux_ext.routes(model, "sparse"):
        model(ids, past_key_values=cache)
    cache.reset()
    before = {n: t.clone() for n, t in tensors_of(cache).items()}
    with flux_ext.routes(model, "full"), pytest.raises(ValueError, match=r"keep their \d+ pages.*any_routes=True"):
        model(ids, past_key_values=cache)
    with flux_ext.routes(model, "sparse"), pytest.raises(ValueError, match="after reset.*takes prompts of the same"):
        model(ids[:1], past_key_values=cache)
    for name, t in tensors_of(cache).items():
        assert name.endswith(("route", "route_kept")) or torch.equal(t.nan_to_num(), before[name].nan_to_num()), name
    with flux_ext.routes(model, "sparse"):
        model(ids, past_key_values=cache)
        got = model(ids[:, :1], past_key_values=cache).logits
        want = model(torch.cat([ids, ids[:, :1]], 1), use_cache=False).logits[:, -1:]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-4)


def test_beyond_the_end_a_compiled_step_gives_nan() -> None:
    """For the sequence that is full; the others, with padding before them, have room left and go on."""
    model = flux_ext.patch(tiny("llama", num_hidden_layers=2), FluxConfig(**SMALL))
    ids, mask = ragged((20, 15))
    more = torch.randint(2, 128, (2, 4))
    position = torch.cat([mask, torch.ones(2, 4, dtype=torch.long)], 1).cumsum(1)[:, 20:] - 1
    cache = new_static(model, 22)
    step = torch.compile(model, backend="eager")
    with torch.no_grad(), flux_ext.routes(model, torch.tensor([0, 1])):
        model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), past_key_values=cache)
        for t in range(4):
            got = step(more[:, t : t + 1], position_ids=position[:, t : t + 1], past_key_values=cache).logits[:, 0]
            assert got[0].isnan().all() == (t >= 2)
            alone = torch.cat([ids[1:, 5:], more[1:, : t + 1]], 1)
            torch.testing.assert_close(got[1:], model(alone, use_cache=False).logits[:, -1], rtol=1e-4, atol=2e-4)


def test_a_compiled_step_with_a_mask_that_contradicts_the_cache_gives_nan() -> None:
    model = flux_ext.patch(tiny("llama", num_hidden_layers=2), FluxConfig(**SMALL))
    ids, mask = ragged((20, 15))
    longer = torch.cat([mask, torch.ones(2, 20, dtype=torch.long)], 1)
    step = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad(), flux_ext.routes(model, "full"):
        for hidden in (None, 3, 12):
            cache = new_static(model, 40)
            model(ids, attention_mask=mask, past_key_values=cache)
            wrong = longer.clone()
            if hidden is not None:
                wrong[0, hidden] = 0
            logits = step(ids[:, :1], attention_mask=wrong, past_key_values=cache).logits
            assert logits[0].isnan().all() == (hidden is not None) and not logits[1].isnan().any()


def test_masked_tokens_in_a_compiled_step() -> None:
    """One graph for steps with any mask; what is masked is not stored."""
    model = flux_ext.patch(tiny("llama", num_hidden_layers=2), FluxConfig(**SMALL))
    ids, mask = torch.randint(2, 128, (2, 40)), (torch.rand(2, 40) < 0.7).long()
    mask[:, :20], mask[:, -1] = 1, 1
    position = (mask.cumsum(1) - 1).clamp(min=0)
    torch._dynamo.utils.counters.clear()
    step = torch.compile(model, backend="aot_eager", fullgraph=True)
    cache = new_static(model, 40)
    with torch.no_grad(), flux_ext.routes(model, torch.tensor([0, 1])):
        model(ids[:, :20], past_key_values=cache)
        for t in range(20, 40):
            now = slice(t, t + 1)
            padded = mask * (torch.arange(40) <= t)
            got = step(ids[:, now], attention_mask=padded, position_ids=position[:, now], past_key_values=cache).logits[
                :, 0
            ]
            for b in range(2):
                if mask[b, t]:
                    alone = ids[b : b + 1, : t + 1][:, mask[b, : t + 1].bool()]
                    want = model(alone, use_cache=False).logits[0, -1]
                    torch.testing.assert_close(got[b], want, rtol=1e-4, atol=2e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert torch.equal(cache.layers[0].seen[:, 0].long(), mask.sum(1))


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
@pytest.mark.parametrize("when", ["made and copied", "copied"])
def test_a_copy_made_in_inference_mode_goes_on_outside(when: str, way: str, kind: str) -> None:
    """And the original goes on beside it, untouched."""
    model = flux_ext.patch(tiny("llama"), FluxConfig(**SMALL))
    ids, mask = ragged((40, 25))
    longer = torch.cat([mask, torch.ones(2, 2, dtype=torch.long)], 1)
    with flux_ext.routes(model, torch.tensor([[0, 1, 1, 0], [1, 1, 0, 0]])):
        with torch.inference_mode(when == "made and copied"):
            cache = new_static(model) if kind == "static" else FluxCache(model.config, get_routers(model).config)
            model(ids, attention_mask=mask, past_key_values=cache)
        with torch.inference_mode():
            copied = copy.deepcopy(cache) if way == "deepcopy" else pickle.loads(pickle.dumps(cache))
        logits = []
        for one in (copied, cache, copied):
            t = int(one.get_seq_length())
            step = {"attention_mask": longer[:, : t + 1], "past_key_values": one}
            logits.append(model(ids[:, :1], position_ids=longer[:, : t + 1].sum(1)[:, None] - 1, **step).logits)
    assert torch.equal(logits[0], logits[1]) and not torch.equal(logits[0], logits[2])
    assert (int(copied.get_seq_length()), int(cache.get_seq_length())) == (42, 41)
    if kind == "dynamic":
        copied.reorder_cache(torch.tensor([1, 0]))
        copied.crop(-1)
    else:
        copied.reset()
    assert int(cache.get_seq_length()) == 41
