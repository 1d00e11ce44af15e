"""Block selection on CUDA: its lists against the twin's, and attention that follows them."""

from __future__ import annotations

import math

import pytest
import torch

import flux_ext
from flux_ext.operators import reference, select_blocks
from flux_ext.operators.pattern_functions import Q_BLOCK
from flux_ext.operators.patterns import BlockSparse
from flux_ext.operators.testing import poisoned, relative_error

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
DEVICE = "cuda"


def int32(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def spread(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Normal numbers, large enough for masses to differ by more than rounding."""
    return (2 * torch.randn(*shape, device=DEVICE)).to(dtype)


def expect_lists(pattern: BlockSparse, q: torch.Tensor, k: torch.Tensor, **bounds) -> BlockSparse:
    """The lists of the operator, equal to the twin's for the same values in fp64."""
    got = select_blocks(pattern, q, k, **bounds)
    want = reference.select_blocks(pattern, q.double(), k.double(), **bounds)
    assert torch.equal(got.counts, want.counts)
    assert torch.equal(got.blocks, want.blocks)
    return got


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("stride", [8, 16])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("heads", [(4, 2), (8, 2), (4, 4), (16, 1), (6, 2), (36, 1)], ids=str)
@pytest.mark.parametrize("dim", [64, 128, 40])
def test_lists(dtype, stride, width, heads, dim):
    pattern = BlockSparse(threshold=0.7, stride=stride, width=width)
    for q_len, kv_len in [(1, 1), (127, 127), (129, 129), (129, 1500), (1000, 1000), (300, 129), (1031, 2060)]:
        q, k = spread(1, q_len, heads[0], dim, dtype=dtype), spread(1, kv_len, heads[1], dim, dtype=dtype)
        expect_lists(pattern, q, k)


def test_a_long_prompt():
    q, k = spread(1, 20_005, 8, 128), spread(1, 20_005, 2, 128)
    expect_lists(BlockSparse(threshold=0.9), q, k)
    expect_lists(BlockSparse(threshold=0.9, stride=8, width=64), q[:, -5000:], k)


@pytest.mark.parametrize("lens", [[1, 127, 700, 0], [513, 17, 1030, 33]], ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_never_read(lens, side):
    capacity = 1037
    starts = [capacity - n if side == "left" else 0 for n in lens]
    q = torch.stack([poisoned(spread(n, 8, 128), capacity, s) for n, s in zip(lens, starts, strict=True)])
    k = torch.stack([poisoned(spread(n, 2, 128), capacity, s) for n, s in zip(lens, starts, strict=True)])
    begin, end = int32(starts), int32(starts) + int32(lens)
    expect_lists(BlockSparse(threshold=0.7), q, k, q_begin=begin, q_end=end, kv_begin=begin, kv_end=end)


def test_packed():
    bounds = int32([0, 5, 5, 205, 1500])
    q, k = poisoned(spread(1500, 4, 64), 1527), poisoned(spread(1500, 2, 64), 1527)
    expect_lists(BlockSparse(threshold=0.7, width=64), q, k, q_begin=bounds, kv_begin=bounds)


def test_many_sequences_beside_a_long_one():
    """Each thread block meets several tiles, most of which have no rows: the tile before must not wait for theirs."""
    lens = [6000] + [3] * 100
    bounds = int32([0, *lens]).cumsum(0, dtype=torch.int32)
    for heads in [(9, 3), (8, 2)]:
        q, k = spread(sum(lens), heads[0], 64), spread(sum(lens), heads[1], 64)
        expect_lists(BlockSparse(threshold=0.7), q, k, q_begin=bounds, kv_begin=bounds)


def test_a_chunk_over_a_cache():
    q, k = spread(3, 200, 4, 128), torch.stack([poisoned(spread(n, 2, 128), 1700) for n in (1700, 333, 200)])
    expect_lists(BlockSparse(threshold=0.7), q, k, kv_end=int32([1700, 333, 200]))
    expect_lists(BlockSparse(threshold=0.7), q, k, kv_end=int32([[1700, 1650], [333, 12], [200, 150]]))


@pytest.mark.parametrize("page_size", [1, 7, 64])
def test_pages(page_size):
    pages = -(-333 // page_size)
    table = torch.randperm(2 * pages, dtype=torch.int32).view(2, pages).to(DEVICE)
    k = spread(2 * pages, page_size, 2, 128)
    expect_lists(BlockSparse(threshold=0.7), spread(2, 140, 4, 128), k, kv_end=int32([333, 150]), page_table=table)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scores_that_are_not_finite_keep_every_block(bad):
    q, k = spread(1, 2000, 8, 128), spread(1, 2000, 2, 128)
    q[0, 300, 1, 3], k[0, 1700, 1, 5] = bad, bad
    got = expect_lists(BlockSparse(threshold=0.5), q, k)
    assert got.counts[0, 0, 2] == 3


def test_strided_tensors_and_those_that_are_copied():
    k = spread(2, 700, 4, 2, 3 * 64)[:, :, 1, :, 64:128]
    expect_lists(BlockSparse(threshold=0.7), spread(2, 8, 700, 64).transpose(1, 2), k)
    expect_lists(BlockSparse(threshold=0.7), spread(2, 700, 8, 64), k[:1].expand(2, -1, -1, -1))
    expect_lists(BlockSparse(threshold=0.7), spread(2, 700, 8, 67)[..., 1:65], k)


def test_lists_are_made_where_the_route_says():
    route = int32([[0, 1], [1, 0]])
    got = expect_lists(BlockSparse(threshold=0.7), spread(2, 300, 8, 64), spread(2, 300, 2, 64), route=route, mode=0)
    assert torch.equal(got.counts.bool().all(-1), route == 0)


def test_the_same_call_gives_the_same_bits_also_in_a_graph():
    q, k = spread(2, 3000, 8, 128), spread(2, 3000, 2, 128)
    pattern = BlockSparse(threshold=0.8)
    first = select_blocks(pattern, q, k)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = select_blocks(pattern, q, k)
    for _ in range(3):
        captured.blocks.fill_(-1)
        graph.replay()
        assert torch.equal(captured.blocks, first.blocks) and torch.equal(captured.counts, first.counts)


def test_memory_is_that_of_lists_and_of_keys():
    tokens = 65_536
    q, k = spread(1, tokens, 8, 64), spread(1, tokens, 2, 64)
    lists = 2 * (tokens // Q_BLOCK) ** 2 * 4
    scratch = 1.25 * torch.cuda.get_device_properties(0).multi_processor_count * 4 * 128 * (tokens // 128)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    select_blocks(BlockSparse(threshold=0.9), q, k)
    assert torch.cuda.max_memory_allocated() - before < lists + scratch + 2**21


@pytest.mark.parametrize("layout", ["batched", "packed", "cache"])
def test_attention_with_a_threshold(layout):
    q, k, v = (spread(2, 900, h, 128) / 2 for h in (8, 2, 2))
    route, options = int32([[0, 1], [1, 0]]), {}
    if layout == "packed":
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        options = {"cu_seqlens": int32([0, 1000, 1800])}
    elif layout == "cache":
        q, options = q[:, :150].contiguous(), {"kv_len": int32([900, 470])}
    sparse = BlockSparse(threshold=0.6)
    got = flux_ext.attention(q, k, v, route, sparse=sparse, **options)
    want = reference.attention(q.double(), k.double(), v.double(), route, sparse=sparse, **options)
    assert relative_error(got, want) < 1e-2


def test_bad_input():
    q, k = spread(1, 8, 2, 64), spread(1, 8, 1, 64)
    with pytest.raises(ValueError, match="q must be float16 or bfloat16 on CUDA, got float32"):
        select_blocks(BlockSparse(threshold=0.5), q.float(), k.float())
    with pytest.raises(ValueError, match="k must be on"):
        select_blocks(BlockSparse(threshold=0.5), q, k.cpu())
    wild = select_blocks(BlockSparse(threshold=0.5), q, k, kv_end=int32([99]), q_begin=int32([-5]))
    assert torch.equal(wild.counts, int32([[[1]]]))  # clamped
