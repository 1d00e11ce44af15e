"""Batches whose sequences several processes share, each with a part of the tokens (:mod:`flux_ext.sequence_parallel`).

Every process brings batches of its own, as in data-parallel training. Those of a group are run one after the other,
each by the whole group: a step sees as many sequences as without, and none of them is whole on one GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..sequence_parallel import SequenceGroup, Shard


def make_group(size: int) -> SequenceGroup:
    """The group of this process, of so many processes with ranks that follow each other.

    Raises:
        ValueError: the processes cannot be divided so.
    """
    processes = dist.get_world_size() if dist.is_initialized() else 1
    if size < 1 or processes % size:
        raise ValueError(f"sequence_parallel must divide the {processes} processes, got {size}")
    group, _ = dist.new_subgroups(size)
    return SequenceGroup(group)


def batch_of(inputs: Mapping[str, Any], group: SequenceGroup, turn: int, device: torch.device) -> dict[str, Any]:
    """The batch of one process of the group (``turn``, its place there), in each of them."""
    given: list[Any] = [None]
    if turn == group.rank:
        given = [{k: v.cpu() if isinstance(v, Tensor) else v for k, v in inputs.items()}]
    dist.broadcast_object_list(given, dist.get_global_rank(group.group, turn), group=group.group, device=None)
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in given[0].items()}


def part_of(inputs: Mapping[str, Any], group: SequenceGroup) -> tuple[dict[str, Any], Shard]:
    """This process's part of a batch, as a model takes it, and which part it is.

    Args:
        inputs: of :class:`~.data.PaddedCollator`: ``input_ids`` and perhaps ``attention_mask``, ``[B, S]``. Padding
            on the left makes S a multiple of the processes, see :func:`first_slot`.

    Raises:
        ValueError: the batch is packed.
    """
    if inputs.get("cu_seq_lens_q") is not None:
        raise ValueError("sequences packed into one row cannot be spread over processes: pad them (packed=False)")
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    pad = first_slot(ids.shape[1], group)
    if pad:
        mask = F.pad(torch.ones_like(ids) if mask is None else mask, (pad, 0))
        ids = F.pad(ids, (pad, 0))
    shard = Shard(group, ids.shape[1], None if mask is None else mask.bool())
    positions = (torch.arange(ids.shape[1], device=ids.device) - pad).clamp(min=0)
    return {"input_ids": ids[:, shard.part], "position_ids": positions[None, shard.part]}, shard


def first_slot(length: int, group: SequenceGroup) -> int:
    """The slot among the shard's at which the batch's own columns begin: padding that was added before them."""
    return -length % group.size


def own_columns(columns: Tensor, length: int, group: SequenceGroup) -> tuple[Tensor, Tensor]:
    """Of int64 ``columns`` of a batch of this ``length`` those that this process has, and where it has them."""
    pad = first_slot(length, group)
    part = Shard(group, length + pad).part
    local = columns + pad - part.start
    own = (columns + pad >= part.start) & (columns + pad < part.stop)
    return columns[own], local[own]
