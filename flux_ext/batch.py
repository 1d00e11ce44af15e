"""What one forward of a patched model shares with all its layers: the sequences' bounds and the decisions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

Policy = Callable[[int, Tensor], Tensor]


class Decision(NamedTuple):
    """Of one layer: route ``[B, Hkv]`` and logits ``[B, 2]`` or ``[B, Hkv, 2]`` (None: an earlier forward decided)."""

    logits: Tensor | None
    route: Tensor


@dataclass
class Batch:
    """The sequences of one forward.

    ``seq_start`` and ``seq_end``, int32 ``[B]``, bound the rows of this forward that belong to each sequence
    (None: all); ``cu_seqlens``, int32 ``[n + 1]``, bounds sequences packed into one row; ``mask`` is the padding
    mask ``[B, tokens seen and new]`` for layers whose cache keeps padding; of a first forward that has more than
    the prompt, only the first ``prompt_len`` tokens decide, or of each sequence the first ``prompt_lengths`` [B].
    """

    policy: Policy | None = None
    seq_start: Tensor | None = None
    seq_end: Tensor | None = None
    cu_seqlens: Tensor | None = None
    mask: Tensor | None = None
    prompt_len: int | None = None
    prompt_lengths: Tensor | None = None
    decisions: dict[int, Decision] = field(default_factory=dict)
    _host: list[np.ndarray] = field(default_factory=list)  # shared by copies on other devices

    def to(self, device: Any, *args: Any, **kwargs: Any) -> Batch:
        """The same on another device; accelerate calls this where a model is spread over several."""
        names = ("seq_start", "seq_end", "cu_seqlens", "mask", "prompt_lengths")
        return replace(self, **{n: t.to(device) for n in names if (t := getattr(self, n)) is not None})

    def host_bounds(self, batch_size: int, q_len: int) -> tuple[np.ndarray, np.ndarray]:
        """``seq_start`` and ``seq_end`` on the host, read from the device once per forward."""
        if not self._host:
            if self.seq_start is None or self.seq_end is None:
                self._host += [np.zeros(batch_size, np.int64), np.full(batch_size, q_len, np.int64)]
            else:
                self._host += list(torch.stack([self.seq_start, self.seq_end]).cpu().numpy().astype(np.int64))
        return self._host[0], self._host[1]

    def kv_bounds(self, kv_len: int) -> tuple[Tensor | None, Tensor | None]:
        """int32 ``[B]`` bounds within the last ``kv_len`` tokens seen, for caches that keep padding."""
        return (None, None) if self.mask is None else span(self.mask[:, -kv_len:])


def span(mask: Tensor) -> tuple[Tensor, Tensor]:
    """First valid row and one past the last, int32 ``[B]`` each, of a padding mask ``[B, S]``.

    Raises:
        ValueError: the mask has a hole. Checked on the CPU only: elsewhere it would wait for the device.
    """
    start = mask.to(torch.int32).argmax(1).to(torch.int32)
    end = start + mask.sum(1, dtype=torch.int32)
    if mask.device.type == "cpu" and not torch.compiler.is_compiling():
        rows = torch.arange(mask.shape[1])
        if not torch.equal(mask, (rows >= start[:, None]) & (rows < end[:, None])):
            raise ValueError("attention_mask has a hole: padding must lie before or after a sequence, not inside")
    return start, end


def make_batch(policy: Policy | None, kwargs: dict[str, Any], tokens: Tensor, cache: Any) -> Batch:
    """The sequences of a decoder's forward, from its keyword arguments.

    Sequences packed into one row are found by ``cu_seq_lens_q``, or by position_ids that restart. The latter waits
    for the device, and is not looked for while compiling: a compiled model needs ``cu_seq_lens_q``.

    tokens: ``input_ids [B, S]`` or ``inputs_embeds [B, S, H]``.

    Raises:
        ValueError: a mask of a wrong shape or with a hole, or packing that cannot be honoured: beside padding, in
            several rows, or with a cache (restarting position_ids there are seen on the CPU only).
    """
    batch_size, q_len = tokens.shape[:2]
    packed = kwargs.get("cu_seq_lens_q") is not None
    eager = not torch.compiler.is_compiling()
    if packed and batch_size > 1:
        raise ValueError(f"cu_seq_lens_q bounds sequences packed into one row, got a batch of {batch_size} rows")
    if packed and cache is not None:
        raise ValueError("cu_seq_lens_q: sequences packed into one row have no cache, leave it out")
    mask = kwargs.get("attention_mask")
    if isinstance(mask, dict):  # prepared per layer type by generate; ours are all the same padding mask
        mask = mask.get("full_attention")
    if mask is not None:
        if mask.dim() != 2:
            raise ValueError(f"attention_mask must be a padding mask [B, tokens], got shape {list(mask.shape)}")
        if mask.shape[0] != batch_size or mask.shape[1] < q_len:
            raise ValueError(
                f"attention_mask must be [{batch_size}, >= {q_len}] for this input, got {list(mask.shape)}"
            )
        mask = mask.to(device=tokens.device, dtype=torch.bool)
        if packed:
            if not eager:
                raise ValueError("attention_mask beside cu_seq_lens_q cannot be checked while compiling: leave it out")
            if not bool(mask.all()):
                raise ValueError("attention_mask has padding beside cu_seq_lens_q: leave one of them out")
            return Batch(policy, cu_seqlens=packed_bounds(kwargs, q_len))
        # A decode step's token counts in every sequence: nothing to read, and nothing to wait for.
        # A static cache's mask covers its whole length, and only its prompt has several tokens.
        rows = slice(q_len) if cache is not None and cache.is_compileable else slice(-q_len, None)
        start, end = span(mask[:, rows]) if q_len > 1 else (None, None)
        return Batch(policy, start, end, None, mask)
    cu_seqlens = None
    if batch_size == 1 and cache is None:
        cu_seqlens = packed_bounds(kwargs, q_len)
    elif eager and tokens.device.type == "cpu" and (cache is None or cache.get_seq_length() == 0):
        refuse_restarts(kwargs, cache)
    return Batch(policy, cu_seqlens=cu_seqlens)


def packed_bounds(kwargs: dict[str, Any], q_len: int) -> Tensor | None:
    """int32 ``[n + 1]`` where the row holds several sequences: ``cu_seq_lens_q`` is given, or position_ids restart."""
    if (given := kwargs.get("cu_seq_lens_q")) is not None:
        return given.reshape(-1).to(torch.int32)
    positions = kwargs.get("position_ids")
    if positions is None or positions.dim() != 2 or positions.shape[0] != 1 or torch.compiler.is_compiling():
        return None
    restarts = (positions[0, 1:] != positions[0, :-1] + 1).nonzero()[:, 0] + 1
    if not len(restarts):
        return None
    ends = restarts.new_tensor([0, q_len])
    return torch.cat([ends[:1], restarts, ends[1:]]).to(torch.int32)


def refuse_restarts(kwargs: dict[str, Any], cache: Any) -> None:
    """Packed sequences go in one row, without a cache; seen on the CPU only, elsewhere it would wait."""
    positions = kwargs.get("position_ids")
    if positions is not None and positions.dim() == 2 and bool((positions[:, 1:] != positions[:, :-1] + 1).any()):
        where = "in a batch of several rows" if cache is None else "with a cache"
        raise ValueError(
            f"position_ids restart {where}: pack sequences into one row without a cache, or give an attention_mask"
        )
