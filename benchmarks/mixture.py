"""Times of a mixture's forward and backward pass beside those of dense attention; needs a GPU.

    python -m benchmarks.mixture [LENGTH ...]

bf16, one sequence, 32 query and 8 KV heads, head dimension 128, streaming with sink 128 and window 2048. The contenders
take turns; of each the least of five times, as the host sees it: launches and torch's own kernels count.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import flux_ext
from flux_ext import Streaming
from flux_ext.operators import mixture

SPARSE = Streaming(128, 2048)


def milliseconds(call: Callable[[], object], times: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(times):
        call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / times


def attend(leaves: list[Tensor], contender: str) -> Tensor:
    q, k, v, w = leaves
    faster = mixture.one_walk_is_faster
    mixture.one_walk_is_faster = lambda *_: contender == "one walk"
    try:
        return flux_ext.attention(q, k, v, None if contender == "dense" else w, sparse=SPARSE)
    finally:
        mixture.one_walk_is_faster = faster


def measure(length: int) -> None:
    torch.manual_seed(0)
    shapes = ((32, 128), (8, 128), (8, 128))
    q, k, v = (torch.randn(1, length, *s, device="cuda", dtype=torch.bfloat16, requires_grad=True) for s in shapes)
    leaves = [q, k, v, torch.full((1, 8), 0.3, device="cuda", requires_grad=True)]
    gradient = torch.randn_like(q)
    times = max(1, min(20, 2_000_000_000 // length**2))
    least: dict[tuple[str, str], float] = {}
    for _ in range(6):  # the first warms up
        for contender in ("dense", "two calls", "one walk"):
            out, used = attend(leaves, contender), leaves[: 3 if contender == "dense" else 4]
            with torch.no_grad():
                forward = milliseconds(partial(attend, leaves, contender), times)
            backward = milliseconds(partial(torch.autograd.grad, out, used, gradient, retain_graph=True), times)
            for name, ms in (("forward", forward), ("backward", backward)):
                least[contender, name] = min(ms, least.get((contender, name), ms))
    for (contender, name), ms in least.items():
        print(f"{length:6} {name:8} {contender:9} {ms:9.3f} ms {ms / least['dense', name]:5.2f}", flush=True)


if __name__ == "__main__":
    for argument in sys.argv[1:] or ["4096", "8192", "32768"]:
        measure(int(argument))
