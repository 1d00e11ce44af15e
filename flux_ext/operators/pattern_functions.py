"""Patterns of a user's own: functions of the lengths that say which key blocks a block of queries sees, by name.

Files and compiled graphs cannot hold a function. They hold its name, which whoever loads them must have registered:
nothing here ever imports code that a file names.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import count
from typing import TypeAlias, overload

import torch
from torch import Tensor

from .arguments import described

Q_BLOCK = 128
"""Query rows that share one list of key blocks."""

PatternFunction: TypeAlias = Callable[[int, int, int, torch.device], Tensor]
"""``(q_len, kv_len, width, device)`` -> bool ``[q_blocks, kv_blocks]``, see :func:`register_pattern`."""

BUILT_IN = ("full", "streaming", "triangle", "block_sparse")
"""The modes that a configuration names without their being registered."""

_functions: dict[str, tuple[int, PatternFunction]] = {}
"""By name; with the number of the registration, which tells a function from the one that it replaced."""
_registrations = count()


@overload
def register_pattern(name: str, function: PatternFunction) -> PatternFunction: ...
@overload
def register_pattern(name: str) -> Callable[[PatternFunction], PatternFunction]: ...
def register_pattern(
    name: str, function: PatternFunction | None = None
) -> PatternFunction | Callable[[PatternFunction], PatternFunction]:
    """Names a function that says which key blocks each block of 128 queries sees. Also a decorator:
    ``@register_pattern(name)``.

    From then on ``FluxConfig(pattern=name)`` (or ``full=name``) and ``BlockSparse(name=name)`` mean it. Saved routers
    carry the name, never the function: it must be registered before they are loaded.

    ``function(q_len, kv_len, width, device)`` returns bool ``[ceil(q_len / 128), ceil(kv_len / width)]`` on ``device``:
    of one sequence, whether query block ``i`` sees key block ``j``. Query block ``i`` begins at position
    ``kv_len - q_len + 128 * i``: the queries are the last tokens, all of them in a prompt that is fed at once, those
    of the chunk in one that comes in chunks. Key block ``j`` begins at position ``j * width``. What lies beyond the
    diagonal is not seen, whatever the function says. Every query must see a key, which the blocks on the diagonal
    ensure.

    It must depend on nothing but its arguments: what it returns for two lengths, a width and a device is checked and
    kept, the latest 256 of them, and it is not called again for these.

    Args:
        name: other than those of the modes that are built in. A name that is registered already means the new function
            from now on, in models that are patched too.
        function: of int, int, int (128 or 64) and torch.device.

    Returns:
        the function.

    Raises:
        TypeError: the name is no string, or the function cannot be called.
        ValueError: the name is empty or one of a mode that is built in.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a string, got {described(name)}")
    if not name or name in BUILT_IN:
        raise ValueError(f"name must be other than {BUILT_IN} and not empty, got {name!r}")
    if function is None:
        return lambda function: register_pattern(name, function)
    if not callable(function):
        raise TypeError(f"function must take (q_len, kv_len, width, device), got {described(function)}")
    _functions[name] = next(_registrations), function
    return function


def is_registered(name: object) -> bool:
    """Whether a pattern has this name."""
    return isinstance(name, str) and name in _functions


def kept_blocks(name: str, q_len: int, kv_len: int, width: int, device: torch.device) -> Tensor:
    """What a named function says of ``q_len`` queries at the end of ``kv_len`` keys: bool ``[q_blocks, kv_blocks]``
    without what lies beyond the diagonal.

    Raises:
        TypeError, ValueError: it is not registered, or returns what :func:`register_pattern` does not allow.
    """
    return _kept(name, q_len, kv_len, width, device)


def _registered(name: str) -> tuple[int, PatternFunction]:
    if name not in _functions:
        raise ValueError(
            f"pattern {name!r} is not registered: call flux_ext.register_pattern({name!r}, function) first"
        )
    return _functions[name]


def _kept(name: str, q_len: int, kv_len: int, width: int, device: torch.device) -> Tensor:
    _, function = _registered(name)
    call = f"pattern {name!r} (q_len {q_len}, kv_len {kv_len}, width {width})"
    with torch.inference_mode(False), torch.no_grad():  # what is kept may be used in training later
        try:
            kept = function(q_len, kv_len, width, device)
        except Exception as error:  # of whatever type: it is the user's
            raise ValueError(f"{call} failed: {type(error).__name__}: {error}") from error
    if not isinstance(kept, Tensor):
        raise TypeError(f"{call} must return a tensor, got {described(kept)}")
    shape = [-(-q_len // Q_BLOCK), -(-kv_len // width)]
    if list(kept.shape) != shape:
        raise ValueError(f"{call} must return [q_blocks, kv_blocks] = {shape}, got {list(kept.shape)}")
    if kept.dtype != torch.bool:
        raise ValueError(f"{call} must return booleans, got {kept.dtype}")
    if kept.device != device:
        raise ValueError(f"{call} must return a tensor on {device}, got one on {kept.device}")
    first = torch.arange(shape[0], device=device) * Q_BLOCK + (kv_len - q_len)  # position of each block's first query
    last = (first + Q_BLOCK - 1).clamp(max=kv_len - 1)
    begins = torch.arange(shape[1], device=device) * width
    kept = kept & (begins <= last[:, None])
    # A block's first query that has a position sees the least.
    blind = (last >= 0) & ~(kept & (begins <= first.clamp(min=0)[:, None])).any(1)
    if bool(blind.any()):
        i = int(blind.int().argmax())
        raise ValueError(
            f"{call} leaves the query at position {max(int(first[i]), 0)} no key: query block {i} has the key blocks "
            f"{kept[i].nonzero()[:, 0].tolist()}; keep those on the diagonal"
        )
    return kept


def block_list(name: str, q_len: int, kv_len: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """:func:`kept_blocks` as the operators take it: ascending indices, int32 ``[q_blocks, max_count]``, 0 from the
    count on, and counts ``[q_blocks]``. Waits for the device the first time."""
    number, _ = _registered(name)
    return _block_list(number, name, q_len, kv_len, width, device)


# Room for a large batch of different lengths: all layers ask for the same ones in turn.
@lru_cache(maxsize=256)
def _block_list(
    registration: int, name: str, q_len: int, kv_len: int, width: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False), torch.no_grad():
        kept = _kept(name, q_len, kv_len, width, device)
        counts = kept.sum(1)
        row, block = kept.nonzero(as_tuple=True)
        place = torch.arange(len(row), device=device) - (counts.cumsum(0) - counts)[row]
        blocks = torch.zeros(len(kept), max(int(counts.max()), 1), dtype=torch.int32, device=device)
        blocks[row, place] = block.int()
    return blocks, counts.int()
