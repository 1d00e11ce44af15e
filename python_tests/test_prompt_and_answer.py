"""Prompt and answer in one call, and blocks chosen within bounds: outputs and gradients, against the twin."""

from typing import Any

import pytest
import torch
from torch import Tensor

from flux_ext import BlockSparse, Full, Streaming, Triangle, attention, operators
from flux_ext.operators import KeyValues, Routing, attention_after_prompt, reference
from flux_ext.operators.block_selection import select_blocks

BLOCKS = BlockSparse(threshold=0.5, width=64)
PATTERNS: dict[str, tuple[Any, Any]] = {  # full and sparse of the prompt, sparse of the answer
    "streaming, dense": (Routing(None, Full(), Streaming(4, 32)), Full()),
    "triangle": (Routing(None, Full(), Triangle(4, 32, last_q=20)), Streaming(4, 32)),
    "blocks": (Routing(None, Full(), BLOCKS), Full()),
    "blocks in full": (Routing(None, BLOCKS, Streaming(4, 32)), Streaming(4, 32)),
}
STARTS, ENDS, PROMPTS = (0, 31, 7), (290, 300, 7), (250, 290, 7)
"""Rows of three sequences of a batch; the last has none."""


def by_hand(q: Tensor, k: Tensor, v: Tensor, prompt: Routing, answer: Routing, end: int) -> Tensor:
    """Of one sequence ``[1, S, H, D]``: its prompt alone, then the answer's rows over everything."""
    chosen = Routing(
        prompt.route,
        *(
            select_blocks(p, q[:, :end], k[:, :end]) if isinstance(p, BlockSparse) else p
            for p in (prompt.full, prompt.sparse)
        ),
    )
    double = [x.double() for x in (q, k, v)]
    first = [x[:, :end] for x in double]
    parts = [
        reference.attention(*first, prompt.route, full=chosen.full, sparse=chosen.sparse),
        reference.attention(double[0][:, end:], *double[1:], answer.route, full=answer.full, sparse=answer.sparse),
    ]
    return torch.cat(parts, 1)


@pytest.mark.parametrize("route", ["hard", "fractional"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", PATTERNS)
def test_outputs_and_gradients(name: str, packed: bool, route: str) -> None:
    (_, full, sparse), after = PATTERNS[name]
    q, k, v = (torch.randn(3, 300, heads, 16, requires_grad=True) for heads in (4, 2, 2))
    chosen = torch.tensor([[0, 1], [1, 0], [1, 1]]) if route == "hard" else torch.rand(3, 2, requires_grad=True)
    leaves = [q, k, v, *([chosen] if route == "fractional" else [])]
    prompt, answer = Routing(chosen, full, sparse), Routing(chosen, Full(), after)
    spans = list(zip(STARTS, ENDS, PROMPTS, strict=True))
    if packed:
        rows = [(b, slice(begin, end)) for b, (begin, end, _) in enumerate(spans)]
        bounds = torch.tensor([0, *(end - begin for begin, end, _ in spans)]).cumsum(0).int()
        ends = bounds[:-1] + torch.tensor([p - begin for begin, _, p in spans])
        inputs = [torch.cat([x[b, r] for b, r in rows]) for x in (q, k, v)]
        out = attention_after_prompt(*inputs, prompt, answer, ends.int(), cu_seqlens=bounds)
        found = list(out.split([end - begin for begin, end, _ in spans]))
    else:
        start, end = torch.tensor(STARTS).int(), torch.tensor(ENDS).int()
        bounds = {"seq_start": start, "seq_end": end}
        out = attention_after_prompt(q, k, v, prompt, answer, torch.tensor(PROMPTS).int(), **bounds)
        found = [out[b, begin:end] for b, (begin, end, _) in enumerate(spans)]
        assert not out[1, :31].any() and not out[2].any()  # padding
    want = []
    for b, (begin, end, p) in enumerate(spans):
        own = [x[b : b + 1, begin:end] for x in (q, k, v)]
        parts = (x._replace(route=chosen[b : b + 1]) for x in (prompt, answer))
        want.append(by_hand(*own, *parts, p - begin)[0] if end > begin else torch.zeros(0, 4, 16).double())
    got, exact = torch.cat(found), torch.cat(want)
    torch.testing.assert_close(got, exact.float(), atol=2e-5, rtol=1e-4)
    direction = torch.randn_like(got)
    gradients = torch.autograd.grad((got * direction).sum(), leaves)
    for x, y in zip(gradients, torch.autograd.grad((exact * direction).sum(), leaves), strict=True):
        torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-3)


def test_without_an_answer_it_is_attention() -> None:
    q, k, v = (torch.randn(2, 200, heads, 16) for heads in (4, 2, 2))
    routing = Routing(torch.tensor([[0, 1], [1, 1]]), Full(), Triangle(4, 32, last_q=20))
    answer = Routing(routing.route, Full(), Streaming(4, 32))
    want = attention(q, k, v, routing.route, sparse=routing.sparse)
    assert torch.equal(attention_after_prompt(q, k, v, routing, answer, None), want)
    everything = torch.full((2,), 200, dtype=torch.int32)
    torch.testing.assert_close(attention_after_prompt(q, k, v, routing, answer, everything), want)


@pytest.mark.parametrize("bounded", [False, True])
def test_gradcheck_of_block_lists(bounded: bool) -> None:
    """Finite differences, with the lists as chosen: scores are not differentiated."""
    q, k, v = (torch.randn(1, 200, heads, 8) for heads in (2, 1, 1))
    start = torch.tensor([13], dtype=torch.int32) if bounded else None
    begin = 13 if bounded else 0
    pattern = select_blocks(BLOCKS, q[:, begin:], k[:, begin:])
    assert int(pattern.full_counts().sum()) < 2 + 4  # some are left out
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def attend(*x: Tensor) -> Tensor:
        return attention(*x, full=pattern, seq_start=start)[:, begin:]

    torch.autograd.gradcheck(attend, leaves, eps=1e-2, atol=1e-2, rtol=5e-2, fast_mode=True)


@pytest.mark.parametrize("layout", ["padded", "packed", "cache", "paged"])
def test_a_threshold_within_bounds(layout: str) -> None:
    """Every layout: the blocks of each sequence are those it has alone."""
    lengths, q_len = [300, 170], 140
    alone = [[torch.randn(n, heads, 16) for heads in (4, 2, 2)] for n in lengths]
    route = torch.tensor([[1, 0], [1, 1]])
    cached = layout in ("cache", "paged")
    skip = [n - q_len if cached else 0 for n in lengths]
    if layout == "packed":
        bounds = torch.tensor([0, 300, 470], dtype=torch.int32)
        got = attention(*(torch.cat(x) for x in zip(*alone, strict=True)), route, sparse=BLOCKS, cu_seqlens=bounds)
        found = list(got.split(lengths))
    else:
        q, k, v = (torch.full((2, 300, heads, 16), torch.nan) for heads in (4, 2, 2))
        for b, own in enumerate(alone):
            for x, y in zip((q, k, v), own, strict=True):
                x[b, : lengths[b]] = y
        kv_len = torch.tensor(lengths, dtype=torch.int32)
        if layout == "padded":
            q, k, v = (x.nan_to_num() for x in (q, k, v))
            found = list(attention(q, k, v, route, sparse=BLOCKS, seq_end=kv_len))
        else:
            q = torch.stack([own[0][-q_len:] for own in alone])
            options: dict[str, Any] = {"kv_len": kv_len}
            if layout == "paged":
                k, v = (x.reshape(30, 20, 2, 16).flip(0) for x in (k, v))
                options["page_table"] = torch.arange(29, -1, -1, dtype=torch.int32).view(2, 15)
            found = list(attention(q, k, v, route, sparse=BLOCKS, **options))
    for b, (q, k, v) in enumerate(alone):
        q = q[skip[b] :]
        want = attention(q[None], k[None], v[None], route[b : b + 1], sparse=BLOCKS)[0]
        torch.testing.assert_close(found[b][: len(q)], want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("change", ["q_end", "kv_end", "page_table"])
def test_bad_bounds_beside_a_threshold(change: str) -> None:
    """The rule that is broken is named, whichever step meets it first."""
    q, k = torch.randn(2, 20, 4, 16), torch.randn(2, 20, 2, 16)
    wrong = {
        "q_end": (KeyValues(k, k), {"q_end": torch.zeros(3, dtype=torch.int32)}, r"q_end must be .*got \[3\]"),
        "kv_end": (KeyValues(k, k, end=torch.tensor([20, 21]).int()), {}, "kv_len must .*21"),
        "page_table": (
            KeyValues(k, k, end=torch.tensor([20, 20]).int(), page_table=torch.tensor([[0], [5]]).int()),
            {},
            "page_table must index the 2 pages, got 5",
        ),
    }
    kv, bounds, message = wrong[change]
    with pytest.raises(ValueError, match=message):
        operators.attend(q, kv, Routing(None, BLOCKS, Full()), 0.25, **bounds)
