"""Times of a mixture's forward and backward pass beside those of dense attention; needs a GPU.

    python -m benchmarks.mixture [--head-dim D] [--window N] [LENGTH ...]

bf16, one sequence, 32 query and 8 KV heads, streaming with sink 128. The contenders take turns; of each the least of
five times, as the host sees it: launches and torch's own kernels count. Beside each time its ratio to dense attention.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import flux_ext
from flux_ext import Streaming
from flux_ext.operators import mixture

CONTENDERS = ("dense", "two calls", "one walk")
PASSES = ("forward", "backward", "both")


def milliseconds(call: Callable[[], object], times: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(times):
        call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / times


def attend(leaves: list[Tensor], sparse: Streaming, contender: str) -> Tensor:
    q, k, v, w = leaves
    faster = mixture.one_walk_is_faster
    mixture.one_walk_is_faster = lambda *_: contender == "one walk"
    try:
        return flux_ext.attention(q, k, v, None if contender == "dense" else w, sparse=sparse)
    finally:
        mixture.one_walk_is_faster = faster


def inputs(length: int, head_dim: int) -> list[Tensor]:
    """Queries, keys, values and the weight of every KV head."""
    torch.manual_seed(0)
    shapes = ((32, head_dim), (8, head_dim), (8, head_dim))
    q, k, v = (torch.randn(1, length, *s, device="cuda", dtype=torch.bfloat16, requires_grad=True) for s in shapes)
    return [q, k, v, torch.full((1, 8), 0.3, device="cuda", requires_grad=True)]


def measure(length: int, head_dim: int, sparse: Streaming) -> None:
    leaves = inputs(length, head_dim)
    gradient = torch.randn_like(leaves[0])
    times = max(1, min(20, 2_000_000_000 // length**2))
    least: dict[tuple[str, str], float] = {}
    for _ in range(6):  # the first warms up
        for contender in CONTENDERS:
            out, used = attend(leaves, sparse, contender), leaves[: 3 if contender == "dense" else 4]
            with torch.no_grad():
                forward = milliseconds(partial(attend, leaves, sparse, contender), times)
            backward = milliseconds(partial(torch.autograd.grad, out, used, gradient, retain_graph=True), times)
            for name, ms in zip(PASSES, (forward, backward, forward + backward), strict=True):
                least[contender, name] = min(ms, least.get((contender, name), ms))
    for contender in CONTENDERS:
        ratios = (f"{least[contender, n]:9.3f} ms {least[contender, n] / least['dense', n]:5.2f}" for n in PASSES)
        print(f"D {head_dim:3} S {length:6} window {sparse.window} {contender:9}", *ratios, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Times of mixtures beside dense attention: forward, backward, both.")
    parser.add_argument("lengths", nargs="*", type=int, default=[4096, 8192, 16384, 32768])
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--window", type=int, default=2048)
    arguments = parser.parse_args()
    for n in arguments.lengths:
        measure(n, arguments.head_dim, Streaming(128, arguments.window))
