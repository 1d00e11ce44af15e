"""Attention for torch: its shape function, its gradient and its twin."""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .arguments import call, check_devices
from .autograd import below, differentiable
from .patterns import BlockSparse, Pattern, Triangle

_ops = torch.ops.flux_ext

# The shape functions. The dispatcher comes to them as soon as one tensor is a meta tensor, so they compare devices.


@torch.library.register_fake("flux_ext::attend")
def _(q, k, v, route, patterns, fb, fc, sb, sc, scale, q_begin, q_end, kv_begin, kv_end, page_table):
    check_devices("q", q, k=k, v=v, route=route, blocks=fb, counts=fc)
    check_devices("q", q, blocks=sb, counts=sc, page_table=page_table)
    check_devices("q", q, q_begin=q_begin, q_end=q_end, kv_begin=kv_begin, kv_len=kv_end)
    lse_shape = (*q.shape[:-3], q.shape[-2], q.shape[-3])
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), q.new_empty(lse_shape, dtype=torch.float32)


@torch.library.register_fake("flux_ext::attend_backward")
def _(grad_out, q, k, v, *args):
    return tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(*inputs):
        return below(_ops.attend.default, *inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        q, k, v, route, patterns, fb, fc, sb, sc, scale, q_begin, q_end, kv_begin, kv_end, page_table = inputs
        out, lse = output
        ctx.mark_non_differentiable(lse)
        ctx.patterns, ctx.scale = patterns, scale
        ctx.save_for_backward(q, k, v, out, lse, route, fb, fc, sb, sc, q_begin, q_end, kv_begin, kv_end, page_table)

    @staticmethod
    def backward(ctx, grad_out, _grad_lse):
        q, k, v, out, lse, route, fb, fc, sb, sc, *spans, page_table = ctx.saved_tensors
        if page_table is not None:
            raise RuntimeError("attention over a paged cache (page_table) has no gradient: it is for inference")
        if q.is_cuda:
            raise RuntimeError(
                "attention has no gradient on CUDA yet: train with the counterfactual objective, which needs none, "
                "or on the CPU"
            )
        rest = (route, ctx.patterns, fb, fc, sb, sc, ctx.scale, *spans)
        return (*call(_ops.attend_backward, grad_out, q, k, v, out, lse, *rest), *(None,) * 12)


def _pattern(numbers: list[int], blocks: Tensor | None, counts: Tensor | None) -> Pattern:
    """A pattern from what the operators take."""
    sink, window, last_q, align, width = numbers
    return Triangle(sink, window, last_q, align) if blocks is None else BlockSparse(blocks, counts, width)


def _attend_twin(q, k, v, route, patterns, fb, fc, sb, sc, scale, *spans):
    full, sparse = _pattern(patterns[:5], fb, fc), _pattern(patterns[5:], sb, sc)
    out, lse = reference.attend(q.float(), k.float(), v.float(), route, full, sparse, scale, *spans)
    return out.to(q.dtype), lse


differentiable(_ops.attend.default, _Attend.apply, _attend_twin)


class _AttendBackward(torch.autograd.Function):
    @staticmethod
    def forward(*inputs):
        return below(_ops.attend_backward.default, *inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError("attention has no second gradient (create_graph=True)")


def _attend_backward_twin(grad_out, q, k, v, _out, _lse, *rest):
    def attend(*qkv):
        return _attend_twin(*qkv, *rest, None)[0]

    return torch.func.vjp(attend, q, k, v)[1](grad_out)


differentiable(_ops.attend_backward.default, _AttendBackward.apply, _attend_backward_twin)
