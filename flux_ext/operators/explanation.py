"""Which kernel a call of attention takes, without running it.

The operator's schema, and what its numbers mean, are in ``csrc/torch/library.cpp``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .arguments import call
from .mixture import check_fraction
from .operands import Routing
from .patterns import Full, Pattern, Streaming
from .routed_attention import bound_operands, operator_arguments

_ops = torch.ops.flux_ext
_FAMILIES = {0: "cpu", 80: "sm80", 90: "sm90"}
_INSTRUCTION_SETS = ("portable", "avx2", "avx512", "avx512_bf16", "amx_bf16")


@dataclass(frozen=True)
class Explanation:
    """How one call of attention is computed. Its text says the same in sentences.

    Attributes:
        device: where.
        family: of kernels: ``"cpu"``; ``"sm80"``, which run on any GPU from compute capability 8.0 on, and for decode
            on Hopper too; ``"sm90"``, Hopper's own for prompts; ``"none"`` where there is nothing to do.
        processor: the instruction set that the CPU kernels use (``"portable"``, ``"avx2"``, ``"avx512"``,
            ``"avx512_bf16"``, ``"amx_bf16"``), or the compute capability of the GPU (``"9.0"``); ``"none"`` as for the
            family.
        decode: whether it is the kernel for few rows per tile (decode steps), not the one for many (prompts).
        tile_rows: rows of a tile that there is room for: queries times the query heads that share a KV head.
        q_tokens: queries of a tile.
        kv_block: keys of one step through a tile's keys.
        head_dim: width that is computed with, the call's own rounded up.
        workers: threads, or thread blocks, that share the work; 0 where there is nothing to do.
        plans_itself: whether every thread block plans its own share, without a launch before. False on the CPU.
        workspace_bytes: memory that the call takes besides its outputs (and besides ``copies``), at most.
        copies: which of q, k and v are copied at every call, as their rows do not start at multiples of 16 bytes. None
            on the CPU.
    """

    device: torch.device
    family: str
    processor: str
    decode: bool
    tile_rows: int
    q_tokens: int
    kv_block: int
    head_dim: int
    workers: int
    plans_itself: bool
    workspace_bytes: int
    copies: tuple[str, ...]

    def __str__(self) -> str:
        if self.workers == 0:
            return f"attention on {self.device}: there is no query, so nothing is computed"
        on_cpu = self.family == "cpu"
        machine = self.processor if on_cpu else f"compute capability {self.processor}"
        kind = "decode" if self.decode else "prefill"
        workers = f"{self.workers} {'threads' if on_cpu else 'thread blocks'}"
        plan = "" if on_cpu else ", each planning for itself" if self.plans_itself else ", planned by a launch before"
        lines = [
            f"attention on {self.device} ({machine}): the {kind} kernel of the family {self.family}",
            f"tiles of up to {self.tile_rows} rows ({self.q_tokens} queries), {self.kv_block} keys a step, head_dim "
            f"{self.head_dim}",
            f"{workers} share the work{plan}",
            f"workspace: {self.workspace_bytes:,} bytes at most",
        ]
        if self.copies:
            lines.append(f"copied at every call, for alignment to 16 bytes: {', '.join(self.copies)}")
        return "\n".join(lines)


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    route: Tensor | None = None,
    *,
    sparse: Pattern = Streaming(),
    full: Pattern = Full(),
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    seq_start: Tensor | None = None,
    seq_end: Tensor | None = None,
    kv_len: Tensor | None = None,
    page_table: Tensor | None = None,
    return_lse: bool = False,
) -> Explanation:
    """Which kernel :func:`flux_ext.attention` takes for the same arguments, and with what; it is not run.

    The answer depends on shapes, strides, addresses, dtypes and the device, and on no value inside a tensor. Of a
    fractional route it is that of a call with a hard one; a mixture has kernels of its own (:func:`operators.mix`). A
    :class:`~flux_ext.BlockSparse` with a threshold scores its blocks here too.

    Args:
        q, k, v, route, sparse, full, scale, cu_seqlens, seq_start, seq_end, kv_len, page_table: as for ``attention``.
        return_lse: as for ``attention``; the kernel is the same.

    Raises:
        TypeError, ValueError: an argument breaks a rule that ``attention`` checks too; but values inside tensors are
            not looked at.
    """
    kv, q_begin, q_end = bound_operands(q, k, v, route, cu_seqlens, seq_start, seq_end, kv_len, page_table)
    if route is not None and route.is_floating_point():
        check_fraction(route, return_lse)
        route = torch.zeros(route.shape, dtype=torch.int32, device=route.device)
    scale = 1.0 if scale is None else scale  # like the default: positive
    arguments = operator_arguments(q, kv, Routing(route, full, sparse), scale, q_begin, q_end)
    numbers: list[int] = call(_ops.explain, *arguments).tolist()
    family, processor, decode, tile_rows, q_tokens, kv_block, head_dim, workers, *rest = numbers
    plans_itself, workspace_bytes, copies = rest
    name = f"{processor // 10}.{processor % 10}" if q.is_cuda else _INSTRUCTION_SETS[processor]
    return Explanation(
        device=q.device,
        family=_FAMILIES[family] if workers else "none",
        processor=name if workers else "none",
        decode=bool(decode),
        tile_rows=tile_rows,
        q_tokens=q_tokens,
        kv_block=kv_block,
        head_dim=head_dim,
        workers=workers,
        plans_itself=bool(plans_itself),
        workspace_bytes=workspace_bytes,
        copies=tuple(name for i, name in enumerate("qkv") if copies & (1 << i)),
    )
