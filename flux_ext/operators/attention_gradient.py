"""Attention for torch: its shape function, its gradient and its twin."""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .arguments import call, check_devices
from .autograd import below, differentiable, no_second_gradient
from .operands import AttendArguments

_ops = torch.ops.flux_ext
_NAMES = {"full_blocks": "blocks", "sparse_blocks": "blocks", "full_counts": "counts", "sparse_counts": "counts"}
_NAMES["kv_end"] = "kv_len"
"""What messages call an argument, where that is not its name in the schema."""

# The shape functions. torch calls them as soon as one tensor is a meta tensor, even if the others are not; a kernel
# would refuse such a mixture, so they do too.


def attended(x: AttendArguments) -> tuple[Tensor, Tensor]:
    """``out`` and ``lse`` by shape, dtype and device; ValueError where the arguments are on several devices."""
    for name, t in x._asdict().items():
        if isinstance(t, Tensor):
            check_devices("q", x.q, **{_NAMES.get(name, name): t})
    q = x.q
    lse_shape = (*q.shape[:-3], q.shape[-2], q.shape[-3])
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), q.new_empty(lse_shape, dtype=torch.float32)


def gradients_like(*tensors):
    """Gradients by shape, dtype and device."""
    return tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in tensors)


@torch.library.register_fake("flux_ext::attend")
def _(*args):
    return attended(AttendArguments(*args))


@torch.library.register_fake("flux_ext::attend_backward")
def _(grad_out, q, k, v, *args):
    return gradients_like(q, k, v)


def mark_shared_keys(gradients: tuple[Tensor, Tensor], kv_begin: Tensor | None, kv_end: Tensor | None) -> None:
    """NaN in those rows of the gradients of packed k and v that two sequences share.

    The kernels write each row once, so of such a row they would give what one of the sequences adds to it. On the CPU
    the operators refuse that; where the bounds are on a device they are not read back. Of ``cu_seqlens`` alone no
    two sequences share a row, unless it decreases, which is not looked for in every training step.

    Args:
        gradients: of k and v; changed in place where they are packed, ``[T, Hkv, D]``.
        kv_begin, kv_end: int32 ``[B]`` or ``[B, Hkv]``, see :class:`KeyValues`.
    """
    if gradients[0].dim() != 3 or kv_begin is None or kv_end is None:
        return
    by_head = (x.T if x.dim() == 2 else x[None] for x in (kv_begin, kv_end))  # [Hkv or 1, B]
    begin, end = torch.broadcast_tensors(*by_head)
    begin, end = begin.contiguous(), torch.maximum(begin, end)
    rows = torch.arange(gradients[0].shape[0], device=begin.device, dtype=begin.dtype).repeat(len(begin), 1)
    # How many sequences have begun by a row, less those that have ended.
    begun, ended = (torch.searchsorted(x.sort().values.contiguous(), rows, right=True) for x in (begin, end))
    shared = (begun - ended > 1).T[:, :, None]
    for gradient in gradients:
        gradient.masked_fill_(shared, torch.nan)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(*inputs):
        return below(_ops.attend.default, *inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, (out, lse) = AttendArguments(*inputs), output
        ctx.mark_non_differentiable(lse)
        ctx.patterns, ctx.scale = x.patterns, x.scale
        ctx.save_for_backward(out, lse, *(t if isinstance(t, Tensor) else None for t in x))

    @staticmethod
    def backward(ctx, grad_out, _grad_lse):
        out, lse, *inputs = ctx.saved_tensors
        x = AttendArguments(*inputs)._replace(patterns=ctx.patterns, scale=ctx.scale)
        q, k, v, *rest, page_table = x
        if page_table is not None:
            raise RuntimeError("attention over a paged cache (page_table) has no gradient: it is for inference")
        gradients = call(_ops.attend_backward, grad_out, q, k, v, out, lse, *rest)
        if not q.is_cpu:
            mark_shared_keys(gradients[1:3], x.kv_begin, x.kv_end)
        return (*gradients, *(None for _ in inputs[3:]))


def _attend_twin(*args):
    x = AttendArguments(*args)
    kv = x.key_values._replace(k=x.k.float(), v=x.v.float())
    out, lse = reference.attend(x.q.float(), kv, x.routing, x.scale, x.q_begin, x.q_end)
    return out.to(x.q.dtype), lse


differentiable(_ops.attend.default, _Attend.apply, _attend_twin)


def _attend_backward_twin(grad_out, q, k, v, _out, _lse, *rest):
    def attend(*qkv):
        return _attend_twin(*qkv, *rest, None)[0]  # no page_table

    return torch.func.vjp(attend, q, k, v)[1](grad_out)


differentiable(_ops.attend_backward.default, no_second_gradient(_ops.attend_backward.default), _attend_backward_twin)
