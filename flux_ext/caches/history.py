"""Which of the slots of each sequence held a token and which held padding; kept on the host.

A slot is a column of ``input_ids`` and of the attention mask, over all forwards: caches store tokens, masks speak of
slots.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import numpy as np
import torch

from ..forward_context import span

FAILED = "an earlier forward failed half-way, so the layers of this cache differ: reset() it"


class Step(NamedTuple):
    """What one forward does to each sequence, in every layer alike."""

    begin: np.ndarray  # int64 [B], the first of the forward's slots that holds a token
    tokens: np.ndarray  # int64 [B], how many
    forgotten: dict[int, np.ndarray]  # of a sequence, which of its earlier tokens the mask has taken back
    whole: bool  # whether all of the forward's slots hold tokens


def token_rows(mask: np.ndarray | None, batch_size: int, q_len: int) -> tuple[np.ndarray, np.ndarray]:
    """First token and number of tokens, int64 ``[B]`` each, of a forward's padding mask, bool ``[B, q_len]`` or None.

    Raises:
        ValueError: the mask has a hole.
    """
    if mask is None:
        return np.zeros(batch_size, np.int64), np.full(batch_size, q_len, np.int64)
    begin, end = (x.numpy().astype(np.int64) for x in span(torch.from_numpy(mask)))
    return begin, end - begin


class History:
    """The slots that one cache has seen, for all its layers.

    Padding may lie between the turns of a conversation. A later mask may also take tokens back, i.e. call a slot
    padding that was fed as a token: ``generate`` feeds padding as text to a sequence whose answer ended before the
    others. Such tokens are forgotten.
    """

    def __init__(self) -> None:
        # The FluxCacheLayers. They refer to this history: were these references strong, a cache that is let go of would
        # be a cycle, and keep its GPU memory until the garbage collector runs; torch does not start that when memory
        # runs out.
        self.cache_layers: weakref.WeakSet[Any] = weakref.WeakSet()
        self.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "cache_layers": list(self.cache_layers)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = {**state, "cache_layers": weakref.WeakSet(state["cache_layers"])}

    def clear(self) -> None:
        self.length = 0  # slots seen
        self.valid: np.ndarray | None = None  # bool [B, length]: whether a slot holds a token; None: all do
        self.step: Step | None = None

    def advance(self, seen: int, batch_size: int, q_len: int, mask: np.ndarray | None) -> Step:
        """One forward of ``q_len`` more slots. Each layer asks in turn; what the first one is told, all are told.

        Args:
            seen: slots that the layer had seen before.
            mask: bool ``[B, seen + q_len]``, true for tokens; None: all new ones are.

        Raises:
            ValueError: a hole in the new part of the mask, or it shows what was padding.
            RuntimeError: sparse heads have dropped what taking tokens back would need, or an earlier forward failed.
        """
        if seen != self.length and self.step is not None and seen + q_len == self.length:
            return self.step
        if seen != self.length or any(layer.cumulative_length not in (0, seen) for layer in self.cache_layers):
            raise RuntimeError(FAILED)
        begin, count = token_rows(None if mask is None else mask[:, seen:], batch_size, q_len)
        before, forgotten = self._compare(mask, seen)
        if before is not None or (mask is not None and not mask[:, seen:].all()):
            if before is None:
                before = np.ones((batch_size, seen), bool)
            new = np.ones((batch_size, q_len), bool) if mask is None else mask[:, seen:]
            self.valid = np.concatenate([before, new], 1)
        self.length += q_len
        self.step = Step(begin, count, forgotten, bool((count == q_len).all()))
        return self.step

    def check(self, batch_size: int, q_len: int, mask: np.ndarray) -> None:
        """As :meth:`advance` with a mask, but changes nothing."""
        token_rows(mask[:, self.length :], batch_size, q_len)
        self._compare(mask, self.length)

    def _compare(self, mask: np.ndarray | None, seen: int) -> tuple[np.ndarray | None, dict[int, np.ndarray]]:
        """Earlier slots that count from now on, and each sequence's tokens that do not any more. Raises what
        :meth:`advance` does."""
        if mask is None or not seen:
            return self.valid, {}
        shown = mask[:, :seen]
        if self.valid is None:
            if shown.all():
                return None, {}
            valid = np.ones_like(shown)
        else:
            valid = self.valid
        if (wrong := shown & ~valid).any():
            b, slot = np.argwhere(wrong)[0]
            raise ValueError(
                f"attention_mask shows token {slot} of sequence {b}, which was masked when it was fed: it is not stored"
            )
        hidden = valid & ~shown
        if not hidden.any():
            return valid, {}
        order = valid.cumsum(1) - 1
        forgotten = {int(b): order[b, hidden[b]] for b in np.flatnonzero(hidden.any(1))}
        for layer in self.cache_layers:
            layer.check_forget(forgotten)
        return valid & shown, forgotten

    def tokens_in_last(self, slots: int, batch_size: int) -> np.ndarray:
        """int64 ``[B]``: tokens among the last slots of each sequence."""
        if self.valid is None:
            return np.full(batch_size, slots, np.int64)
        return self.valid[:, self.length - slots :].sum(1, dtype=np.int64)

    def crop(self, slots: int) -> None:
        """Forgets the last slots; all of them: everything."""
        self.length -= slots
        self.step = None
        if not self.length:
            self.clear()
        elif self.valid is not None:
            self.valid = self.valid[:, : self.length]

    def select(self, sequences: np.ndarray) -> None:
        """Keeps the given sequences, in this order, repeated where they repeat."""
        self.step = None
        if self.valid is not None:
            self.valid = self.valid[sequences]
