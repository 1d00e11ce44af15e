"""One more token in a cache of fixed size: the operator and its shape function.

The schema is in ``csrc/torch/library.cpp``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import _library  # noqa: F401  (registers the operators)
from .arguments import call, check_devices, check_integer, check_tensors, described
from .patterns import Streaming, Triangle

_ops = torch.ops.flux_ext


def append(
    k: Tensor,
    v: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    base: Tensor,
    ring: Tensor,
    page_table: Tensor,
    kv_len: Tensor,
    seen: Tensor,
    slots: Tensor,
    pattern: Streaming,
    max_cache_len: int,
    active: Tensor | None = None,
) -> None:
    """One more token for each sequence head of a cache of fixed size, in place and in one launch.

    A sequence head is one KV head of one sequence. It owns a run of pages of the pools, from ``base`` on: first the
    pages of the sink (``ceil(sink / page_size)``), which stay, then a ring of ``ring`` pages, which later pages of the
    sequence go round. Token ``t`` belongs to page ``t // page_size``. Where sink and ring together have fewer pages
    than ``page_table`` has columns, what lies between the sink and the window is dropped, in whole pages and multiples
    of ``align``. ``page_table`` and ``kv_len`` are written so that they say what is stored, in order, as
    :func:`attention` takes it.

    All on one device; all but k and v contiguous. Nothing is read back from the device. k and v are not
    differentiated: this is for inference.

    Args:
        k, v: the new tokens, ``[B, Hkv, 1, D]``, fp16, bf16 or fp32, ``D`` up to 256; any strides with the last
            dimension contiguous. Cast to the pools' dtype.
        k_pool, v_pool: ``[num_pages, page_size, 1, D]``, both fp16, bf16 or fp32; the tokens are written here.
        base: int32 ``[B, Hkv]``, the first page of the run.
        ring: int32 ``[B, Hkv]``, pages of the ring: at least
            ``ceil((window + lcm(align, page_size) - 1) / page_size)`` where tokens are dropped.
        page_table: int32 ``[B, Hkv, max_pages]``, written as far as ``kv_len`` reaches.
        kv_len: int32 ``[B, Hkv]``, written: the tokens stored, the new one included.
        seen: int32 ``[B, Hkv]``, the tokens so far, i.e. the position of the new one; counted up. Those of a sequence
            are equal; each head has its own so that no thread block reads what another writes.
        slots: int64, one number, counted up: the steps so far, those without a token included.
        pattern: what sparse sequence heads see.
        max_cache_len: tokens per sequence, at most ``max_pages * page_size``. Beyond it, NaN is stored in place of the
            last token: what attends to it then says that there was no room.
        active: int32 ``[B]``. 1: the sequence has a token in this step; 0: it has none, and nothing of it changes;
            -1: NaN is stored in place of its token. None: all have one.

    Raises:
        TypeError: something else where a tensor, a pattern or an integer belongs.
        ValueError: an argument breaks a rule; the message names argument, rule and value, and nothing was written.
            Values inside CUDA tensors are not read back: pages outside the pools are clamped.
        RuntimeError: in a forward-mode derivative.
    """
    required = {
        "k": k,
        "v": v,
        "k_pool": k_pool,
        "v_pool": v_pool,
        "base": base,
        "ring": ring,
        "page_table": page_table,
        "kv_len": kv_len,
        "seen": seen,
        "slots": slots,
    }
    check_tensors(required, {"active": active})
    if not isinstance(pattern, (Streaming, Triangle)):
        raise TypeError(f"pattern must be Streaming, got {described(pattern)}")
    check_integer("max_cache_len", max_cache_len)
    if forward_ad._current_level >= 0:
        raise RuntimeError("flux_ext.operators.append has no forward-mode derivative: it is for inference")
    call(
        _ops.append,
        k.detach(),
        v.detach(),
        k_pool,
        v_pool,
        base,
        ring,
        page_table,
        kv_len,
        seen,
        slots,
        pattern.numbers(),
        max_cache_len,
        active,
    )


@torch.library.register_fake("flux_ext::append")
def _(k, v, k_pool, v_pool, base, ring, page_table, kv_len, seen, slots, pattern, max_cache_len, active=None):
    check_devices("k", k, v=v, k_pool=k_pool, v_pool=v_pool, base=base, ring=ring)
    check_devices("k", k, page_table=page_table, kv_len=kv_len, seen=seen, slots=slots, active=active)
