"""generate on a patched model: every decoding mode, turns, assistants, and what is refused."""

from typing import Any

import pytest
import torch
from models import SMALL, ragged, scramble, tiny
from transformers import GenerationConfig

import flux_ext
from flux_ext import FluxCache, FluxConfig


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
