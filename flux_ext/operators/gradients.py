"""What torch does with the operators besides calling them: shapes without values, gradients, ``torch.func``.

Backward passes have operators of their own. Forward-mode derivatives and the derivatives of ``torch.func`` go through
the slow twins of :mod:`flux_ext.reference`, which torch differentiates like any other function: right, to any order,
and with dense masks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from . import (
    _library,  # noqa: F401  (registers the operators)
    reference,
)
from .arguments import call, check_devices
from .patterns import BlockSparse, Pattern, Triangle

_ops = torch.ops.flux_ext
_autograd = torch.library.Library("flux_ext", "IMPL")

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


@torch.library.register_fake("flux_ext::route")
def _(x, weights, pool_size, per_head, begin, end):
    check_devices("x", x, begin=begin, end=end, **{f"weights[{i}]": w for i, w in enumerate(weights)})
    batch = begin.shape[0] if x.dim() == 3 else x.shape[0]
    leading = (batch, x.shape[-2]) if per_head else (batch,)
    return (
        x.new_empty((*leading, x.shape[-1]), dtype=torch.float32),
        x.new_empty((*leading, 2), dtype=torch.float32),
        x.new_empty(leading, dtype=torch.int32),
    )


@torch.library.register_fake("flux_ext::append")
def _(k, v, k_pool, v_pool, base, ring, page_table, kv_len, seen, slots, pattern, max_cache_len, active=None):
    check_devices("k", k, v=v, k_pool=k_pool, v_pool=v_pool, base=base, ring=ring)
    check_devices("k", k, page_table=page_table, kv_len=kv_len, seen=seen, slots=slots, active=active)


def _below(op: Callable[..., Any], *args: Any) -> Any:
    """The operator itself, past this module."""
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def _differentiable(op: Any, function: Callable[..., Any], twin: Callable[..., Any]) -> None:
    """Makes an operator differentiable.

    Args:
        op: the operator.
        function: the operator, recorded for a backward pass; takes its arguments.
        twin: the same in plain PyTorch; takes its arguments.
    """

    def kernel(*args: Any) -> Any:
        if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
            _below(op, *args)  # checks the arguments
            return twin(*args)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return function(*args)
        return _below(op, *args)

    _autograd.impl(op.name().removeprefix("flux_ext::"), kernel, "Autograd")
    torch.library.register_vmap(op, _one_by_one(op))


def _one_by_one(op: Any) -> Callable[..., Any]:
    """What ``torch.func.vmap`` does with an operator: one call per entry."""

    def entry(x: Any, dim: Any, i: int) -> Any:
        if isinstance(x, list):
            return x if dim is None else [entry(*pair, i) for pair in zip(x, dim, strict=True)]
        return x if dim is None else x.select(dim, i).contiguous()

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        calls = [op(*(entry(x, dim, i) for x, dim in zip(args, in_dims, strict=True))) for i in range(info.batch_size)]
        outputs = tuple(torch.stack(x) for x in zip(*calls, strict=True))
        return outputs, (0,) * len(outputs)

    return rule


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(*inputs):
        return _below(_ops.attend.default, *inputs)

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


_differentiable(_ops.attend.default, _Attend.apply, _attend_twin)


class _AttendBackward(torch.autograd.Function):
    @staticmethod
    def forward(*inputs):
        return _below(_ops.attend_backward.default, *inputs)

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


_differentiable(_ops.attend_backward.default, _AttendBackward.apply, _attend_backward_twin)


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(x, pool_size, per_head, begin, end, *weights):
        return _below(_ops.route.default, x, list(weights), pool_size, per_head, begin, end)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.pool_size, ctx.per_head, begin, end, *weights = inputs
        pooled, _, route = output
        ctx.mark_non_differentiable(pooled, route)
        # Frozen queries are not kept: with a router in every layer they would be the backbone's activations.
        kept = x if ctx.needs_input_grad[0] else None
        ctx.save_for_backward(kept, pooled, begin, end, *weights)

    @staticmethod
    def backward(ctx, _grad_pooled, grad, _grad_route):
        x, pooled, begin, end, *weights = ctx.saved_tensors
        w = [t.float() for t in weights]
        # Forward again (five small layers), keeping each layer's input and pre-activation.
        inputs, before = [pooled], []
        for i in range(5):
            before.append(F.linear(inputs[i], w[2 * i], w[2 * i + 1]))
            inputs.append(before[i] if i == 1 else F.silu(before[i]))  # no SiLU between encoder and classifier
        grad_weights: list[Tensor] = []
        for i in reversed(range(5)):
            if i not in (1, 4):
                grad = grad * _silu_grad(before[i])
            flat = grad.reshape(-1, grad.shape[-1])
            grad_weights[:0] = [flat.T @ inputs[i].reshape(-1, inputs[i].shape[-1]), flat.sum(0)]
            grad = grad @ w[2 * i]
        grad_weights = [g.to(t.dtype) for g, t in zip(grad_weights, weights, strict=True)]
        grad_x = _pool_backward(x, grad, ctx.pool_size, ctx.per_head, begin, end) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, None, None, *grad_weights


def _silu_grad(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 + x * (1 - s))


def _pool_backward(
    x: Tensor, grad: Tensor, pool_size: int, per_head: bool, begin: Tensor | None, end: Tensor | None
) -> Tensor:
    """Gradient of the pooled mean: rows at either end of each sequence get their share, twice on overlap."""
    pool_size = min(pool_size, x.shape[-3])  # so that sums of 32 bits do not overflow
    rows = torch.arange(x.shape[-3], device=x.device)[None]  # [1, S]
    first = rows.new_zeros((x.shape[0] if x.dim() == 4 else 1, 1)) if begin is None else begin[:, None]
    last = torch.full_like(first, x.shape[-3]) if end is None else end[:, None]
    inside = (rows >= first) & (rows < last)
    count = (inside & (rows < first + pool_size)).float() + (inside & (rows >= last - pool_size))
    share = count / (2 * (last - first).clamp(1, pool_size))  # [B, S]
    if not per_head:
        grad = (grad / x.shape[-2])[:, None].expand(-1, x.shape[-2], -1)  # [B, H, D]
    if x.dim() == 3:  # packed: the sequences share the rows
        return torch.einsum("bs,bhd->shd", share, grad).to(x.dtype)
    return (share[:, :, None, None] * grad[:, None]).to(x.dtype)


def _route_twin(x, weights, pool_size, per_head, begin, end):
    pooled = reference.pool_sequences(x.float(), pool_size, per_head, begin, end)
    logits = reference.route_logits(pooled, weights)
    return pooled, logits, reference.decide(logits)


_differentiable(
    _ops.route.default,
    lambda x, weights, pool_size, per_head, begin, end: _Route.apply(x, pool_size, per_head, begin, end, *weights),
    _route_twin,
)
