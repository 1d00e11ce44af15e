"""What the tests of mixed attention share, on the CPU and on CUDA: weights, patterns and how near is near enough."""

from __future__ import annotations

from typing import Any

import torch
from cases import Case, Inputs
from torch import Tensor

import flux_ext
from flux_ext import BlockSparse, Full, Streaming, Triangle
from flux_ext.operators import Routing, reference
from flux_ext.operators.operands import AttendArguments, bound_rows
from flux_ext.operators.routed_attention import operator_arguments
from flux_ext.operators.testing import assert_as_accurate

HALVES = [torch.bfloat16, torch.float16]
# Sums over all keys or queries in fp32: their order alone makes a few epsilons.
FLOOR = 16 * torch.finfo(torch.float32).eps


def weights(case: Case, per_head: bool = True) -> Tensor:
    """Of every sequence head (or sequence), from 0 to 1, both included."""
    batch = len(case.q_lens)
    shape = (batch, case.kv_heads) if per_head else (batch,)
    count = batch * case.kv_heads if per_head else batch
    return torch.linspace(0, 1, count).view(shape) if count > 1 else torch.full(shape, 0.3)


def lists(x: Inputs, width: int, keep: float, seed: int) -> BlockSparse:
    """Random block lists for the queries and keys of a batch; some are empty."""
    g = torch.Generator().manual_seed(seed)
    batch, q_len, kv_len, heads = x.q.shape[0], x.q.shape[1], x.k.shape[1], x.k.shape[2]
    q_blocks = -(-q_len // 128)
    blocks = torch.zeros(batch, heads, q_blocks, -(-kv_len // width), dtype=torch.int32)
    counts = torch.zeros(batch, heads, q_blocks, dtype=torch.int32)
    for b in range(batch):
        for h in range(heads):
            for i in range(q_blocks):
                last = (kv_len - q_len + min((i + 1) * 128, q_len) - 1) // width
                chosen = [n for n in range(last + 1) if torch.rand((), generator=g) < keep]
                counts[b, h, i] = len(chosen)
                blocks[b, h, i, : len(chosen)] = torch.tensor(chosen, dtype=torch.int32)
    return BlockSparse(blocks.to(x.q.device), counts.to(x.q.device), width)


def gradients(attention: Any, x: Inputs, w: Tensor, dtype: torch.dtype, of: Tensor) -> dict[str, Tensor]:
    """The output, and the gradients of its product with ``of``."""
    leaves = {n: t.to(dtype).requires_grad_() for n, t in {"q": x.q, "k": x.k, "v": x.v}.items()}
    leaves["w"] = w.to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    out = attention(*leaves.values(), **x.kwargs)
    loss = (out * of.to(dtype)).nan_to_num().sum()
    return {"out": out.detach(), **dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))}


def check(x: Inputs, w: Tensor, dtype: torch.dtype, factor: float = 2.0) -> None:
    """Output and all gradients against fp64, beside plain PyTorch in the same precision.

    Where all terms of a gradient cancel (a query that sees one key) the rounding of fp32 is left, on CUDA: there it
    may have that of values of the order of one.
    """
    x = x.cast(dtype)
    double, choice = [t.double() for t in (x.q, x.k, x.v)], torch.zeros_like(w, dtype=torch.int32)
    full, sparse = (reference.attention(*double, choice + i, **x.kwargs) for i in (0, 1))
    # One sign throughout the sums of a weight's gradient: where terms cancel, only rounding is left.
    of = torch.randn(full.shape, generator=torch.Generator().manual_seed(1)).to(full).abs()
    of = of * torch.where(sparse < full, -1.0, 1.0)
    got = gradients(flux_ext.attention, x, w, dtype, of)
    plain = gradients(reference.attention, x, w, dtype, of)
    exact = gradients(reference.attention, x.cast(torch.float64), w.double(), torch.float64, of)
    assert got["out"].dtype == dtype and got["w"].dtype == torch.float32
    assert_as_accurate(got["out"], exact["out"], plain["out"], factor)
    for name in "qkvw":
        # Padding is NaN in the inputs; its gradient is 0 here and whatever autograd makes of it in the twin.
        real = ~getattr(x, name).isnan() if name != "w" else torch.ones_like(w, dtype=torch.bool)
        assert got[name].isfinite().all() and not got[name][~real].any()
        floor = max(torch.finfo(dtype).eps / 4, FLOOR)
        want, base = torch.where(real, exact[name], 0), torch.where(real, plain[name], 0)
        if x.q.is_cuda and want.norm() <= FLOOR * want.numel() ** 0.5:
            assert got[name].double().norm() <= FLOOR * want.numel() ** 0.5, f"grad of {name}"
        else:
            assert_as_accurate(got[name], want, base, factor, floor, f"grad of {name}")


PAIRS: dict[str, tuple[Any, Any]] = {
    "lists in streaming": (Streaming(3, 60), lambda x: lists(x, 64, 0.5, 0)),
    "streaming beside lists": (lambda x: lists(x, 128, 0.4, 1), Streaming(40, 30)),
    "two lists": (lambda x: lists(x, 64, 0.5, 2), lambda x: lists(x, 128, 0.5, 3)),
    "full beside lists": (Full(), lambda x: lists(x, 128, 0.6, 4)),
    "triangle beside streaming": (Streaming(0, 90), Triangle(64, 30, last_q=40)),
    "the same twice": (Streaming(5, 80), Streaming(5, 80)),
    "sparse sees more": (Streaming(2, 16), Full()),
    "selected blocks": (Full(), BlockSparse(threshold=0.8)),
}
"""Of a full and a sparse pattern, or functions that make one for some inputs."""


def mix_arguments(x: Inputs, w: Tensor) -> AttendArguments:
    """Of the operator ``mix``."""
    kwargs = {n: x.kwargs.get(n) for n in ("cu_seqlens", "seq_start", "seq_end", "kv_len", "page_table")}
    kv, q_begin, q_end = bound_rows(x.q, x.k, x.v, **kwargs)
    routing = Routing(None, x.kwargs["full"], x.kwargs["sparse"])
    return operator_arguments(x.q, kv, routing, 0.25, q_begin, q_end)._replace(route=w)
