"""One small call of everything that launches kernels, in odd shapes, each compared with its twin.

    python python_tests/one_call_each.py cuda

For tools that watch kernels, such as compute-sanitizer (``test_cuda_memory_check.py``). Sizes are no multiples of
tiles, pages or vectors: there an index that runs too far leaves a tensor.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import flux_ext
from flux_ext import BlockSparse, Streaming, Triangle, operators
from flux_ext.operators import reference
from flux_ext.operators.testing import relative_error
from flux_ext.routers.modules import HeadRouter, LayerRouter

DTYPE = torch.bfloat16
SPARSE = Streaming(5, 17)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape).to(DTYPE)


def int32(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def moved(x: Any, device: str) -> Any:
    """A tensor or block lists on a device. Strides stay as they are."""
    if isinstance(x, BlockSparse) and x.blocks is not None:
        counts = None if x.counts is None else x.counts.to(device)
        return BlockSparse(blocks=x.blocks.to(device), counts=counts, width=x.width)
    if not isinstance(x, Tensor):
        return x
    return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device=device).copy_(x)


def compare(device: str, q: Tensor, k: Tensor, v: Tensor, route: Tensor | None, **options: Any) -> None:
    """``flux_ext.attention`` on a device, and the twin in fp64 on the CPU."""
    there = {name: moved(x, device) for name, x in options.items()}
    got = flux_ext.attention(*(moved(x, device) for x in (q, k, v, route)), **there)
    want = reference.attention(q.double(), k.double(), v.double(), route, **options)
    assert relative_error(got.cpu(), want) < 1e-2


def compare_gradients(device: str, q: Tensor, k: Tensor, v: Tensor, route: Tensor, **options: Any) -> None:
    """The same of the gradients of q, k and v."""
    there = {name: moved(x, device) for name, x in options.items()}
    with torch.enable_grad():
        leaves = [moved(x, device).requires_grad_() for x in (q, k, v)]
        exact = [x.double().requires_grad_() for x in (q, k, v)]
        outputs = (
            flux_ext.attention(*leaves, moved(route, device), **there),
            reference.attention(*exact, route.clone(), **options),
        )
        gradients = [
            torch.autograd.grad(out.square().sum(), x) for out, x in zip(outputs, (leaves, exact), strict=True)
        ]
    for got, want in zip(*gradients, strict=True):
        assert relative_error(got.cpu(), want) < 3e-2


def prefill(device: str) -> None:
    for head_dim in (40, 64, 128, 256):  # 40 is none of those that have kernels of their own
        q, k, v = random(2, 77, 6, head_dim), random(2, 77, 3, head_dim), random(2, 77, 3, head_dim)
        compare(device, q, k, v, int32([[0, 1, 0], [1, 0, 1]]), sparse=SPARSE)
    q, k, v = random(1, 333, 2, 128), random(1, 333, 1, 128), random(1, 333, 1, 128)
    compare(device, q, k, v, None)
    compare(device, q, k, v, None, scale=-0.1)
    compare(device, q, k, v, int32([1]), sparse=Triangle(5, 48, last_q=33, align=16))
    compare(device, q, k, v, torch.tensor([0.25]), sparse=SPARSE)


def prefill_after_a_prefix(device: str) -> None:
    q, k, v = random(2, 9, 6, 128), random(2, 1501, 3, 128), random(2, 1501, 3, 128)
    compare(device, q, k, v, int32([0, 1]), sparse=SPARSE, kv_len=int32([1501, 77]))


def left_padding(device: str) -> None:
    q, k, v = random(3, 77, 6, 128), random(3, 77, 3, 128), random(3, 77, 3, 128)
    compare(device, q, k, v, int32([0, 1, 1]), sparse=SPARSE, seq_start=int32([0, 76, 13]))


def decode(device: str) -> None:
    for batch in (3, 300):  # few sequences, and more than one kernel plans for by itself
        q, k, v = random(batch, 1, 6, 128), random(batch, 301, 3, 128), random(batch, 301, 3, 128)
        lengths = 1 + torch.arange(batch, dtype=torch.int32)[:, None] * int32([1, 50, 100]) % 301
        compare(device, q, k, v, torch.arange(batch * 3).view(batch, 3) % 2, sparse=SPARSE, kv_len=lengths)
    q, k, v = random(1, 1, 8, 64), random(1, 5003, 2, 64), random(1, 5003, 2, 64)  # one tile cut into many
    compare(device, q, k, v, None)


def paged(device: str) -> None:
    for q_len in (1, 13):
        q, k, v = random(2, q_len, 6, 128), random(45, 7, 3, 128), random(45, 7, 3, 128)
        table = torch.randperm(45, dtype=torch.int32)[:44].view(2, 22)
        compare(device, q, k, v, int32([0, 1]), sparse=SPARSE, kv_len=int32([149, 20]), page_table=table)
    k, v = random(45, 16, 1, 128), random(45, 16, 1, 128)
    table = torch.randperm(45, dtype=torch.int32)[:42].view(2, 3, 7)  # of each head
    lengths = int32([[111, 17, 13], [16, 33, 112]])
    compare(device, q, k, v, int32([[0, 1, 0], [1, 0, 1]]), sparse=SPARSE, kv_len=lengths, page_table=table)


def packed(device: str) -> None:
    q, k, v = random(213, 6, 128), random(213, 3, 128), random(213, 3, 128)
    bounds = int32([0, 5, 5, 70, 211])  # an empty sequence; rows that belong to none
    compare(device, q, k, v, int32([0, 1, 1, 0]), sparse=SPARSE, cu_seqlens=bounds)


def block_lists(device: str) -> None:
    q, k, v = random(1, 301, 4, 128), random(1, 301, 2, 128), random(1, 301, 2, 128)
    route = int32([[1, 0]])
    lists = int32([[[[0, 0, 0], [0, 1, 0], [0, 1, 2]]] * 2])
    compare(device, q, k, v, route, sparse=BlockSparse(blocks=lists, counts=int32([[[1, 2, 3]] * 2])))
    lists = int32([[[[0, 1], [0, 3], [2, 4]]] * 2])
    compare(device, q, k, v, route, sparse=BlockSparse(blocks=lists, width=64))


def selected_blocks(device: str) -> None:
    """Lists in every layout, by each kernel there is for them."""

    def compare_lists(pattern: BlockSparse, q: Tensor, k: Tensor, **bounds: Tensor) -> None:
        there = {name: x.to(device) for name, x in bounds.items()}
        got = operators.select_blocks(pattern, q.to(device), k.to(device), **there)
        want = reference.select_blocks(pattern, q.double(), k.double(), **bounds)
        longest = got.blocks.shape[-1]  # on CUDA there is room for every block
        assert torch.equal(got.counts.cpu(), want.counts) and int(want.counts.max()) <= longest
        assert torch.equal(got.blocks.cpu(), want.blocks[..., :longest])

    for stride, width, head_dim, heads in ((16, 128, 128, 8), (8, 64, 64, 4), (16, 64, 40, 6), (8, 128, 64, 36)):
        pattern = BlockSparse(threshold=0.7, stride=stride, width=width)
        compare_lists(pattern, 2 * random(2, 301, heads, head_dim), 2 * random(2, 333, 2, head_dim))
    bounds = int32([0, 5, 5, 70, 211])
    pattern = BlockSparse(threshold=0.7)
    compare_lists(pattern, 2 * random(213, 8, 128), 2 * random(213, 2, 128), q_begin=bounds, kv_begin=bounds)
    table = torch.randperm(45, dtype=torch.int32)[:44].view(2, 22)
    ends = int32([149, 20])
    compare_lists(pattern, 2 * random(2, 13, 6, 128), 2 * random(45, 7, 3, 128), kv_end=ends, page_table=table)


def gradients(device: str) -> None:
    for head_dim in (40, 64, 128, 256):
        x = random(2, 77, 6, head_dim), random(2, 77, 3, head_dim), random(2, 77, 3, head_dim)
        compare_gradients(device, *x, int32([[0, 1, 0], [1, 0, 1]]), sparse=SPARSE)
    x = random(1, 133, 4, 128), random(1, 333, 2, 128), random(1, 333, 2, 128)
    compare_gradients(device, *x, int32([1]), sparse=Triangle(5, 48, last_q=33, align=16))
    x = random(213, 6, 128), random(213, 3, 128), random(213, 3, 128)
    compare_gradients(device, *x, int32([0, 1, 1, 0]), sparse=SPARSE, cu_seqlens=int32([0, 5, 5, 70, 211]))
    x = random(1, 301, 4, 128), random(1, 301, 2, 128), random(1, 301, 2, 128)
    lists = int32([[[[0, 1], [0, 3], [2, 4]]] * 2])
    compare_gradients(device, *x, int32([[1, 0]]), sparse=BlockSparse(blocks=lists, width=64))


def mixtures(device: str) -> None:
    """In one walk, forward and backward; and one in two calls, as the full pattern hides keys."""
    for head_dim in (40, 64, 128, 256):
        x = random(2, 77, 6, head_dim), random(2, 77, 3, head_dim), random(2, 77, 3, head_dim)
        compare_gradients(device, *x, torch.rand(2, 3), sparse=SPARSE)
    x = random(1, 233, 4, 128), random(1, 333, 2, 128), random(1, 333, 2, 128)
    compare_gradients(device, *x, torch.rand(1), sparse=Triangle(5, 48, last_q=33, align=16))
    compare_gradients(device, *x, torch.rand(1), sparse=SPARSE, full=Streaming(9, 100))
    x = random(213, 6, 128), random(213, 3, 128), random(213, 3, 128)
    compare_gradients(device, *x, torch.rand(4), sparse=SPARSE, cu_seqlens=int32([0, 5, 5, 70, 211]))
    x = random(1, 301, 4, 128), random(1, 301, 2, 128), random(1, 301, 2, 128)
    for width, lists in ((64, [[0, 1], [0, 3], [2, 4]]), (128, [[0, 0], [0, 1], [1, 2]])):
        pattern = BlockSparse(blocks=int32([[lists] * 2]), counts=int32([[[1, 2, 2]] * 2]), width=width)
        compare_gradients(device, *x, torch.rand(1, 2), sparse=pattern)


def misaligned(device: str) -> None:
    q, k, v = random(2, 77, 6, 67)[..., 1:-2], random(2, 77, 3, 67)[..., 1:-2], random(2, 77, 3, 67)[..., 1:-2]
    compare(device, q, k, v, int32([0, 1]), sparse=SPARSE)


def route(device: str) -> None:
    for kind in (LayerRouter, HeadRouter):
        router = kind(40, pool_size=9).to(DTYPE).requires_grad_(False)
        x, begin, end = random(61, 3, 40), int32([0, 20, 23]), int32([20, 23, 61])
        weights = [w.to(device) for w in router.weights()]
        got = operators.route(x.to(device), weights, 9, router.per_head, begin.to(device), end.to(device))[0]
        want = reference.route(x.double(), [w.double() for w in router.weights()], 9, router.per_head, begin, end)[0]
        assert relative_error(got.cpu(), want) < 1e-2


def append(device: str) -> None:
    """Three tokens more in rings of seven tokens, which wrap."""
    max_pages, pages = 5, int32([[5, 3], [3, 5]])  # of each row; full and sparse heads
    cache = {
        "k_pool": torch.zeros(16, 7, 1, 20, dtype=DTYPE),
        "v_pool": torch.zeros(16, 7, 1, 20, dtype=DTYPE),
        "base": (pages.view(-1).cumsum(0).view(2, 2) - pages).int(),
        "ring": pages - 1,
        "page_table": torch.zeros(2, 2, max_pages, dtype=torch.int32),
        "kv_len": torch.zeros(2, 2, dtype=torch.int32),
        "seen": int32([[26, 26], [5, 5]]),
        "slots": torch.tensor(0),
    }
    there = {name: t.to(device) for name, t in cache.items()}
    for _ in range(3):
        k, v = random(2, 2, 1, 20), random(2, 2, 1, 20)
        operators.append(k.to(device), v.to(device), **there, pattern=Streaming(5, 7), max_cache_len=33)
        reference.append(k, v, **cache, pattern=Streaming(5, 7), max_cache_len=33)
    for name, t in cache.items():
        assert torch.equal(there[name].cpu(), t), name


CALLS: dict[str, Callable[[str], None]] = {
    f.__name__: f
    for f in (
        prefill,
        prefill_after_a_prefix,
        left_padding,
        decode,
        paged,
        packed,
        block_lists,
        selected_blocks,
        gradients,
        mixtures,
        misaligned,
        route,
        append,
    )
}

if __name__ == "__main__":
    torch.manual_seed(0)
    for name, call in CALLS.items():
        with torch.no_grad():
            call(sys.argv[1])
        print("called:", name, flush=True)
