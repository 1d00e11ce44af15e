"""What the CUDA operators do with values that they do not read back, and with tensors they have to copy."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from cases import FEW
from test_cuda import DEVICE, int32, random

import flux_ext
from flux_ext import BlockSparse, Full, operators
from flux_ext.operators import KeyValues, Routing, reference
from flux_ext.routers.modules import LayerRouter

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def packed(rows: int = 20) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return tuple(random(rows, h, 64, dtype=torch.bfloat16) for h in (4, 2, 2))  # type: ignore[return-value]


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got.float(), want.float(), atol=2e-2, rtol=2e-2)


def test_packed_sequences_that_do_not_begin_at_0() -> None:
    q, k, v = packed()
    out = flux_ext.attention(q, k, v, cu_seqlens=int32([3, 10, 20]))
    assert (out[:3] == 0).all()
    close(out[3:], flux_ext.attention(q[3:], k[3:], v[3:], cu_seqlens=int32([0, 7, 17])))


def test_packed_sequences_that_end_beyond_the_tensor() -> None:
    q, k, v = packed()
    out = flux_ext.attention(q, k, v, cu_seqlens=int32([0, 7, 99]))
    close(out, flux_ext.attention(q, k, v, cu_seqlens=int32([0, 7, 20])))


def test_a_bound_that_decreases_ends_an_empty_sequence() -> None:
    q, k, v = packed()
    out = flux_ext.attention(q, k, v, cu_seqlens=int32([0, 12, 5]))
    close(out[:12], flux_ext.attention(q[:12], k[:12], v[:12], cu_seqlens=int32([0, 12])))
    assert (out[12:] == 0).all()


@pytest.mark.parametrize("value", (-0.5, 1.5, torch.nan, torch.inf))
def test_a_fraction_out_of_range_is_nan_for_its_head(value: float) -> None:
    q, k = random(2, 30, 4, 64, dtype=torch.bfloat16), random(2, 30, 2, 64, dtype=torch.bfloat16)
    w = torch.tensor([[0.5, 0.25], [value, 1.0]], device=DEVICE)
    out = flux_ext.attention(q, k, k, w, sparse=FEW)
    want = reference.attention(q.float(), k.float(), k.float(), w, sparse=FEW)
    assert out[1, :, :2].isnan().all() and not out[0].isnan().any() and not out[1, :, 2:].isnan().any()
    torch.testing.assert_close(out.float(), want, atol=2e-2, rtol=2e-2, equal_nan=True)


def test_counts_of_block_lists_are_clamped() -> None:
    q = random(1, 300, 2, 64, dtype=torch.bfloat16)
    blocks = int32([[[[0, 0, 0], [0, 1, 1], [0, 1, 2]]] * 2])
    good, wild = int32([[[1, 2, 3], [1, 2, 0]]]), int32([[[1, 2, 2**31 - 1], [1, 2, -(2**31)]]])
    outs = [flux_ext.attention(q, q, q, full=BlockSparse(blocks, counts)) for counts in (good, wild)]
    assert torch.equal(*outs)
    close(outs[0], reference.attention(q.float(), q.float(), q.float(), full=BlockSparse(blocks, good)))


@pytest.mark.parametrize("step", (2**31, 2**32))
def test_bounds_further_apart_than_32_bits_count(step: int) -> None:
    """8 and 16 GiB of device memory."""

    def far(values: torch.Tensor) -> torch.Tensor:
        return torch.empty(step + 8, dtype=torch.int32, device=DEVICE)[::step].copy_(values)

    q, k = random(2, 1, 4, 64, dtype=torch.bfloat16), random(2, 300, 2, 64, dtype=torch.bfloat16)
    lens, route = int32([300, 40]), int32([1, 0])
    want = flux_ext.attention(q, k, k, route, kv_len=lens, sparse=FEW)
    assert torch.equal(flux_ext.attention(q, k, k, route, kv_len=far(lens), sparse=FEW), want)
    assert torch.equal(flux_ext.attention(q, k, k, far(route), kv_len=lens, sparse=FEW), want)
    router, x = LayerRouter(64).to(DEVICE), random(2, 30, 4, 64, dtype=torch.bfloat16)
    assert torch.equal(router(x, None, far(int32([9, 30]))), router(x, None, int32([9, 30])))


def test_tensors_on_the_host_are_refused() -> None:
    q = random(1, 8, 2, 64, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="q must be on CUDA as another tensor is, got cpu"):
        flux_ext.attention(q.cpu(), q, q)
    with pytest.raises(ValueError, match=r"k must be on the device of q \(cuda:0\), got cpu"):
        flux_ext.attention(q, q.cpu(), q)
    with pytest.raises(ValueError, match=r"kv_len must be on the device of q \(cuda:0\), got cpu"):
        flux_ext.attention(q, q, q, kv_len=int32([8]).cpu())
    router = LayerRouter(64)
    with pytest.raises(ValueError, match="on the device of x|on CUDA"):
        router(q)
    with pytest.raises(ValueError, match="x must be on CUDA as another tensor is, got cpu"):
        operators.route(q.cpu(), router.to(DEVICE).weights(), 3, False)


def test_forward_mode() -> None:
    q, k = torch.randn(2, 2, 30, 4, 64, device=DEVICE).half().unbind()
    got = torch.func.jvp(lambda q: flux_ext.attention(q, k, k), (q,), (k,))[1]
    want = torch.func.jvp(lambda q: reference.attention(q, k.double(), k.double()), (q.double(),), (k.double(),))[1]
    close(got, want)


MISALIGNED = """
import torch, flux_ext
q = torch.randn(2, 1, 4, 64, device="cuda").half()
aligned = torch.randn(2, 99, 2, 64, device="cuda").half()
lens = torch.tensor([99, 50], dtype=torch.int32, device="cuda")
odd = torch.randn(2, 99, 2, 65, device="cuda").half()[..., 1:]
for k in (aligned, odd, odd, odd):
    out = flux_ext.attention(q, k, aligned, kv_len=lens)
assert torch.equal(out, flux_ext.attention(q, odd.contiguous(), aligned, kv_len=lens))
"""


def test_a_cache_that_is_copied_says_so_once() -> None:
    run = subprocess.run([sys.executable, "-c", MISALIGNED], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("copies k at every call") == 1 and "copies v" not in run.stderr, run.stderr
    assert "storage offset 1, strides [12870, 130, 65, 1]" in run.stderr
    assert "multiples of 8 elements" in run.stderr


def test_hard_routes_other_than_0_are_sparse() -> None:
    q = random(1, 90, 2, 64, dtype=torch.bfloat16)
    routings = [Routing(int32([r]), Full(), FEW) for r in (1, -1, 7)]
    outs = [operators.attend(q, KeyValues(q, q), routing, 0.125)[0] for routing in routings]
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])
