"""The static cache is the dynamic one with fixed addresses, and its step is one graph."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from models import ragged, tiny
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.generation import CompileConfig

import flux_ext
from flux_ext import FluxConfig, FluxStaticCache
from flux_ext.patching import get_routers

SMALL = {"sink": 4, "window": 16, "pool_size": 20}


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


def test_bytes_of_sparse_rows_do_not_grow_with_the_cache() -> None:
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
    torch._dynamo.reset()
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
