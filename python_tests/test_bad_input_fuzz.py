"""Whatever the arguments are: a result, or a TypeError or ValueError of ours that names one of them."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import torch
from cases import FEW
from hypothesis import given, settings
from hypothesis import strategies as st

import flux_ext
from flux_ext import BlockSparse, Full, Streaming, Triangle, operators
from flux_ext.operators import KeyValues, Routing
from flux_ext.routers.modules import LayerRouter

DTYPES = (
    *(torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn),
    *(torch.int32, torch.int64, torch.uint8, torch.bool, torch.complex64),
)
OTHER_KINDS = st.sampled_from(
    ["x", 1, 0.5, True, [0, 1], (3, 5), {}, np.zeros(2, np.int32), b"", object, 1j, -(10**30)]
)
VALUES = torch.tensor([0, 1, 2, 3, 0, 1, 2, 5, 8, -1, 2**31 - 1, -(2**31)])
NAMES = re.compile(
    r"\b(q|k|v|x|route|sparse|full|scale|cu_seqlens|seq_start|seq_end|kv_len|page_table|page_size|head_dim|query heads|"
    r"BlockSparse|block list|counts|blocks|begin|end|q_begin|q_end|kv_begin|kv_end|pool_size|weights(\[\d\])?|bias|"
    r"threshold|width|stride|sink|window|align|last_q|dense tensors|block selection)\b"
)


@st.composite
def tensors(draw, dims=(0, 1, 2, 3, 4, 5), most=5, dtypes=DTYPES):
    shape = [draw(st.sampled_from([0, 1, 2, 3, most, 8, 16])) for _ in range(draw(st.sampled_from(dims)))]
    x = VALUES[torch.randint(len(VALUES), shape)].to(draw(st.sampled_from(dtypes)))
    way = draw(st.sampled_from(["plain"] * 6 + ["meta", "sparse", "transposed", "grad", "inference"]))
    if way == "meta":
        return x.to("meta")
    if way == "sparse" and x.dim() and x.dtype != torch.float8_e4m3fn:
        return x.to_sparse()
    if way == "transposed" and x.dim() > 1:
        return x.transpose(-1, -2)
    if way == "grad" and x.is_floating_point():
        return x.requires_grad_()
    if way == "inference":
        with torch.inference_mode():
            return x.clone()
    return x


@st.composite
def patterns(draw):
    """One that can be made, or what its constructor says."""
    number = st.sampled_from([0, 1, 2, 16, -1, 2**31, 2**62, 1.5, "x", None])
    kind = draw(st.sampled_from([Full, Streaming, Triangle, BlockSparse]))
    if kind is BlockSparse:
        few = tensors(dims=(3, 4, 4), dtypes=(torch.int32, torch.int32, torch.int64))
        arguments = {
            "blocks": draw(st.none() | few),
            "counts": draw(st.none() | few),
            "threshold": draw(st.sampled_from([None, None, 0.5, 2.0, math.nan, "x"])),
            "width": draw(st.sampled_from([64, 128, 0, 1.5])),
        }
    else:
        names = {Full: (), Streaming: ("sink", "window", "align"), Triangle: ("sink", "window", "last_q", "align")}[
            kind
        ]
        arguments = {n: draw(number) for n in names if draw(st.booleans())}
    return kind, arguments


def good(layout: str) -> dict[str, Any]:
    if layout == "packed":
        q, k = torch.randn(8, 2, 16), torch.randn(8, 1, 16)
        return {"q": q, "k": k, "v": k, "cu_seqlens": torch.tensor([0, 3, 8]).int()}
    q, k = torch.randn(2, 3, 2, 16), torch.randn(2, 5, 1, 16)
    if layout == "paged":
        return {
            "q": q,
            "k": k,
            "v": k,
            "kv_len": torch.tensor([3, 5]).int(),
            "page_table": torch.tensor([[0], [1]]).int(),
        }
    return {"q": q, "k": k, "v": k, **({"kv_len": torch.tensor([3, 5]).int()} if layout == "cached" else {})}


def check(call) -> None:
    try:
        call()
    except (TypeError, ValueError) as error:
        assert NAMES.search(str(error)), error


@settings(max_examples=500, deadline=None, derandomize=True)
@given(
    layout=st.sampled_from(["plain", "packed", "cached", "paged"]),
    broken=st.dictionaries(
        st.sampled_from(["q", "k", "v", "route", "cu_seqlens", "seq_start", "seq_end", "kv_len", "page_table"]),
        st.none() | OTHER_KINDS | tensors() | tensors(dims=(1, 2, 3), dtypes=(torch.int32,)) | tensors(dims=(3, 4)),
        max_size=3,
    ),
    chosen=st.dictionaries(st.sampled_from(["full", "sparse"]), OTHER_KINDS | st.none() | patterns(), max_size=2),
    scale=st.sampled_from([None, None, None, 0.5, "a", math.nan, math.inf, 10**400, [1.0]]),
    return_lse=st.booleans(),
)
def test_attention(layout, broken, chosen, scale, return_lse):
    def call():
        made = {n: p[0](**p[1]) if isinstance(p, tuple) and isinstance(p[0], type) else p for n, p in chosen.items()}
        flux_ext.attention(**{**good(layout), **broken}, **made, scale=scale, return_lse=return_lse)

    check(call)


KV_NAMES = ("k", "v", "kv_begin", "kv_end", "page_table")


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    broken=st.dictionaries(
        st.sampled_from(["q", "route", "q_begin", "q_end", *KV_NAMES]),
        st.none() | OTHER_KINDS | tensors() | tensors(dims=(1, 2), dtypes=(torch.int32,)),
        max_size=3,
    )
)
def test_attend(broken):
    q, k = torch.randn(2, 3, 2, 16), torch.randn(2, 5, 1, 16)
    kv = {"k": k, "v": k} | {n.removeprefix("kv_"): x for n, x in broken.items() if n in KV_NAMES}
    rest = {n: x for n, x in broken.items() if n in ("q_begin", "q_end")}
    routing = Routing(broken.get("route"), Full(), FEW)
    check(lambda: operators.attend(broken.get("q", q), KeyValues(**kv), routing, 0.25, **rest))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    broken=st.dictionaries(
        st.sampled_from(["x", "pool_size", "begin", "end", "weights"]),
        st.none() | OTHER_KINDS | tensors() | tensors(dims=(1,), dtypes=(torch.int32,)) | st.integers(-(2**70), 2**70),
        max_size=2,
    ),
    weight=st.none() | st.tuples(st.integers(0, 9), OTHER_KINDS | tensors(dims=(1, 2))),
)
def test_route(broken, weight):
    weights = LayerRouter(16).weights()
    if weight is not None:
        weights[weight[0]] = weight[1]
    arguments = {"x": torch.randn(2, 9, 2, 16), "weights": weights, "pool_size": 3, "per_head": False}
    check(lambda: operators.route(**{**arguments, **broken}))
