"""What makes an operator differentiable: in a backward pass, in forward mode, and under ``torch.func``.

A backward pass calls an operator of its own. Forward-mode derivatives and those of ``torch.func`` are taken of the slow
twins in :mod:`flux_ext.operators.reference`, which torch differentiates like any other function: right to any order,
and with dense masks.

Each operator's shape function and gradient stand beside the operator (attention's, which are longer, in
``attention_gradient.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

from .. import _library  # noqa: F401  (registers the operators)

_autograd = torch.library.Library("flux_ext", "IMPL")


def below(op: Callable[..., Any], *args: Any) -> Any:
    """The operator's own kernel, past the one that :func:`differentiable` registers."""
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def differentiable(op: Any, function: Callable[..., Any], twin: Callable[..., Any]) -> None:
    """Makes an operator differentiable.

    Args:
        op: the operator.
        function: the operator, recorded for a backward pass; takes its arguments.
        twin: the same in plain PyTorch; takes its arguments.
    """

    def kernel(*args: Any) -> Any:
        if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
            below(op, *args)  # checks the arguments
            return twin(*args)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return function(*args)
        return below(op, *args)

    _autograd.impl(op.name().removeprefix("flux_ext::"), kernel, "Autograd")
    torch.library.register_vmap(op, one_by_one(op))


def no_second_gradient(op: Any) -> Callable[..., Any]:
    """The operator of a gradient, recorded so that a backward pass through it is an error that says so."""

    class Recorded(torch.autograd.Function):
        @staticmethod
        def forward(*inputs):  # type: ignore[no-untyped-def]
            return below(op, *inputs)

        @staticmethod
        def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
            pass

        @staticmethod
        def backward(ctx, *grads):  # type: ignore[no-untyped-def]
            raise RuntimeError("attention has no second gradient (create_graph=True)")

    return Recorded.apply


def one_by_one(op: Any) -> Callable[..., Any]:
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
