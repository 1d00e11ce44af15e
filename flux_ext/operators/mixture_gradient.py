"""Mixed attention for torch: its shape function, its gradient and its twin.

The operator takes the arguments of ``attend``, with the weight, fp32, in the place of the route.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .arguments import call
from .attention_gradient import attended, gradients_like, mark_shared_keys
from .autograd import below, differentiable, no_second_gradient
from .mixture import both_branches
from .operands import AttendArguments

_ops = torch.ops.flux_ext


@torch.library.register_fake("flux_ext::mix")
def _(*args):
    x = AttendArguments(*args)
    (full, full_lse), (sparse, sparse_lse) = attended(x), attended(x)
    return torch.empty_like(full), full, sparse, full_lse, sparse_lse


@torch.library.register_fake("flux_ext::mix_backward")
def _(grad_out, q, k, v, full, sparse, full_lse, sparse_lse, weight, *args):
    return gradients_like(q, k, v, weight)


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(*inputs):
        return below(_ops.mix.default, *inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, (_, *branches) = AttendArguments(*inputs), output
        ctx.mark_non_differentiable(*branches)
        ctx.patterns, ctx.scale = x.patterns, x.scale
        ctx.save_for_backward(*branches, *(t if isinstance(t, Tensor) else None for t in x))

    @staticmethod
    def backward(ctx, grad_out, *_):
        full, sparse, full_lse, sparse_lse, *inputs = ctx.saved_tensors
        x = AttendArguments(*inputs)._replace(patterns=ctx.patterns, scale=ctx.scale)
        q, k, v, *rest, page_table = x
        if page_table is not None:
            raise RuntimeError("attention over a paged cache (page_table) has no gradient: it is for inference")
        gradients = call(_ops.mix_backward, grad_out, q, k, v, full, sparse, full_lse, sparse_lse, *rest)
        if not q.is_cpu:
            mark_shared_keys(gradients[1:3], x.kv_begin, x.kv_end)
        return (*gradients, *(None for _ in inputs[4:]))


def _mix_twin(*args):
    x = AttendArguments(*args)
    q, kv = x.q.float(), x.key_values._replace(k=x.k.float(), v=x.v.float())
    arguments = q, kv, x.routing, x.scale, x.q_begin, x.q_end
    (full, full_lse), (sparse, sparse_lse) = both_branches(reference.attend, *arguments)
    mixed = reference.mix(*arguments)
    return *(t.to(x.q.dtype) for t in (mixed, full, sparse)), full_lse, sparse_lse


differentiable(_ops.mix.default, _Mix.apply, _mix_twin)


def _mix_backward_twin(grad_out, q, k, v, _full, _sparse, _full_lse, _sparse_lse, weight, *rest):
    def mix(q, k, v, weight):
        return _mix_twin(q, k, v, weight, *rest, None)[0]  # no page_table

    return torch.func.vjp(mix, q, k, v, weight)[1](grad_out)


differentiable(_ops.mix_backward.default, no_second_gradient(_ops.mix_backward.default), _mix_backward_twin)
