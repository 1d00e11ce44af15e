"""Which tokens count, kept on the host: of every sequence, the slots that held a token and those that held padding."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import numpy as np

FAILED = "an earlier forward failed half-way, so the layers of this cache differ: reset() it"


class Step(NamedTuple):
    """What one forward does to the rows of every layer: numpy arrays by sequence."""

    begin: np.ndarray  # int64 [B], first row of the forward that is a token
    tokens: np.ndarray  # int64 [B], how many
    forgotten: dict[int, np.ndarray]  # of a sequence, which of its earlier tokens the mask has taken back


def token_rows(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First token and number of tokens, int64 ``[B]`` each, of a padding mask, bool ``[B, S]``.

    Raises:
        ValueError: the mask has a hole.
    """
    begin, count = mask.argmax(1).astype(np.int64), mask.sum(1, dtype=np.int64)
    rows = np.arange(mask.shape[1])
    wrong = (mask != ((rows >= begin[:, None]) & (rows < (begin + count)[:, None]))).any(1)
    if wrong.any():
        raise ValueError(
            f"attention_mask has a hole in sequence {int(wrong.argmax())}: padding must lie before or after "
            "the tokens of a forward, not between them"
        )
    return begin, count


class History:
    """The slots that the layers of one cache have seen. Rows of a layer hold tokens only; a mask speaks of slots.

    Padding may lie between the turns of a sequence. What a later mask takes back is forgotten: an answer that ended
    before the others of its batch is followed by padding that was fed as text.
    """

    def __init__(self) -> None:
        # The FluxLayers. They hold this history, so a strong reference back would keep a dropped cache's memory until
        # the garbage collector runs, which running out of GPU memory does not make it do.
        self.layers: weakref.WeakSet[Any] = weakref.WeakSet()
        self.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "layers": list(self.layers)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = {**state, "layers": weakref.WeakSet(state["layers"])}

    def clear(self) -> None:
        self.length = 0  # slots seen
        self.valid: np.ndarray | None = None  # bool [B, length]: whether a slot holds a token; None: all do
        self.step: Step | None = None

    def advance(self, seen: int, batch_size: int, q_len: int, mask: np.ndarray | None) -> Step:
        """One forward of ``q_len`` more slots, asked for by each layer in turn; the first one's answer serves all.

        Args:
            seen: slots that the layer had seen before.
            mask: bool ``[B, seen + q_len]``, true for tokens; None: all new ones are.

        Raises:
            ValueError: a hole in the new part of the mask, or it shows what was padding.
            RuntimeError: sparse rows have dropped what taking tokens back would need, or an earlier forward failed.
        """
        if seen != self.length and self.step is not None and seen + q_len == self.length:
            return self.step
        if seen != self.length or any(layer.cumulative_length not in (0, seen) for layer in self.layers):
            raise RuntimeError(FAILED)
        if mask is None:
            begin, count = np.zeros(batch_size, np.int64), np.full(batch_size, q_len, np.int64)
        else:
            begin, count = token_rows(mask[:, seen:])
        before, forgotten = self._compare(mask, seen)
        for layer in self.layers if forgotten else ():
            layer.check_forget(forgotten)
        if before is not None or (mask is not None and not mask[:, seen:].all()):
            if before is None:
                before = np.ones((batch_size, seen), bool)
            new = np.ones((batch_size, q_len), bool) if mask is None else mask[:, seen:]
            self.valid = np.concatenate([before, new], 1)
        self.length += q_len
        self.step = Step(begin, count, forgotten)
        return self.step

    def _compare(self, mask: np.ndarray | None, seen: int) -> tuple[np.ndarray | None, dict[int, np.ndarray]]:
        """Earlier slots that count from now on, and each sequence's tokens that do not any more."""
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
        return valid & shown, {int(b): order[b, hidden[b]] for b in np.flatnonzero(hidden.any(1))}

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
