"""The routers' operator: pooling, two MLPs and the decision; its shape function, gradient and twin.

The schema is in ``csrc/torch/library.cpp``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .arguments import call, check_devices, check_integer, check_tensors, described
from .autograd import below, differentiable

_ops = torch.ops.flux_ext


def route(
    x: Tensor,
    weights: Sequence[Tensor],
    pool_size: int,
    per_head: bool,
    begin: Tensor | None = None,
    end: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Router scoring in one operator: pool, two MLPs, decision (:func:`flux_ext.operators.reference.route`).

    Args:
        x: the states, ``[B, S, H, D]`` or packed ``[T, H, D]``; fp16, bf16 or fp32.
        weights: ``[w1, b1, ..., w5, b5]`` of the five linear layers, each weight ``[out, in]``; one of these dtypes.
        pool_size: rows pooled at either end of a sequence.
        per_head: one decision per head, else one per sequence.
        begin, end: int32 ``[B]``, the rows of ``x`` that belong to each sequence; both needed where it is packed.

    Returns:
        logits, fp32 ``[B, 2]`` (per head ``[B, H, 2]``), differentiable in ``x`` and the weights; and the route, int32
        ``[B]`` (``[B, H]``).

    Where the pooled states are not finite (NaN, or what overflowed), neither are the logits, and the route is full.

    Raises:
        TypeError: something else where a tensor or an integer belongs.
        ValueError: an argument breaks a rule; the message names argument, rule and value. Bounds in CUDA tensors are
            not read back but clamped.
    """
    if not isinstance(weights, (list, tuple)):
        raise TypeError(f"weights must be a list of tensors, got {described(weights)}")
    check_tensors({"x": x}, {"begin": begin, "end": end})
    check_integer("pool_size", pool_size)
    try:
        _, logits, decision = call(_ops.route, x, weights, pool_size, bool(per_head), begin, end)
    except RuntimeError:  # perhaps a weight is no tensor; ten of them are not checked before every call
        check_tensors({f"weights[{i}]": w for i, w in enumerate(weights)}, {})
        raise
    return logits, decision


def decide(logits: Tensor) -> Tensor:
    """The route of logits ``[..., 2]`` that did not come from the operator, int32 ``[...]``: 0 (full) where
    ``logits[..., 1] > logits[..., 0]`` or either is not finite, else 1 (sparse)."""
    return ((logits[..., 0] >= logits[..., 1]) & logits.isfinite().all(-1)).to(torch.int32)


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


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(x, pool_size, per_head, begin, end, *weights):
        return below(_ops.route.default, x, list(weights), pool_size, per_head, begin, end)

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


differentiable(
    _ops.route.default,
    lambda x, weights, pool_size, per_head, begin, end: _Route.apply(x, pool_size, per_head, begin, end, *weights),
    _route_twin,
)
