"""Antidiagonal block selection against its definition, written out."""

import math

import pytest
import torch

import flux_ext
from flux_ext.operators.block_selection import antidiagonal_scores, keep_mass, select_blocks
from flux_ext.operators.patterns import BlockSparse, dense_mask


def scores_by_definition(q, k, stride, width):
    """One sub-block at a time; q, k of one head, [S, D] and [T, D]."""
    q_len, kv_len, dim = len(q), len(k), q.shape[1]
    offset = kv_len - q_len
    rows, columns = -(-q_len // stride), -(-kv_len // stride)
    mass = torch.zeros(-(-q_len // 128), -(-kv_len // width))
    for i in range(rows):
        line = torch.full((columns,), -math.inf)
        for j in range(columns):
            if j * stride > min(offset + (i + 1) * stride, kv_len) - 1:
                continue
            pairs = [(i * stride + stride - 1 - a, j * stride + a) for a in range(stride)]
            line[j] = sum(float(q[x] @ k[y]) for x, y in pairs if x < q_len and y < kv_len) / (math.sqrt(dim) * stride)
        for j, p in enumerate(line.softmax(0)):
            mass[i * stride // 128, j * stride // width] += p
    return mass


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("lens", [(256, 256), (150, 150), (130, 300)], ids=str)
def test_scores(lens, width):
    q, k = torch.randn(1, lens[0], 2, 16), torch.randn(1, lens[1], 2, 16)
    got = antidiagonal_scores(q, k, 16, width)
    for h in range(2):
        torch.testing.assert_close(
            got[0, h], scores_by_definition(q[0, :, h], k[0, :, h], 16, width), atol=1e-5, rtol=1e-4
        )


@pytest.mark.parametrize("threshold", [0.3, 0.9, 1.0])
def test_smallest_set_that_reaches_the_threshold(threshold):
    scores = torch.rand(1, 1, 6, 6) ** 4
    blocks, counts = keep_mass(scores, threshold, 700, 700, 128)
    for i in range(6):
        chosen = blocks[0, 0, i, : counts[0, 0, i]].tolist()
        assert chosen == sorted(set(chosen)) and 0 in chosen and i in chosen and max(chosen) <= i
        share = scores[0, 0, i, : i + 1] / scores[0, 0, i, : i + 1].sum()
        assert share[chosen].sum() >= threshold - 1e-5
        extra = [n for n in chosen if n not in (0, i)]
        if extra:  # without the least of them, the threshold is missed
            assert share[chosen].sum() - share[extra].min() < threshold


def test_a_threshold_of_one_is_full_attention():
    q, k, v = (torch.randn(2, 300, h, 16) for h in (4, 2, 2))
    out = flux_ext.attention(q, k, v, torch.ones(2, dtype=torch.int32), sparse=BlockSparse(threshold=1.0))
    torch.testing.assert_close(out, flux_ext.attention(q, k, v))


def test_selection_follows_the_attention():
    """Keys of one far block that match every query are found; the rest is dropped."""
    q = torch.randn(1, 1024, 1, 32) * 0.1
    k = torch.randn(1, 1024, 1, 32) * 0.1
    q[..., 0] = 6.0
    k[:, 384:512, :, 0] = 6.0
    pattern = select_blocks(BlockSparse(threshold=0.9), q, k)
    assert pattern.blocks[0, 0, 7, : pattern.counts[0, 0, 7]].tolist() == [0, 3, 7]
    mask = dense_mask(pattern, 1024, 1024)[0, 0]
    out = flux_ext.attention(q, k, k, full=pattern)
    scores = (q[0, :, 0] @ k[0, :, 0].T / math.sqrt(32)).masked_fill(~mask, -math.inf)
    torch.testing.assert_close(out[0, :, 0], scores.softmax(-1) @ k[0, :, 0], atol=1e-5, rtol=1e-4)
