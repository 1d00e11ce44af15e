"""generate on a patched model: every decoding mode, turns, assistants, and what is refused."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from models import SMALL, ragged, scramble, tiny
from transformers import GenerationConfig, LogitsProcessor

import flux_ext
from flux_ext import FluxCache, FluxConfig
from flux_ext.models.patching import last_routing, policy


@pytest.fixture(scope="module")
def model() -> Any:
    """A patched model whose random routers route some layers of some prompts sparse."""
    model = flux_ext.patch(tiny("qwen3"), FluxConfig(**SMALL))
    torch.manual_seed(3)
    scramble(flux_ext.get_routers(model))
    return model


@pytest.fixture(params=["left", "alone"])
def inputs(request: pytest.FixtureRequest) -> dict[str, Any]:
    ids, mask = ragged() if request.param == "left" else ragged((60,))
    return {"input_ids": ids, "attention_mask": mask}


def test_greedy_follows_the_pattern(model: Any, inputs: dict[str, Any]) -> None:
    """Every token is the argmax of one forward over everything so far, under the routes of the prompt."""
    out = model.generate(**inputs, max_new_tokens=24, do_sample=False, return_dict_in_generate=True)
    routes = out.past_key_values.routes
    assert 0 < routes.float().mean() < 1, "the routers should mix"
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with flux_ext.routes(model, routes):
        for _ in range(24):
            position = (mask.cumsum(1) - 1).clamp(min=0)
            logits = model(ids, attention_mask=mask, position_ids=position, use_cache=False).logits
            ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], 1)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    assert torch.equal(out.sequences, ids)


def test_a_padded_batch_generates_what_each_prompt_does_alone(model: Any) -> None:
    ids, mask = ragged()
    out = model.generate(ids, attention_mask=mask, max_new_tokens=16, do_sample=False, return_dict_in_generate=True)
    for b in range(3):
        alone = model.generate(
            ids[b : b + 1, mask[b].bool()], max_new_tokens=16, do_sample=False, return_dict_in_generate=True
        )
        assert torch.equal(alone.past_key_values.routes[0], out.past_key_values.routes[b])
        assert torch.equal(alone.sequences[0, -16:], out.sequences[b, -16:])


@pytest.mark.parametrize("kwargs", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}], ids=str)
def test_beam_search(model: Any, inputs: dict[str, Any], kwargs: dict[str, Any]) -> None:
    """Beams from the trimmed cache are those without a cache."""
    with flux_ext.routes(model, torch.tensor([0, 1, 1, 0])):
        beams = model.generate(**inputs, max_new_tokens=10, do_sample=False, **kwargs)
        assert torch.equal(
            beams, model.generate(**inputs, max_new_tokens=10, do_sample=False, use_cache=False, **kwargs)
        )


def test_all_full_beams_and_samples_are_the_stock_models(inputs: dict[str, Any]) -> None:
    model = tiny("llama")

    def outputs() -> list[torch.Tensor]:
        torch.manual_seed(1)
        return [
            model.generate(**inputs, max_new_tokens=10, **kwargs)
            for kwargs in ({"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}, {"use_cache": False})
        ]

    stock = outputs()
    flux_ext.patch(model, FluxConfig(**SMALL))
    with flux_ext.routes(model, "full"):
        for a, b in zip(stock, outputs(), strict=True):
            assert torch.equal(a, b)


def test_sampling_is_that_of_the_uncached_model(model: Any, inputs: dict[str, Any]) -> None:
    with flux_ext.routes(model, "sparse"):
        samples = []
        for use_cache in (True, False):
            torch.manual_seed(1)
            samples.append(model.generate(**inputs, max_new_tokens=12, do_sample=True, use_cache=use_cache))
    assert torch.equal(*samples)


def test_turns_continue_with_the_first_prompts_route(model: Any) -> None:
    first, second = torch.randint(2, 128, (1, 50)), torch.randint(2, 128, (1, 9))
    out = model.generate(first, max_new_tokens=6, do_sample=False, return_dict_in_generate=True)
    cache, routes = out.past_key_values, out.past_key_values.routes
    turn = torch.cat([out.sequences, second], 1)
    # A fresh generate over the same tokens would route anew: force what the first prompt decided.
    got = model.generate(turn, past_key_values=cache, max_new_tokens=8, do_sample=False)
    with flux_ext.routes(model, routes):
        assert torch.equal(got, model.generate(turn, max_new_tokens=8, do_sample=False, use_cache=False))
    assert torch.equal(cache.routes, routes)


@pytest.mark.parametrize("seed", range(3))
def test_prompt_lookup(model: Any, seed: int) -> None:
    """The first forward has candidates after the prompt, which must not sway the routers."""
    torch.manual_seed(seed)
    prompt = torch.randint(2, 20, (1, 12)).repeat(1, 5)  # repeats itself, so that lookups hit
    kwargs: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "return_dict_in_generate": True}
    want, got = model.generate(prompt, **kwargs), model.generate(prompt, prompt_lookup_num_tokens=8, **kwargs)
    assert torch.equal(got.past_key_values.routes, want.past_key_values.routes)
    assert torch.equal(got.sequences, want.sequences)
    with flux_ext.routes(model, torch.tensor([1, 0, 0, 1])):
        want, got = model.generate(prompt, **kwargs), model.generate(prompt, prompt_lookup_num_tokens=8, **kwargs)
    assert torch.equal(got.sequences, want.sequences)


@pytest.mark.parametrize("patched_assistant", [True, False])
def test_assisted_decoding(model: Any, patched_assistant: bool) -> None:
    assistant = tiny("llama", num_hidden_layers=2)
    prompt = torch.randint(2, 128, (1, 40))
    if patched_assistant:
        flux_ext.patch(assistant, FluxConfig(**SMALL))
    with flux_ext.routes(model, torch.tensor([1, 0, 1, 1])):
        want = model.generate(prompt, max_new_tokens=20, do_sample=False)
        got = model.generate(prompt, assistant_model=assistant, max_new_tokens=20, do_sample=False)
    assert torch.equal(got, want)


def test_a_patched_model_as_its_own_assistant() -> None:
    """Every candidate is accepted, so caches grow by many tokens at a time."""
    model = flux_ext.patch(tiny("llama"), FluxConfig(**SMALL))
    prompt = torch.randint(2, 128, (1, 40))
    with flux_ext.routes(model, "sparse"):
        want = model.generate(prompt, max_new_tokens=30, do_sample=False)
        got = model.generate(prompt, assistant_model=model, max_new_tokens=30, do_sample=False)
    assert torch.equal(got, want)


def test_chunked_prefill() -> None:
    prompt = torch.randint(2, 128, (2, 50))
    model = flux_ext.patch(tiny("llama"), FluxConfig(**SMALL))
    with pytest.raises(ValueError, match="first_chunk"):
        model.generate(prompt, max_new_tokens=4, prefill_chunk_size=16)
    flux_ext.unpatch(model)
    flux_ext.patch(model, FluxConfig(route_on="first_chunk", **SMALL))
    scramble(flux_ext.get_routers(model), 0.5)
    kwargs: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    out = model.generate(prompt, prefill_chunk_size=16, return_dict_in_generate=True, **kwargs)
    assert torch.equal(out.past_key_values.routes, model(prompt[:, :16]).past_key_values.routes)
    with flux_ext.routes(model, out.past_key_values.routes):
        assert torch.equal(out.sequences, model.generate(prompt, use_cache=False, **kwargs))


def test_chunked_prefill_of_a_padded_batch() -> None:
    """A row whose first chunk is all padding decides at its first chunk with tokens."""
    model = flux_ext.patch(tiny("llama"), FluxConfig(route_on="first_chunk", **SMALL))
    scramble(flux_ext.get_routers(model), 0.5)
    ids, mask = ragged((60, 20, 37))
    out = model.generate(
        ids, attention_mask=mask, prefill_chunk_size=16, max_new_tokens=8, do_sample=False, return_dict_in_generate=True
    )
    starts = ((0, 0, 16), (1, 40, 48), (2, 23, 32))  # each prompt's tokens in its first chunk that has any
    first = torch.stack([model(ids[b : b + 1, s:e]).past_key_values.routes[0] for b, s, e in starts])
    assert torch.equal(out.past_key_values.routes, first)
    with flux_ext.routes(model, first):
        want = model.generate(ids, attention_mask=mask, use_cache=False, max_new_tokens=8, do_sample=False)
    assert torch.equal(out.sequences, want)


def test_a_cache_of_ones_own(model: Any, inputs: dict[str, Any]) -> None:
    want = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    cache = FluxCache(model.config, flux_ext.get_routers(model).config, page_size=4)
    assert torch.equal(model.generate(**inputs, past_key_values=cache, max_new_tokens=12, do_sample=False), want)
    assert cache.get_seq_length() == inputs["input_ids"].shape[1] + 11


def test_inputs_embeds(model: Any) -> None:
    ids = torch.randint(2, 128, (2, 40))
    want = model.generate(ids, max_new_tokens=8, do_sample=False)
    embeds = model.get_input_embeddings()(ids)
    got = model.generate(inputs_embeds=embeds, max_new_tokens=8, do_sample=False)
    assert torch.equal(got, want[:, 40:])


def test_triangle_decodes_as_streaming() -> None:
    """The last rows of the prompt see everything, the steps after it do not."""
    model = flux_ext.patch(tiny("llama"), FluxConfig(pattern="triangle", last_q=8, **SMALL))
    ids = torch.randint(2, 128, (2, 60))
    with flux_ext.routes(model, "sparse"):
        prompt = model(ids, use_cache=False).logits
        out = model(ids)
        torch.testing.assert_close(out.logits, prompt)
        cache = FluxCache(model.config, flux_ext.get_routers(model).config, page_size=4)
        model(ids, past_key_values=cache)
        model(ids[:, :1], past_key_values=cache)
        assert cache.layers[0].stored_tokens().max() <= 4 + 16 + 4
    with flux_ext.routes(model, "full"):
        full = model(ids, use_cache=False).logits
    flux_ext.patch(flux_ext.unpatch(model), FluxConfig(**SMALL))
    with flux_ext.routes(model, "sparse"):
        assert not torch.allclose(model(ids, use_cache=False).logits[:, -1], prompt[:, -1], atol=1e-3)
    assert not torch.allclose(full[:, -1], prompt[:, -1], atol=1e-3)  # keys of the upper layers are still sparse


@pytest.mark.parametrize("name", ["quantized", "offloaded"])
def test_other_cache_implementations_are_refused(model: Any, name: str) -> None:
    with pytest.raises(ValueError, match="cache_implementation"):
        model.generate(torch.randint(2, 128, (1, 10)), max_new_tokens=2, cache_implementation=name)


def test_continuous_batching_is_refused(model: Any) -> None:
    with pytest.raises(NotImplementedError, match="generate_batch"):
        model.generate_batch([[1, 2, 3]], generation_config=GenerationConfig(max_new_tokens=2))


# ---- without a cache: the first forward decides, as with one


@pytest.mark.parametrize("seed", range(4))
def test_without_a_cache_the_prompt_decides(model: Any, inputs: dict[str, Any], seed: int) -> None:
    torch.manual_seed(seed)
    ids, mask = ragged(tuple(range(60, 60 - 9 * len(inputs["input_ids"]), -9)))
    kwargs: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 24, "do_sample": False}
    want = model.generate(ids, return_dict_in_generate=True, **kwargs)
    assert torch.equal(model.generate(ids, use_cache=False, **kwargs), want.sequences)
    assert torch.equal(last_routing(model).routes, want.past_key_values.routes)


@pytest.mark.parametrize("kwargs", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
def test_without_a_cache_the_routers_decide_once(model: Any, inputs: dict[str, Any], kwargs: dict[str, Any]) -> None:
    outputs = []
    for use_cache in (True, False):
        torch.manual_seed(1)
        outputs.append(model.generate(**inputs, max_new_tokens=12, use_cache=use_cache, **kwargs))
        outputs.append(last_routing(model).routes)
    assert torch.equal(outputs[0], outputs[2]) and torch.equal(outputs[1], outputs[3])


def test_held_routes_end_with_their_generate_call(model: Any) -> None:
    """Also after an error in it, inside another one, and beside one in another thread."""
    prompts = [torch.randint(2, 128, (1, n)) for n in (60, 45, 52)]
    kwargs: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    want = [model.generate(p, **kwargs) for p in prompts]
    routes = [model(p).past_key_values.routes for p in prompts]
    assert not torch.equal(routes[0], routes[1]), "the routers should tell the prompts apart"

    class Inner(LogitsProcessor):
        """Generates, and runs a plain forward, between the steps of another generate; in the end it fails."""

        fail = False

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            if self.fail and input_ids.shape[1] == 63:
                raise KeyError("stop")
            if input_ids.shape[1] == 62:
                assert torch.equal(model.generate(prompts[1], use_cache=False, **kwargs), want[1])
                model(prompts[2], use_cache=False)
                assert torch.equal(last_routing(model).routes, routes[2])
            return scores

    inner = Inner()
    assert torch.equal(model.generate(prompts[0], use_cache=False, logits_processor=[inner], **kwargs), want[0])
    inner.fail = True
    with pytest.raises(KeyError):
        model.generate(prompts[0], use_cache=False, logits_processor=[inner], **kwargs)
    model(prompts[1], use_cache=False)
    assert torch.equal(last_routing(model).routes, routes[1])
    with ThreadPoolExecutor(3) as threads:
        got = list(threads.map(lambda p: model.generate(p, use_cache=False, **kwargs), prompts))
    assert all(map(torch.equal, got, want))


def test_forced_routes_are_held_too(model: Any) -> None:
    """Those of the first forward, as a cache would hold them."""
    prompt = torch.randint(2, 128, (2, 40))
    seen = []

    def alternate(layer: int, logits: torch.Tensor) -> torch.Tensor:
        seen.append(layer)
        return torch.tensor([len(seen) % 2, 1 - len(seen) % 2])

    outputs = []
    for use_cache in (True, False):
        seen.clear()
        with policy(model, alternate):
            outputs.append(model.generate(prompt, max_new_tokens=6, do_sample=False, use_cache=use_cache))
        assert seen == [0, 1, 2, 3]
    assert torch.equal(*outputs)


@pytest.mark.parametrize("family", ["gemma3", "phi3", "mixtral", "olmo2"])
def test_every_family_hands_the_routes_on(family: str) -> None:
    model = flux_ext.patch(tiny(family), FluxConfig(**SMALL))
    torch.manual_seed(3)
    scramble(flux_ext.get_routers(model))
    prompt, kwargs = torch.randint(2, 128, (2, 40)), {"max_new_tokens": 4, "do_sample": False}
    want = model.generate(prompt, return_dict_in_generate=True, **kwargs)
    assert torch.equal(model.generate(prompt, use_cache=False, **kwargs), want.sequences)
    routing = last_routing(model)
    assert routing.logits is None and torch.equal(routing.routes, want.past_key_values.routes)
