"""Random shapes, layouts and patterns against the reference."""

import torch
from cases import LAYOUTS, ROUTES, STRIDES, Case, make
from hypothesis import given, settings
from hypothesis import strategies as st

import flux_ext
from flux_ext import Full, Streaming, Triangle
from flux_ext.operators import reference
from flux_ext.operators.testing import assert_as_accurate


@st.composite
def patterns(draw):
    align = draw(st.sampled_from([1, 1, 4, 32]))
    sink, window = draw(st.integers(0, 70)), align * draw(st.integers(1, 90 // align))
    return draw(
        st.sampled_from(
            [Full(), Streaming(sink, window, align), Triangle(sink, window, draw(st.integers(0, 60)), align)]
        )
    )


@st.composite
def any_case(draw):
    layout = draw(st.sampled_from(LAYOUTS))
    batch, kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 5))
    length = st.integers(0, 150)
    if layout in ("left_padded", "right_padded", "packed"):
        q_lens = kv_lens = tuple(draw(length) for _ in range(batch))
    elif layout == "batched":
        q_len = draw(length)
        q_lens, kv_lens = (q_len,) * batch, (q_len + draw(length),) * batch
    elif layout.startswith("packed_"):
        q_lens, kv_lens = (tuple(draw(length) for _ in range(batch)) for _ in range(2))
    else:
        q_lens, kv_lens = (draw(st.integers(0, 20)),) * batch, tuple(draw(length) for _ in range(batch))
    return Case(
        q_lens,
        kv_lens,
        layout,
        heads=kv_heads * group,
        kv_heads=kv_heads,
        head_dim=8 * draw(st.integers(1, 10)),
        sparse=draw(patterns()),
        full=draw(st.sampled_from([Full(), Streaming(3, 40)])),
        route=draw(st.sampled_from(ROUTES)),
        strides=draw(st.sampled_from(STRIDES)),
        page_size=draw(st.sampled_from([1, 3, 16, 64])),
    )


@settings(max_examples=150, deadline=None, derandomize=True)
@given(case=any_case(), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_any_case(case, dtype):
    x = make(case, dtype)
    args = (x.q, x.k, x.v, x.route)
    out, lse = flux_ext.attention(*args, return_lse=True, **x.kwargs)
    double = x.cast(torch.float64)
    exact = reference.attention(double.q, double.k, double.v, x.route, return_lse=True, **x.kwargs)
    plain = reference.attention(*args, return_lse=True, **x.kwargs)
    assert_as_accurate(out, exact[0], plain[0], floor=max(torch.finfo(dtype).eps / 4, 1e-6))
    assert_as_accurate(lse, exact[1], plain[1].float(), floor=1e-6, what="lse")
