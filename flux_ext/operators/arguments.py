"""The rules for arguments that can be checked without reading a tensor's values."""

from __future__ import annotations

import numbers
import reprlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_BROKEN_RULE = "invalid argument: "
"""How the operators' messages begin where an argument breaks a rule (``csrc/core/broken_rule.h``)."""


def call(operator: Callable[..., Any], *args: Any) -> Any:
    """Calls an operator and returns what it returns.

    Raises:
        ValueError: an argument breaks a rule (from torch 2.15 on, torch itself makes a RuntimeError of it), or there is
            no kernel for the tensors, as for sparse and quantized ones and for other devices.
    """
    try:
        if _no_derivative():
            with torch._C._AutoDispatchBelowAutograd():
                return operator(*args)
        return operator(*args)
    except (RuntimeError, ValueError) as error:
        message = str(error)
        if isinstance(error, NotImplementedError) and message.startswith("Could not run"):
            tensors = (x for x in args if isinstance(x, Tensor))
            kinds = ", ".join(dict.fromkeys(f"{x.layout} {x.dtype} on {x.device}" for x in tensors))
            rule = "takes dense tensors on the CPU and, where its kernels were built, on CUDA"
            raise ValueError(f"{operator} {rule}, got {kinds}") from error
        if not message.startswith(_BROKEN_RULE):
            raise
        raise ValueError(message.removeprefix(_BROKEN_RULE)) from None


def _no_derivative() -> bool:
    """Whether autograd may be passed over. torch would ask the kernels of :mod:`flux_ext.operators.autograd`, which are
    Python, to find that out: in every decode step of every layer, for as long as a launch takes. Inference mode passes
    over them by itself."""
    return not (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or torch.is_inference_mode_enabled()
        or forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
    )


def described(x: Any) -> str:
    """Type and value of an argument that should have been something else, for a message."""
    return "None" if x is None else f"{type(x).__name__} {reprlib.repr(x)}"


def check_tensors(required: dict[str, Any], optional: dict[str, Any]) -> None:
    """Tensors, by the arguments' names; optional ones may be None.

    Raises:
        TypeError: something else.
    """
    for name, x in required.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {described(x)}")
    for name, x in optional.items():
        if x is not None and not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor or None, got {described(x)}")


def check_devices(name: str, first: Tensor, **others: Tensor | None) -> None:
    """All on the device of the first.

    Raises:
        ValueError: another one is not.
    """
    for other, x in others.items():
        if x is not None and x.device != first.device:
            raise ValueError(f"{other} must be on the device of {name} ({first.device}), got {x.device}")


def check_integer(name: str, x: Any) -> None:
    """An integer of 64 bits, Python's, NumPy's or torch's symbolic one; not a boolean.

    Raises:
        TypeError: something else.
        ValueError: it has more bits.
    """
    if type(x) is not int and (not isinstance(x, (numbers.Integral, torch.SymInt)) or isinstance(x, bool)):
        raise TypeError(f"{name} must be an integer, got {described(x)}")
    if isinstance(x, int) and not -(2**63) <= x < 2**63:
        raise ValueError(f"{name} must fit in 64 bits, got {x}")


def to_float(name: str, x: Any) -> Any:
    """A real number as a float (torch's symbolic ones as they are); not a tensor, not a boolean.

    Raises:
        TypeError: something else.
        ValueError: it is too large.
    """
    if isinstance(x, (torch.SymFloat, torch.SymInt)):
        return x
    if not isinstance(x, numbers.Real) or isinstance(x, bool):
        raise TypeError(f"{name} must be a number, got {described(x)}")
    try:
        return float(x)
    except OverflowError:
        raise ValueError(f"{name} must be a finite number, got {described(x)}") from None
