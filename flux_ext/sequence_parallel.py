"""One sequence over several processes: each has a part of the tokens, and in attention a part of the heads.

Ulysses (arXiv 2309.14509): before attention an all-to-all gives each process all tokens of some heads, after it another
one gives back its own tokens of all heads. Everything else in a decoder looks at one token at a time and runs on a part
as it is. Routers look at the first and the last tokens of the prompt, wherever these are: :meth:`Shard.ends`.

All collectives here have their transposes as gradients. So every process differentiates the whole loss, which all of
them hold, and the mean of the processes' gradients, as DDP takes it, is that of one process.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class SequenceGroup:
    """The processes that share sequences, each with as many tokens, in the order of their ranks.

    Args:
        group: of torch.distributed.
    """

    def __init__(self, group: Any) -> None:
        self.group = group
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)

    def check_heads(self, num_q_heads: int, num_kv_heads: int) -> None:
        """ValueError where heads cannot be dealt out evenly. KV heads fewer than the processes are held by several."""
        if num_q_heads % self.size or (num_kv_heads % self.size and self.size % num_kv_heads):
            raise ValueError(
                f"sequence parallelism over {self.size} processes needs a number of query heads that {self.size} "
                f"divides, and of KV heads that it divides or that divides it: there are {num_q_heads} and "
                f"{num_kv_heads}"
            )

    def sum(self, x: Tensor) -> Tensor:
        """The sum of all processes' tensors, the same bits in each."""
        return _Sum.apply(x, self)  # type: ignore[no-untyped-call, no-any-return]

    def exchange(self, x: Tensor) -> Tensor:
        """``[P, ...]``: what is at place p goes to process p, and what comes from there stands there."""
        return _Exchange.apply(x, self)  # type: ignore[no-untyped-call, no-any-return]


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: SequenceGroup) -> Tensor:
        ctx.group = group
        x = x.contiguous()
        out = torch.empty_like(x)
        dist.all_to_all_single(out, x, group=group.group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.group.exchange(grad), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: SequenceGroup) -> Tensor:
        ctx.group = group
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x, group=group.group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.group.sum(grad), None


@dataclass(frozen=True)
class Shard:
    """This process's part of one forward.

    Attributes:
        group: who has the other parts.
        length: slots of all parts together, S, a multiple of the processes'.
        mask: the padding mask of all of them, bool ``[B, S]``; None: there is no padding.
    """

    group: SequenceGroup
    length: int
    mask: Tensor | None = None

    @property
    def part(self) -> slice:
        """The slots that this process has."""
        own = self.length // self.group.size
        return slice(self.group.rank * own, (self.group.rank + 1) * own)

    def by_heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Own tokens ``[B, S / P, H, D]`` of all heads -> all tokens ``[B, S, H / P, D]`` of own heads.

        A KV head that several processes need goes to each of them.

        Raises:
            ValueError: see :meth:`SequenceGroup.check_heads`.
        """
        self.group.check_heads(q.shape[2], k.shape[2])
        copies = max(1, self.group.size // k.shape[2])
        k, v = (x.repeat_interleave(copies, 2) if copies > 1 else x for x in (k, v))
        q, k, v = (self._by_heads(x) for x in (q, k, v))
        return q, k, v

    def _by_heads(self, x: Tensor) -> Tensor:
        processes = self.group.size
        parts = x.unflatten(2, (processes, -1)).permute(2, 0, 1, 3, 4)  # [P, B, S / P, H / P, D]
        return self.group.exchange(parts).transpose(0, 1).flatten(1, 2)

    def by_tokens(self, x: Tensor) -> Tensor:
        """All tokens ``[B, S, H / P, D]`` of own heads -> own tokens ``[B, S / P, H, D]`` of all heads."""
        parts = x.unflatten(1, (self.group.size, -1)).transpose(0, 1)  # [P, B, S / P, H / P, D]
        return self.group.exchange(parts).permute(1, 2, 0, 3, 4).flatten(2, 3)

    def own_heads(self, route: Tensor) -> Tensor:
        """``[B, Hkv]`` -> the columns of the KV heads that this process computes."""
        heads, processes, rank = route.shape[1], self.group.size, self.group.rank
        if heads < processes:
            return route[:, rank * heads // processes][:, None]
        own = heads // processes
        return route[:, rank * own : (rank + 1) * own]

    def ends(self, x: Tensor, begin: Tensor | None, end: Tensor | None, pool: int) -> tuple[Tensor, Tensor, Tensor]:
        """The tokens that a router looks at, from all processes, as sequences of no more than these.

        Args:
            x: states of the own tokens, ``[B, S / P, H, D]``.
            begin, end: int32 ``[B]``, the slots of the prompts among all S; None: all.
            pool: tokens at either end of a prompt.

        Returns:
            ``[B, 2 pool, H, D]`` and the rows ``[begin, end)`` of each sequence in it, int32 ``[B]``: its first
            and its last ``pool`` tokens, or all of a prompt of no more than that. The same bits in each process.
        """
        begin = torch.zeros(len(x), dtype=torch.int32, device=x.device) if begin is None else begin
        end = torch.full_like(begin, self.length) if end is None else end
        length = end - begin
        row = torch.arange(2 * pool, device=x.device)
        first = (row < pool) | (length <= 2 * pool)[:, None]
        slot = torch.where(first, begin[:, None] + row, end[:, None] - 2 * pool + row)  # [B, 2 pool]
        local = slot - self.part.start
        own = (local >= 0) & (local < x.shape[1]) & (row < length[:, None])
        index = local.clamp(0, x.shape[1] - 1)[..., None, None].expand(-1, -1, *x.shape[2:])
        rows = torch.where(own[..., None, None], x.gather(1, index), x.new_zeros(()))
        return self.group.sum(rows), torch.zeros_like(begin), length.clamp(max=2 * pool)
