"""The rules for arguments that can be checked without reading a tensor; shared by the operators and their twins."""

from __future__ import annotations

import numbers
import reprlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_LAYOUT = "(tensors are [B, S, H, D], tokens before heads: q is {}, k {})"


_BROKEN_RULE = "invalid argument: "
"""How the operators' messages begin where an argument breaks a rule (csrc/core/broken_rule.h)."""


def call(operator: Callable[..., Any], *args: Any) -> Any:
    """What an operator returns; its broken rules as ValueError, which torch 2.15 and later report as RuntimeError.

    A ValueError too where there is no kernel: tensors that are sparse, quantized or on other devices.
    """
    try:
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


def row_spans(
    q: Tensor,
    k: Tensor,
    cu_seqlens: Tensor | None,
    seq_start: Tensor | None,
    seq_end: Tensor | None,
    kv_len: Tensor | None,
    page_table: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """``(q_begin, q_end, kv_begin, kv_end)`` of ``operators.attend``, from those of :func:`flux_ext.attention`.

    Where the rows of packed sequences follow each other, ``cu_seqlens`` takes the place of the first bound alone.

    Raises:
        ValueError: they contradict each other, or a shape or dtype is wrong.
    """
    if q.is_nested or k.is_nested:
        raise ValueError("q and k must be dense tensors, got a nested one: pack its sequences, with cu_seqlens")
    q_shape, k_shape = q.shape, k.shape
    if len(q_shape) not in (3, 4):
        raise ValueError(f"q must be [B, S, Hq, D], or packed [T, Hq, D], got {list(q_shape)}")
    if len(k_shape) not in (3, 4):
        rule = "k must be [B, Skv, Hkv, D], packed [T, Hkv, D] or pages [num_pages, page_size, Hkv or 1, D]"
        raise ValueError(f"{rule}, got {list(k_shape)}")
    padded = seq_start is not None or seq_end is not None
    if padded and (cu_seqlens is not None or kv_len is not None):
        raise ValueError("seq_start and seq_end bound the rows of q, k and v alike: they exclude cu_seqlens and kv_len")
    if page_table is not None and kv_len is None:
        raise ValueError("page_table needs kv_len")
    if cu_seqlens is not None and (cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2):
        raise ValueError(f"cu_seqlens must be [B + 1] with B >= 1, got shape {list(cu_seqlens.shape)}")
    if (cu_seqlens is not None) != (len(q_shape) == 3):
        raise ValueError(
            f"cu_seqlens goes with a packed q [T, Hq, D], got q of shape {list(q_shape)} "
            f"{'with' if cu_seqlens is not None else 'without'} cu_seqlens"
        )
    if padded:
        for name, bounds in (("seq_start", seq_start), ("seq_end", seq_end)):
            if bounds is not None and bounds.dtype != torch.int32:
                raise ValueError(f"{name} must be int32, got {bounds.dtype}")
        if k_shape[-3] != q_shape[-3]:
            raise ValueError(
                f"seq_start and seq_end bound the rows of q and k alike: k must have the {q_shape[-3]} rows of q, "
                f"got {k_shape[-3]} {_LAYOUT.format(list(q_shape), list(k_shape))}"
            )
        return seq_start, seq_end, seq_start, seq_end
    if cu_seqlens is None:
        if kv_len is None and len(k_shape) == 4 and q_shape[1] > k_shape[1]:
            raise ValueError(
                f"without kv_len or cu_seqlens q must have no more rows than k, got {q_shape[1]} and {k_shape[1]} "
                f"{_LAYOUT.format(list(q_shape), list(k_shape))}"
            )
        return None, None, None, kv_len
    if len(k_shape) != 3:  # a cache
        return cu_seqlens, None, None, kv_len
    if kv_len is not None:
        raise ValueError(
            "kv_len bounds a cache [B, Skv, Hkv, D] or pages, a packed k is bounded by cu_seqlens: "
            f"got both and k of shape {list(k_shape)}"
        )
    if k_shape[0] != q_shape[0]:
        raise ValueError(
            f"cu_seqlens bounds the rows of a packed q and k alike: k must have the {q_shape[0]} rows of q, "
            f"got {k_shape[0]} (packed tensors are [T, H, D]: q is {list(q_shape)}, k {list(k_shape)})"
        )
    return cu_seqlens, None, cu_seqlens, None
