"""Attention over sequences that are a prompt and what follows it, each by patterns of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from .mixture import attend_or_mix
from .operands import KeyValues, Routing
from .routed_attention import attend, attention, mix


def attention_after_prompt(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt: Routing,
    answer: Routing,
    prompt_end: Tensor | None,
    *,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    seq_start: Tensor | None = None,
    seq_end: Tensor | None = None,
) -> Tensor:
    """:func:`flux_ext.attention` by one pair of patterns in a prompt and by another in the answer behind it.

    The prompt's part is what it is without the answer: the last rows of a triangle are its own, and blocks of keys are
    chosen for its queries. The answer's queries see prompt and answer as their patterns say. Where both pairs are the
    same this is one call, otherwise two, over the rows of each part; what a call has no rows for it leaves 0.

    Args:
        q, k, v, scale, cu_seqlens, seq_start, seq_end: a batch, padded or not, or packed sequences, as for
            ``attention``; k and v have the rows of q.
        prompt, answer: routes and patterns of the two parts; the same route in both, hard or fractional.
        prompt_end: int32 ``[B]``, the row at which each sequence's answer begins; None: there are only prompts.

    Returns:
        ``[B, S, Hq, D]`` or packed ``[T, Hq, D]``, as q.
    """
    if prompt_end is None or (prompt.full, prompt.sparse) == (answer.full, answer.sparse):
        return attention(
            q,
            k,
            v,
            prompt.route,
            full=prompt.full,
            sparse=prompt.sparse,
            scale=scale,
            cu_seqlens=cu_seqlens,
            seq_start=seq_start,
            seq_end=seq_end,
        )
    if cu_seqlens is not None:
        begin, end = cu_seqlens[:-1], cu_seqlens[1:]
    else:
        begin = torch.zeros_like(prompt_end) if seq_start is None else seq_start
        end = torch.full_like(prompt_end, q.shape[1]) if seq_end is None else seq_end
    middle = torch.minimum(torch.maximum(prompt_end, begin), end)
    parts = []
    for routing, first, last in ((prompt, begin, middle), (answer, middle, end)):
        kv = KeyValues(k, v, begin, last)
        out = attend_or_mix(attend, mix, q, kv, routing, scale, first, last, False)
        assert isinstance(out, Tensor)
        parts.append(out)
    return parts[0] + parts[1]
