"""One row per argument and rule: a clear error that names both, before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import flux_ext
from flux_ext import Full, operators
from flux_ext.operators import KeyValues, Routing, reference
from flux_ext.operators.attention_gradient import mark_shared_keys
from flux_ext.routers.modules import HeadRouter, LayerRouter


def good() -> dict[str, Any]:
    return {
        "q": torch.randn(2, 8, 4, 16),
        "k": torch.randn(2, 8, 2, 16),
        "v": torch.randn(2, 8, 2, 16),
        "route": torch.zeros(2, 2, dtype=torch.int32),
    }


def packed() -> dict[str, Any]:
    return {
        "q": torch.randn(8, 4, 16),
        "k": torch.randn(8, 2, 16),
        "v": torch.randn(8, 2, 16),
        "cu_seqlens": torch.tensor([0, 3, 8], dtype=torch.int32),
    }


def paged() -> dict[str, Any]:
    return {
        "q": torch.randn(2, 1, 4, 16),
        "k": torch.randn(5, 16, 2, 16),
        "v": torch.randn(5, 16, 2, 16),
        "page_table": torch.tensor([[0, 1], [2, 3]], dtype=torch.int32),
        "kv_len": torch.tensor([20, 32], dtype=torch.int32),
    }


def ints(*x: Any) -> torch.Tensor:
    return torch.tensor(x, dtype=torch.int32)


# What the arguments start from, what is broken, and what the message must say.
ROWS: list[tuple[Callable[[], dict], dict[str, Any], str]] = [
    (good, {"k": torch.randn(4, 16), "seq_start": ints(0, 0)}, r"k must be \[B, Skv, Hkv, D\].*\[4, 16\]"),
    (good, {"q": torch.tensor(1.0)}, r"q must be \[B, S, Hq, D\].*\[\]"),
    (good, {"route": torch.tensor([2**32, 0])}, r"route must be .*2"),
    (good, {"route": torch.zeros(2, dtype=torch.complex64)}, r"route must be a dense tensor of integers.*complex64"),
    (good, {"q": torch.randn(8, 16)}, r"q must be \[B, S, Hq, D\].*\[8, 16\]"),
    (good, {"k": torch.randn(2, 8, 16)}, r"k must be \[B, Skv, Hkv, D\].*\[2, 8, 16\]"),
    (good, {"v": torch.randn(2, 7, 2, 16)}, r"v must have the shape of k .*\[2, 7, 2, 16\]"),
    (good, {"k": torch.randn(3, 8, 2, 16), "v": torch.randn(3, 8, 2, 16)}, r"k must have the batch of q \(2\), got 3"),
    (
        good,
        {"k": torch.randn(2, 8, 2, 24), "v": torch.randn(2, 8, 2, 24)},
        r"k must have the head_dim of q \(16\), got 24",
    ),
    (good, {"q": torch.randn(2, 8, 3, 16)}, r"query heads \(3\) must be a multiple of the key heads \(2\)"),
    (good, {x: torch.randn(2, 8, 2, 12) for x in "qkv"}, r"head_dim must be a multiple of 8 from 8 to 256, got 12"),
    (good, {x: torch.randn(2, 8, 2, 264) for x in "qkv"}, r"head_dim must be a multiple of 8 from 8 to 256, got 264"),
    (good, {"k": torch.randn(2, 8, 2, 16).bfloat16()}, r"k must have the dtype of q \(float32\), got bfloat16"),
    (
        good,
        {x: torch.randn(2, 8, 2, 16).double() for x in "qkv"},
        r"q must be float16, bfloat16 or float32, got float64",
    ),
    (good, {"k": torch.empty(2, 8, 2, 16, device="meta")}, r"k must be on the device of q \(cpu\), got meta"),
    (
        good,
        {"route": torch.zeros(2, dtype=torch.int32, device="meta")},
        r"route must be on the device of q \(cpu\), got meta",
    ),
    (good, {"q": torch.randn(2, 8, 4, 32)[..., ::2]}, r"q must have a contiguous last dimension, got stride 2"),
    (good, {"route": ints(0, 2)}, r"route must be 0 \(full\) or 1 \(sparse\), got 2"),
    (good, {"route": ints(0, -1)}, r"route must be 0 \(full\) or 1 \(sparse\), got -1"),
    (good, {"route": ints(0, 1, 0)}, r"route must be \[2\] or \[2, 2\], got \[3\]"),
    (good, {"route": torch.zeros(2, 4, dtype=torch.int32)}, r"route must be \[2\] or \[2, 2\], got \[2, 4\]"),
    (good, {"route": torch.rand(2), "return_lse": True}, r"return_lse needs a hard route"),
    (good, {"kv_len": ints(3, 9)}, r"kv_len must not exceed the 8 rows there are, got 9"),
    (good, {"kv_len": ints(3, -1)}, r"kv_len.*must not decrease, got 0 and -1"),
    (good, {"kv_len": torch.tensor([3, 8])}, r"kv_len must be int32, got int64"),
    (good, {"seq_end": torch.tensor([3, 8])}, r"seq_end must be int32, got torch.int64"),
    (
        good,
        {"seq_end": ints(3, 8), "k": torch.randn(2, 9, 2, 16), "v": torch.randn(2, 9, 2, 16)},
        r"8 rows of q, got 9",
    ),
    (good, {"route": torch.tensor(0.5)}, r"route must be \[B\] or \[B, Hkv\], got shape \[\]"),
    (good, {"kv_len": ints(3)}, r"kv_len must be \[2\] or \[2, 2\], got \[1\]"),
    (good, {"seq_start": ints(0, 9)}, r"q_begin and q_end must not decrease, got 9 and 8"),
    (good, {"seq_end": ints(3, 9)}, r"q_end must not exceed the 8 rows"),
    (good, {"seq_start": ints(0, 0), "kv_len": ints(3, 3)}, r"seq_start and seq_end .* exclude cu_seqlens and kv_len"),
    (good, {"cu_seqlens": ints(0, 8)}, r"cu_seqlens goes with a packed q"),
    (good, {"page_table": ints([0], [1])}, r"page_table needs kv_len"),
    (packed, {"cu_seqlens": None}, r"cu_seqlens goes with a packed q .* without cu_seqlens"),
    (packed, {"cu_seqlens": ints(0)}, r"cu_seqlens must be \[B \+ 1\]"),
    (packed, {"cu_seqlens": ints(0, 5, 3)}, r"cu_seqlens must not decrease, got 5 and 3"),
    (packed, {"cu_seqlens": ints(-1, 3, 8)}, r"cu_seqlens must begin at 0, got -1"),
    (packed, {"cu_seqlens": ints(2, 3, 8)}, r"cu_seqlens must begin at 0, got 2"),
    (packed, {"cu_seqlens": ints(0, 3, 9)}, r"cu_seqlens must not exceed the 8 rows there are, got 9"),
    (packed, {"cu_seqlens": ints(0, 9, 3)}, r"cu_seqlens must not exceed the 8 rows there are, got 9"),
    (packed, {"cu_seqlens": torch.tensor([0, 3, 8])}, r"cu_seqlens must be int32, got int64"),
    (packed, {"cu_seqlens": torch.tensor([0.0, 3.0, 8.0])}, r"cu_seqlens must be int32, got float32"),
    (packed, {"cu_seqlens": ints([0, 8])}, r"cu_seqlens must be \[B \+ 1\]"),
    (
        packed,
        {x: torch.randn(9, 2, 16) for x in "kv"},
        r"k must have the 8 rows of q, got 9 \(packed tensors are \[T, H, D\]: q is \[8, 4, 16\], k \[9, 2, 16\]",
    ),
    (packed, {"seq_end": ints(3, 5)}, r"seq_start and seq_end .* exclude cu_seqlens and kv_len"),
    (packed, {"kv_len": ints(3, 5)}, r"kv_len bounds a cache .* got both and k of shape \[8, 2, 16\]"),
    (packed, {"k": torch.randn(8, 16)}, r"k must be \[B, Skv, Hkv, D\], packed .*, got \[8, 16\]"),
    (packed, {x: torch.randn(3, 9, 2, 16) for x in "kv"}, r"k must have the batch of q \(2\), got 3"),
    (packed, {"page_table": ints([0], [1])}, r"page_table needs kv_len"),
    (
        packed,
        {**{x: torch.randn(5, 16, 2, 16) for x in "kv"}, "page_table": ints([0]), "kv_len": ints(3, 5)},
        r"page_table must be \[2, max_pages\]",
    ),
    (paged, {"page_table": ints([0, 1], [2, 5])}, r"page_table must index the 5 pages, got 5 at page 1 of sequence 1"),
    (paged, {"page_table": ints([0, -1], [2, 3])}, r"page_table must index the 5 pages, got -1"),
    (paged, {"page_table": ints([0, 1])}, r"page_table must be \[2, max_pages\]"),
    (
        paged,
        {"k": torch.zeros(3, 0, 2, 16), "v": torch.zeros(3, 0, 2, 16), "kv_len": ints(0, 0)},
        r"page_size must be >= 1, got 0",
    ),
    (good, {"k": torch.zeros(2, 8, 0, 16), "v": torch.zeros(2, 8, 0, 16)}, r"k must have at least one head, got 0"),
    # Heads before tokens: [B, H, S, D], and packed [H, T, D].
    (
        good,
        {"q": torch.randn(2, 4, 8, 16), **{x: torch.randn(2, 2, 8, 16) for x in "kv"}, "route": None},
        r"no more rows than k, got 4 and 2 \(tensors are \[B, S, H, D\], tokens before heads: q is \[2, 4, 8, 16\]",
    ),
    (
        good,
        {"q": torch.randn(2, 4, 8, 16), **{x: torch.randn(2, 2, 8, 16) for x in "kv"}, "seq_start": ints(0, 1)},
        r"k must have the 4 rows of q, got 2 \(tensors are \[B, S, H, D\], tokens before heads",
    ),
    (
        good,
        {"q": torch.randn(2, 4, 1, 16), **{x: torch.randn(2, 4, 8, 16) for x in "kv"}},
        r"query heads \(1\) must be a multiple of the key heads \(8\).*\[B, S, H, D\], tokens before heads",
    ),
    (
        packed,
        {"q": torch.randn(4, 8, 16), **{x: torch.randn(2, 8, 16) for x in "kv"}},
        r"k must have the 4 rows of q, got 2 \(packed tensors are \[T, H, D\]",
    ),
    # Sizes and numbers beyond 32 bits.
    (
        good,
        {x: torch.zeros(1, 1, 2, 16).expand(2, 2**30 + 1, 2, 16) for x in "kv"},
        r"k must have at most 1073741824 rows, got 1073741825",
    ),
    (good, {"scale": math.nan}, r"scale must be a finite number in 32 bits, got nan"),
    (good, {"scale": 1e39}, r"scale must be a finite number in 32 bits, got 1e\+39"),
    (good, {"q": torch.randn(2, 8, 0, 16)}, r"query heads \(0\) must be a multiple of the key heads \(2\), one each"),
    (good, {"q": torch.randn(2, 8, 4, 0)}, r"k must have the head_dim of q|head_dim must be a multiple of 8"),
    # Dtypes, layouts.
    (good, {"route": torch.zeros(2).to(torch.float8_e5m2)}, r"a fractional route must be dense float16, .*float8_e5m2"),
    (good, {"route": torch.ones(2).to_sparse()}, r"a fractional route must be dense float16, .*got torch.sparse_coo"),
    (good, {"route": torch.tensor([0, 1]).to_sparse()}, r"route must be a dense tensor .*got torch.sparse_coo"),
    (good, {"route": torch.rand(2, 3)}, r"route must be \[2\] or \[2, 2\], got \[2, 3\]"),
    (good, {"route": torch.rand(2, 0)}, r"route must be \[2\] or \[2, 2\], got \[2, 0\]"),
    (good, {x: torch.randn(2, 8, 2, 16).to(torch.complex64) for x in "qkv"}, r"q must be float16.*got complex64"),
    (good, {"q": torch.randn(2, 8, 4, 16).to_sparse()}, r"takes dense tensors .*got torch.sparse_coo torch.float32"),
    (good, {"k": torch.quantize_per_tensor(torch.randn(2, 8, 2, 16), 0.1, 0, torch.qint8)}, r"dense tensors.*qint8"),
    (good, {"q": torch.nested.nested_tensor([torch.randn(8, 4, 16)] * 2)}, r"q and k must be dense tensors, .* nested"),
    (paged, {"page_table": torch.zeros(2, 2)}, r"page_table must be int32, got float32"),
    (paged, {"kv_len": ints(20, 33)}, r"kv_len must not exceed the 32 rows"),
    (paged, {"page_table": torch.zeros(2, 2, 1, dtype=torch.int32)}, r"goes with pages of one head, got 2"),
]


@pytest.mark.parametrize(
    ("start", "broken", "message"), ROWS, ids=[f"{'-'.join(b)}-{i}" for i, (_, b, _) in enumerate(ROWS)]
)
def test_attention_refuses(start, broken, message) -> None:
    flux_ext.attention(**start())
    with pytest.raises(ValueError, match=message):
        flux_ext.attention(**{**start(), **broken})


# Something else where tensors, patterns and numbers belong.
KINDS: list[tuple[dict[str, Any], str]] = [
    ({"q": "x"}, "q must be a tensor, got str 'x'"),
    ({"k": None}, "k must be a tensor, got None"),
    ({"v": np.zeros((2, 8, 2, 16), np.float32)}, "v must be a tensor, got ndarray array"),
    ({"route": [0, 1]}, r"route must be a tensor or None, got list \[0, 1\]"),
    ({"route": 1}, "route must be a tensor or None, got int 1"),
    ({"cu_seqlens": (0, 8)}, r"cu_seqlens must be a tensor or None, got tuple \(0, 8\)"),
    ({"seq_start": [0, 1]}, r"seq_start must be a tensor or None, got list \[0, 1\]"),
    ({"seq_end": 8}, "seq_end must be a tensor or None, got int 8"),
    ({"kv_len": [3, 5]}, r"kv_len must be a tensor or None, got list \[3, 5\]"),
    ({"kv_len": np.array([3, 5])}, r"kv_len must be a tensor or None, got ndarray array\(\[3, 5\]\)"),
    ({"page_table": [[0]], "kv_len": ints(3, 5)}, r"page_table must be a tensor or None, got list \[\[0\]\]"),
    ({"sparse": "streaming"}, "sparse must be one of Full, Streaming, Triangle, BlockSparse, got str 'streaming'"),
    ({"full": None}, "full must be one of Full, Streaming, Triangle, BlockSparse, got None"),
    ({"sparse": (128, 2048)}, r"sparse must be one of Full, .*, got tuple \(128, 2048\)"),
    ({"scale": "a"}, "scale must be a number, got str 'a'"),
    ({"scale": torch.tensor(0.5)}, r"scale must be a number, got Tensor tensor\(0.5"),
    ({"scale": 1j}, "scale must be a number, got complex 1j"),
]


@pytest.mark.parametrize(("broken", "message"), KINDS, ids=[f"{'-'.join(b)}-{i}" for i, (b, _) in enumerate(KINDS)])
def test_attention_refuses_other_kinds(broken, message) -> None:
    with pytest.raises(TypeError, match=message):
        flux_ext.attention(**{**good(), **broken})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: flux_ext.Streaming(sink="x"), "sink must be an integer, got str 'x'"),
        (lambda: flux_ext.Streaming(window=2.0), "window must be an integer, got float 2.0"),
        (lambda: flux_ext.Streaming(align=True), "align must be an integer, got bool True"),
        (lambda: flux_ext.Streaming(window=torch.tensor(4)), r"window must be an integer, got Tensor tensor\(4\)"),
        (lambda: flux_ext.Triangle(last_q=None), "last_q must be an integer, got None"),
        (lambda: flux_ext.BlockSparse(blocks=[[0]]), r"blocks must be a tensor, got list \[\[0\]\]"),
        (lambda: flux_ext.BlockSparse(blocks=ints([[[0]]]), counts=[1]), r"counts must be a tensor or None, got list"),
        (lambda: flux_ext.BlockSparse(threshold="a"), "threshold must be a number, got str 'a'"),
        (lambda: flux_ext.BlockSparse(threshold=0.9, width=128.0), "width must be an integer, got float 128.0"),
        (lambda: operators.route("x", [], 1, False), "x must be a tensor, got str 'x'"),
        (
            lambda: operators.route(torch.randn(1, 2, 2, 8), "w", 1, False),
            "weights must be a list of tensors, got str 'w'",
        ),
        (
            lambda: operators.route(torch.randn(1, 2, 2, 8), [1.0] * 10, 1, False),
            r"weights\[0\] must be a tensor, got float",
        ),
        (
            lambda: operators.route(torch.randn(1, 2, 2, 8), [], 1.5, False),
            "pool_size must be an integer, got float 1.5",
        ),
        (
            lambda: operators.route(torch.randn(1, 2, 2, 8), [], 1, False, [0]),
            r"begin must be a tensor or None, got list",
        ),
        (lambda: LayerRouter(16).decide(np.zeros((1, 2, 2, 16))), "x must be a tensor, got ndarray"),
    ],
)
def test_other_kinds_elsewhere(make, message) -> None:
    with pytest.raises(TypeError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: flux_ext.Streaming(sink=-1), "sink must be >= 0, got -1"),
        (lambda: flux_ext.Streaming(window=0), r"window must be a positive multiple of align \(1\), got 0"),
        (lambda: flux_ext.Streaming(window=100, align=64), r"multiple of align \(64\), got 100"),
        (lambda: flux_ext.Streaming(align=0), "align must be >= 1, got 0"),
        (lambda: flux_ext.Triangle(last_q=-2), "last_q must be >= 0, got -2"),
        (lambda: flux_ext.Streaming(window=2**63), "window must fit in 64 bits, got 9223372036854775808"),
        (lambda: flux_ext.BlockSparse(threshold=float("nan")), r"threshold must be in \(0, 1\], got nan"),
        (lambda: flux_ext.BlockSparse(threshold=0.9, counts=ints([[1]])), "counts belong to blocks"),
        (lambda: flux_ext.BlockSparse(blocks=torch.zeros(1, 1, 1, 1)), "blocks must be int32, got torch.float32"),
        (lambda: flux_ext.BlockSparse(blocks=ints([0, 1])), r"blocks must be \[B, Hkv, .*, got \[1, 2\]"),
        (
            lambda: flux_ext.BlockSparse(blocks=ints([[[0]]]), counts=torch.ones(1, 1, 1)),
            "counts must be int32, got torch.float32",
        ),
        (
            lambda: flux_ext.BlockSparse(blocks=ints([[[0, 1]]]), counts=ints([[1, 2]])),
            r"counts must be .*\[1, 1, 1, 2\] without the last dimension, got \[1, 1, 2\]",
        ),
        (
            lambda: flux_ext.BlockSparse(blocks=ints([[[0]]]), counts=ints([[1]]).to("meta")),
            r"counts must be on the device of blocks \(cpu\), got meta",
        ),
        (lambda: flux_ext.BlockSparse(), "one of blocks, threshold and name, got none"),
        (lambda: flux_ext.BlockSparse(threshold=1.5), r"threshold must be in \(0, 1\], got 1.5"),
        (lambda: flux_ext.BlockSparse(threshold=0.9, width=100), "width must be 64 or 128, got 100"),
        (lambda: flux_ext.BlockSparse(threshold=0.9, stride=7), "stride must be 8 or 16, got 7"),
        (lambda: LayerRouter(0), "head_dim must be >= 1, got 0"),
        (lambda: HeadRouter(16, pool_size=0), "pool_size must be >= 1, got 0"),
    ],
)
def test_constructors_refuse(make, message) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_block_lists_are_checked() -> None:
    q = torch.randn(1, 300, 2, 16)
    lists = ints([[[0, 1, 2], [0, 1, 2], [0, 1, 2]]] * 2).view(1, 2, 3, 3)
    counts = torch.full((1, 2, 3), 3, dtype=torch.int32)
    with pytest.raises(ValueError, match="end at the diagonal, got block 1"):
        flux_ext.attention(q, q, q, full=flux_ext.BlockSparse(blocks=lists, counts=counts))
    with pytest.raises(ValueError, match=r"full.blocks must be contiguous \[1, 2, 3, max_count\], got \[1, 2, 2, 3\]"):
        flux_ext.attention(
            q, q, q, full=flux_ext.BlockSparse(blocks=lists[:, :, :2].contiguous(), counts=counts[..., :2])
        )
    lists[:, :, 0], lists[:, :, 1, 1:] = ints(0, 0, 0), ints(1, 0)
    counts[...] = ints(1, 2, 3)
    good = flux_ext.attention(q, q, q, full=flux_ext.BlockSparse(blocks=lists, counts=counts))
    torch.testing.assert_close(good, flux_ext.attention(q, q, q))
    for wrong in (-1, 4, 2**31 - 1):
        counts[0, 1, 2] = wrong
        with pytest.raises(
            ValueError, match=f"counts must be from 0 to the 3 entries of a block list, got {wrong} for query block 2"
        ):
            flux_ext.attention(q, q, q, full=flux_ext.BlockSparse(blocks=lists, counts=counts))
    counts[0, 1, 2] = 3
    lists[0, 0, 0, 0] = -1
    with pytest.raises(ValueError, match="must ascend from 0 and end at the diagonal, got block -1"):
        flux_ext.attention(q, q, q, full=flux_ext.BlockSparse(blocks=lists, counts=counts))
    lists[0, 0, 0, 0], lists[0, 0, 2] = 0, ints(0, 2, 1)
    with pytest.raises(ValueError, match="must ascend from 0 and end at the diagonal, got block 1 at entry 2"):
        flux_ext.attention(q, q, q, full=flux_ext.BlockSparse(blocks=lists, counts=counts))
    lists[..., 1] = 2**31 - 1 - 2**20  # times the width it would not fit in 31 bits
    with pytest.raises(ValueError, match="end at the diagonal, got block 2146435071"):
        flux_ext.attention(q, q, q, full=flux_ext.BlockSparse(blocks=lists, counts=counts))
    with pytest.raises(ValueError, match="room for at least one block"):
        flux_ext.attention(q, q, q, full=flux_ext.BlockSparse(blocks=lists[..., :0].contiguous(), counts=counts * 0))


ALL_FULL = Routing(None, Full(), Full())
X = torch.randn(2, 8, 2, 16)


@pytest.mark.parametrize(
    ("kv", "routing", "message"),
    [
        (X, ALL_FULL, "kv must be KeyValues, got Tensor tensor"),
        (KeyValues(1, X), ALL_FULL, "k must be a tensor, got int 1"),
        (KeyValues(X, X, end=[3, 5]), ALL_FULL, r"kv_end must be a tensor or None, got list \[3, 5\]"),
        (KeyValues(X, X), ints(0, 1), "routing must be Routing, got Tensor tensor"),
        (KeyValues(X, X), ALL_FULL._replace(route=1), "route must be a tensor or None, got int 1"),
    ],
)
def test_attend_refuses_other_kinds(kv, routing, message) -> None:
    with pytest.raises(TypeError, match=message):
        operators.attend(X, kv, routing, 0.25)


def test_backward_checks_what_the_forward_left():
    q = torch.randn(1, 8, 2, 16)
    rest = [None, [0, 1 << 30, 0, 1, 0] * 2, None, None, None, None, 0.25, None, None, None, None]
    out, lse = torch.ops.flux_ext.attend(q, q, q, *rest, None)
    backward = torch.ops.flux_ext.attend_backward
    backward(out, q, q, q, out, lse, *rest)
    for args, message in (
        ((out[:, :1], q, q, q, out, lse), r"grad_out must have the shape of q"),
        ((out, q, q, q, out[:, :4], lse), r"out must have the shape of q"),
        ((out, q, q, q, out.half(), lse), r"out must have the dtype of q"),
        ((out, q, q, q, out, lse[..., :4]), r"lse must be float32 \[B, Hq, S\]"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=message):  # which one depends on torch
            backward(*args, *rest)


def test_sequences_share_no_rows_that_are_written():
    q, k = torch.randn(8, 4, 16), torch.randn(8, 2, 16).requires_grad_()

    def attend(q_spans, kv_spans, attention=operators.attend):
        begin, end, kv_begin, kv_end = (ints(*(x[i] for x in spans)) for spans in (q_spans, kv_spans) for i in (0, 1))
        return attention(q, KeyValues(k, k, kv_begin, kv_end), ALL_FULL, 0.25, begin, end)[0]

    apart, shared = [(4, 8), (2, 2), (0, 4)], [(3, 8), (0, 8), (0, 5)]
    attend(apart, apart).sum().backward()
    with pytest.raises(ValueError, match=r"sequences must not share rows of q, got \[0, 4\) and \[3, 8\)"):
        attend([(3, 8), (2, 2), (0, 4)], apart)
    out = attend(apart, shared)  # sequences with a prefix in common may read it
    torch.testing.assert_close(out, attend(apart, shared, reference.attend))
    with pytest.raises(ValueError, match=r"sequences share rows of k and v, got \[0, 8\) and \[0, 5\)"):
        out.sum().backward()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("heads", [None, "both", "ends"])
def test_gradients_of_shared_keys_are_nan_where_bounds_are_not_read_back(heads):
    """On a GPU; here the function that does it there."""
    begin, end = ints(5, 0, 3, 9, 6), ints(8, 4, 3, 7, 6)  # the third and the last are empty, the fourth ends too early
    if heads:
        end = torch.stack([end, end + ints(0, 2, 0, 0, 0)], 1)  # of the second head: [5, 8) and [0, 6)
        begin = torch.stack([begin, begin], 1) if heads == "both" else begin
    gradients = torch.ones(10, 2, 4), torch.ones(10, 2, 4)
    mark_shared_keys(gradients, begin, end)
    want = torch.zeros(10, 2, dtype=torch.bool)
    want[5, 1] = heads is not None
    for x in gradients:
        assert torch.equal(x.isnan(), want[:, :, None].expand(-1, -1, 4))
    mark_shared_keys(gradients, ints(0, 9, 2), ints(4, 10, 10))
    assert all(x[:2].isfinite().all() and x[2:4].isnan().all() and x[6:9].isfinite().all() for x in gradients)
    batch = torch.ones(2, 4, 2, 4), torch.ones(2, 4, 2, 4)
    mark_shared_keys(batch, ints(0, 0), ints(4, 4))  # not packed: rows of their own
    mark_shared_keys(gradients, ints(0, 4, 10), None)
    assert all(x.isfinite().all() for x in batch)
    nobody = torch.zeros(3, 2, 4), torch.zeros(3, 2, 4)
    mark_shared_keys(nobody, ints(), ints())  # no sequence at all
    assert not any(x.any() for x in nobody)


ROUTER_ROWS = [
    ({"x": torch.empty(2, 8, 4, 16, device="meta")}, r"weights\[0\] must be on the device of x \(meta\), got cpu"),
    ({"x": torch.randn(8, 16)}, r"x must be \[B, S, H, D\]"),
    ({"x": torch.randn(2, 8, 4, 24)}, r"weights\[0\] must be contiguous \[out, 24\], got \[128, 16\]"),
    (
        {"x": torch.zeros(1, 1, 1, 16).expand(2, 2**30 + 1, 4, 16)},
        r"x must have at most 1073741824 rows, got 1073741825",
    ),
    ({"x": torch.randn(2, 8, 4, 16).to_sparse()}, r"takes dense tensors .*got torch.sparse_coo"),
    ({"x": torch.randn(8, 4, 16)}, r"a packed x \[T, H, D\] needs begin and end"),
    ({"seq_start": ints(0, 9)}, r"begin and end must not decrease, got 9 and 8"),
    ({"seq_end": ints(9, 8)}, r"end must not exceed the 8 rows"),
    ({"seq_end": torch.tensor([8, 8])}, r"end must be int32, got int64"),
]


@pytest.mark.parametrize(("broken", "message"), ROUTER_ROWS, ids=[str(i) for i in range(len(ROUTER_ROWS))])
def test_router_refuses(broken, message) -> None:
    router = LayerRouter(16)
    router(torch.randn(2, 8, 4, 16))
    with pytest.raises(ValueError, match=message):
        router.decide(**{"x": torch.randn(2, 8, 4, 16), **broken})


def test_paged_cache_has_no_gradient() -> None:
    x = paged()
    x["q"].requires_grad_()
    with pytest.raises(RuntimeError, match="page_table.* has no gradient"):
        flux_ext.attention(**x).sum().backward()
