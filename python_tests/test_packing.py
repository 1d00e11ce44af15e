"""Padding and packing: a prompt gets the same route alone, padded and packed; what cannot be honoured is refused."""

import pytest
import torch
from models import patched_model, ragged, routes_and_logits
from torch import Tensor

import flux_ext
from flux_ext.forward_context import ForwardContext
from flux_ext.models.patching import get_routers


@pytest.mark.parametrize("granularity", ["layer", "head"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_routes_do_not_depend_on_the_layout(family: str, granularity: str) -> None:
    model = patched_model(family, granularity)
    lengths = (60, 31, 45)
    ids, mask = ragged(lengths)
    prompts = [ids[b, mask[b].bool()] for b in range(3)]
    alone = [routes_and_logits(model, p[None]) for p in prompts]
    routes = torch.cat([a[0] for a in alone])
    logits = torch.cat([a[1] for a in alone])
    assert 0 < routes.float().mean() < 1, "the routers should mix"

    def check(got: tuple[Tensor, Tensor, Tensor], rows: list[Tensor]) -> None:
        assert torch.equal(got[0], routes)
        torch.testing.assert_close(got[1], logits, rtol=1e-4, atol=1e-3)
        for row, one in zip(rows, alone, strict=True):
            torch.testing.assert_close(row, one[2][0], rtol=1e-4, atol=3e-4)

    for side in ("left", "right"):
        padded, mask = torch.zeros(3, 60, dtype=torch.long), torch.zeros(3, 60, dtype=torch.long)
        for b, p in enumerate(prompts):
            rows = slice(60 - len(p), 60) if side == "left" else slice(0, len(p))
            padded[b, rows], mask[b, rows] = p, 1
        position = (mask.cumsum(1) - 1).clamp(min=0)
        got = routes_and_logits(model, padded, attention_mask=mask, position_ids=position)
        check(got, [got[2][b, mask[b].bool()] for b in range(3)])

    packed = torch.cat(prompts)[None]
    position = torch.cat([torch.arange(n) for n in lengths])[None]
    bounds = torch.tensor([0, 60, 91, 136], dtype=torch.int32)
    flash = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 60, "max_length_k": 60}
    for kwargs in ({"position_ids": position}, {"position_ids": position, **flash}):
        got = routes_and_logits(model, packed, **kwargs)
        check(got, list(got[2][0].split(list(lengths))))


def test_packed_rows_have_no_cache() -> None:
    model = patched_model()
    ids = torch.randint(2, 128, (1, 30))
    position = torch.cat([torch.arange(18), torch.arange(12)])[None]
    assert model(ids, position_ids=position).past_key_values is None
    with pytest.raises(ValueError, match="use_cache=False"):
        model(ids, position_ids=position, use_cache=True)


def test_packed_sequences_in_several_rows_are_refused() -> None:
    model, position = patched_model(), torch.cat([torch.arange(18), torch.arange(12)]).expand(2, -1)
    with pytest.raises(ValueError, match="position_ids restart in a batch"):
        model(torch.randint(2, 128, (2, 30)), position_ids=position)


def test_packing_that_cannot_be_honoured() -> None:
    model, position = patched_model(), torch.cat([torch.arange(18), torch.arange(12)])[None]
    ids, bounds = torch.randint(2, 128, (1, 30)), torch.tensor([0, 18, 30], dtype=torch.int32)
    cache = flux_ext.FluxCache(model.config, get_routers(model).config)
    padded = torch.ones(1, 30).index_fill(1, torch.tensor([29]), 0)
    for kwargs, message in (
        ({"cu_seq_lens_q": bounds, "past_key_values": cache}, "cu_seq_lens_q: .* no cache"),
        ({"position_ids": position, "past_key_values": cache}, "restart with a cache"),
        ({"cu_seq_lens_q": bounds, "attention_mask": padded}, "padding beside cu_seq_lens_q"),
    ):
        with pytest.raises(ValueError, match=message):
            model(ids, **kwargs)
    with pytest.raises(ValueError, match="got a batch of 2 rows"):
        model(ids.expand(2, -1), cu_seq_lens_q=bounds)
    want = model(ids, position_ids=position, cu_seq_lens_q=bounds).logits
    ones = torch.ones_like(ids)  # says nothing that cu_seq_lens_q does not
    assert torch.equal(model(ids, position_ids=position, cu_seq_lens_q=bounds, attention_mask=ones).logits, want)


def test_a_mask_is_read_once_for_copies_of_a_batch() -> None:
    batch = ForwardContext(mask=torch.tensor([[False, True]]))
    assert batch.to("cpu").host_mask() is batch.host_mask() is not None


@pytest.mark.parametrize(
    "mask, message",
    [
        (torch.tensor([[1, 1, 0, 1, 1]]), "hole"),
        (torch.ones(1, 3), "attention_mask must be"),
        (torch.ones(2, 5), "attention_mask must be"),
        (torch.ones(1, 1, 5, 5), "padding mask"),
    ],
)
def test_masks_that_cannot_be_honoured(mask: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        patched_model()(torch.randint(2, 128, (1, 5)), attention_mask=mask)
