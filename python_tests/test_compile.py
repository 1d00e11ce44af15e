"""Patched models under torch.compile."""

import contextlib
from typing import Any

import pytest
import torch
from models import patched_model, ragged, tiny

import flux_ext
from flux_ext import FluxCache
from flux_ext.models.patching import last_routing, policy


def test_position_ids_and_packed_rows_compile_as_one_graph() -> None:
    model, position = patched_model(num_hidden_layers=1), torch.cat([torch.arange(18), torch.arange(12)])[None]
    ids, bounds = torch.randint(2, 128, (1, 30)), torch.tensor([0, 18, 30], dtype=torch.int32)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for kwargs in (
        {"position_ids": torch.arange(30)[None], "attention_mask": torch.ones(1, 30)},
        {"position_ids": position, "cu_seq_lens_q": bounds},
    ):
        with torch.no_grad():
            want = model(ids, use_cache=False, **kwargs).logits
            torch.testing.assert_close(compiled(ids, use_cache=False, **kwargs).logits, want)


def test_torch_compile_without_a_cache_is_one_graph() -> None:
    model = patched_model("qwen3", num_hidden_layers=2)
    ids, mask = ragged()
    with torch.no_grad():
        want = model(ids, attention_mask=mask, use_cache=False).logits
        routes = last_routing(model).routes
        got = torch.compile(model, backend="aot_eager", fullgraph=True)(ids, attention_mask=mask, use_cache=False)
    torch.testing.assert_close(got.logits, want)
    assert torch.equal(last_routing(model).routes, routes)


@pytest.mark.parametrize("first", ["compiled", "eager"])
def test_the_last_routing_of_a_compiled_forward_is_its_own(first: str) -> None:
    model, prompts = patched_model(num_hidden_layers=2), [torch.randint(2, 128, (2, 40)) for _ in range(3)]
    routes, logits = [], []
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        if first == "eager":
            model(prompts[0][:1, :9], use_cache=False)
        for ids in prompts:
            compiled(ids, use_cache=False)
            routes.append(last_routing(model).routes)
            logits.append(last_routing(model).logits)
        for ids, route, logit in zip(prompts, routes, logits, strict=True):
            model(ids, use_cache=False)
            assert torch.equal(last_routing(model).routes, route)
            torch.testing.assert_close(last_routing(model).logits, logit)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("hard", [False, True], ids=["soft", "straight_through"])
def test_gradients_through_the_routes_of_a_compiled_model(hard: bool, autocast: bool) -> None:
    """Both objectives with a backward pass, in one graph; and again, as with accumulation."""
    model = patched_model("llama", num_hidden_layers=2)
    ids, mask = ragged()
    routers = list(flux_ext.get_routers(model).parameters())

    def routes(layer: int, logits: torch.Tensor) -> torch.Tensor:
        soft = (logits.float() + layer).softmax(-1)[..., 0]
        return (soft > 0.5).float() + soft - soft.detach() if hard else soft

    def gradient(run: Any) -> torch.Tensor:
        model.zero_grad()
        for scale in (0.5, 1.0):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast), policy(model, routes):
                logits = run(ids, attention_mask=mask, use_cache=False).logits
            (scale * logits.float().log_softmax(-1)[..., 5][mask.bool()].mean()).backward()
        return torch.cat([p.grad.flatten() for p in routers])

    want = gradient(model)
    got = gradient(torch.compile(model, backend="aot_eager", fullgraph=True))
    assert want.norm() > 0
    assert (got - want).norm() < (0.05 if autocast else 1e-4) * want.norm()


def test_torch_compile_with_a_cache() -> None:
    """Steps after the second compile nothing."""
    model = patched_model(num_hidden_layers=1)
    ids = torch.randint(2, 128, (2, 30))
    with torch.no_grad(), flux_ext.routes(model, "sparse"):
        want = model(ids, use_cache=False).logits
        compiled = torch.compile(model, backend="eager")
        out = compiled(ids[:, :24])
        torch.testing.assert_close(out.logits, want[:, :24], rtol=1e-4, atol=2e-4)
        for t in range(24, 30):
            with torch.compiler.set_stance("fail_on_recompile" if t >= 27 else "default"):
                out = compiled(ids[:, t : t + 1], past_key_values=out.past_key_values)
            torch.testing.assert_close(out.logits[:, 0], want[:, t], rtol=1e-4, atol=2e-4)


def test_packing_told_by_position_ids_is_honoured() -> None:
    """A graph cannot see whether they restart: it breaks there, and a model compiled as one graph says what to do."""
    model, position = patched_model(num_hidden_layers=2), torch.cat([torch.arange(18), torch.arange(12)])[None]
    ids = torch.randint(2, 128, (1, 30))
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        want = [model(part).logits for part in (ids[:, :18], ids[:, 18:])]
        got = compiled(ids, position_ids=position, use_cache=False).logits
        torch.testing.assert_close(got, torch.cat(want, 1), rtol=1e-4, atol=2e-4)
        assert len(last_routing(model).routes) == 2
        torch.testing.assert_close(
            compiled(ids, position_ids=torch.arange(30)[None], use_cache=False).logits, model(ids).logits
        )
        with pytest.raises(ValueError, match="position_ids restart in a batch of several rows"):
            compiled(ids.expand(2, -1), position_ids=position.expand(2, -1), use_cache=False)
        with pytest.raises(ValueError, match="packed into one row have no cache"):
            compiled(ids, position_ids=position, use_cache=True)
        whole = torch.compile(model, backend="eager", fullgraph=True)
        with pytest.raises(torch._dynamo.exc.Unsupported, match="give cu_seq_lens_q or an attention_mask"):
            whole(ids, position_ids=position, use_cache=False)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_a_forward_over_the_dynamic_cache_is_one_graph(backend: str) -> None:
    """As many graphs as the stock model makes: prompt, step, and one for steps over caches of any length."""
    torch._dynamo.utils.counters.clear()
    model = patched_model(num_hidden_layers=12 if backend == "eager" else 2)
    ids, mask = ragged((36, 20))
    mask[1, 32:34] = 0  # tokens that are masked between others
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    caches = [FluxCache(model.config, flux_ext.get_routers(model).config, page_size=4) for _ in range(2)]
    with torch.no_grad():
        for chunk in (slice(0, 30), *(slice(t, t + 1) for t in range(30, 36))):
            want, got = (
                run(ids[:, chunk], attention_mask=mask[:, : chunk.stop], past_key_values=cache).logits
                for run, cache in zip((model, compiled), caches, strict=True)
            )
            seen = mask[:, chunk].bool()
            torch.testing.assert_close(got[seen], want[seen], rtol=1e-4, atol=2e-4)
    assert torch.equal(*(cache.routes for cache in caches))
    assert (caches[0].layers[1].stored_tokens() == caches[1].layers[1].stored_tokens()).all()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3


def test_a_forward_that_makes_its_cache_breaks_once() -> None:
    """The cache is made outside: one graph for the mask, one for the decoder, one for the logits."""
    torch._dynamo.utils.counters.clear()
    model = patched_model(num_hidden_layers=4)
    ids, mask = ragged((36, 20))
    with torch.no_grad():
        out = torch.compile(model, backend="eager")(ids, attention_mask=mask)
        torch.testing.assert_close(out.logits[mask.bool()], model(ids, attention_mask=mask).logits[mask.bool()])
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3
        torch._dynamo.reset()
        whole = torch.compile(model, backend="eager", fullgraph=True)
        with pytest.raises(torch._dynamo.exc.Unsupported, match="give the forward one that was made outside"):
            whole(ids, attention_mask=mask)


def graphs_of_generate(model: Any, prompts: list[dict[str, Any]]) -> int:
    """Graphs that a compiled model makes for some prompts, of which it must break none; the tokens are those that it
    gives as it is."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    want = [model.generate(**prompt, **options) for prompt in prompts]
    model.compile(backend="eager")
    for prompt, tokens in zip(prompts, want, strict=True):
        assert torch.equal(model.generate(**prompt, **options), tokens)
    assert not torch._dynamo.utils.counters["graph_break"]
    graphs: int = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return graphs


@pytest.mark.parametrize(("routed", "masked"), [(True, False), (False, True)], ids=["routed", "forced, masked"])
def test_generate_makes_no_more_graphs_than_the_stock_model(routed: bool, masked: bool) -> None:
    """Of two prompts of two lengths, of any number of layers. ``generate`` gives position_ids; without a mask their
    values alone say that nothing is packed, and they are looked at without breaking the graph."""
    ids, mask = ragged((36, 30))
    prompts = [{"input_ids": ids[:, i:], **({"attention_mask": mask[:, i:]} if masked else {})} for i in (0, 5)]
    found = []
    for layers in (1, 3):
        model = patched_model(num_hidden_layers=layers)
        with contextlib.nullcontext() if routed else flux_ext.routes(model, "sparse"):
            found.append(graphs_of_generate(model, prompts))
    assert found[0] == found[1] <= graphs_of_generate(tiny(num_hidden_layers=1), prompts)


@pytest.mark.parametrize("cached", [False, True])
def test_positions_that_restart_where_nothing_may_be_packed(cached: bool) -> None:
    """One graph, which says so as it runs."""
    model, rows = patched_model(num_hidden_layers=1), 1 if cached else 2
    ids, position = torch.randint(2, 128, (rows, 30)), torch.cat([torch.arange(18), torch.arange(12)]).repeat(rows, 1)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for positions, message in ((torch.arange(30).repeat(rows, 1), None), (position, "position_ids restart")):
        cache = FluxCache(model.config, flux_ext.get_routers(model).config) if cached else None
        with torch.no_grad(), pytest.raises(ValueError, match=message) if message else contextlib.nullcontext():
            got = compiled(ids, position_ids=positions, past_key_values=cache, use_cache=cached).logits
            torch.testing.assert_close(got, model(ids, use_cache=False).logits)


def test_a_compiled_forward_over_a_cache_has_no_gradient_and_says_so() -> None:
    model = patched_model(num_hidden_layers=2)
    ids, cache = torch.randint(2, 128, (1, 30)), FluxCache(model.config, flux_ext.get_routers(model).config)
    compiled = torch.compile(model, backend="aot_eager")
    with flux_ext.routes(model, "full"):
        compiled(ids, past_key_values=cache).logits.sum().backward()  # the prompt's attention has one
        out = compiled(ids[:, :3], past_key_values=cache).logits
        with torch.no_grad():
            want = model(torch.cat([ids, ids[:, :3]], 1), use_cache=False).logits[:, 30:]
        torch.testing.assert_close(out, want, rtol=1e-4, atol=2e-4)
        with pytest.raises(RuntimeError, match="attention over a cache has no gradient"):
            out.sum().backward()
