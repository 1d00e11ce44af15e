"""Block selection beside the dense prompt that it saves a part of."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flux_ext import BlockSparse, Full
from flux_ext.operators import select_blocks
from flux_ext.operators.pattern_functions import Q_BLOCK

from .decode import K
from .prefill import block_problem, random_blocks, states
from .problems import OURS, Group, Problem, Setting, Spec, attend

LONGEST_IN_TORCH = 32 * K
"""Plain PyTorch keeps all scores: 34 GB of them at 128K."""


def in_torch(q: Tensor, k: Tensor, stride: int, width: int, threshold: float) -> tuple[Tensor, Tensor]:
    """The same for whole prompts in batched PyTorch, with all scores in memory: ``blocks`` and ``counts``."""
    heads, kv_heads, dim = q.shape[2], k.shape[2], q.shape[3]
    q, k = (x[:, : x.shape[1] // Q_BLOCK * Q_BLOCK] for x in (q, k))
    rows = q.unflatten(1, (-1, stride)).flip(2).permute(0, 3, 1, 2, 4).flatten(3)
    columns = k.unflatten(1, (-1, stride)).permute(0, 3, 1, 2, 4).flatten(3).repeat_interleave(heads // kv_heads, 1)
    scores = (rows @ columns.transpose(-1, -2)).float() / (math.sqrt(dim) * stride)
    n = scores.shape[-1]
    later = torch.ones(n, n, dtype=torch.bool, device=q.device).triu(1)
    mass = scores.masked_fill(later, -math.inf).softmax(-1).unflatten(-1, (-1, width // stride)).sum(-1)
    mass = mass.unflatten(-2, (-1, Q_BLOCK // stride)).sum(-2).unflatten(1, (kv_heads, -1)).mean(2)
    index = torch.arange(mass.shape[-1], device=q.device)
    diagonal = index * width // Q_BLOCK == torch.arange(mass.shape[-2], device=q.device)[:, None]
    always = diagonal | (index == 0)
    share = mass / mass.sum(-1, keepdim=True)
    order = torch.sort(share.masked_fill(always, math.inf), dim=-1, descending=True, stable=True).indices
    ordered = share.gather(-1, order)
    needed = (ordered.cumsum(-1) - ordered < threshold) | always.expand_as(share).gather(-1, order)
    keep = torch.zeros_like(needed).scatter(-1, order, needed)
    return torch.where(keep, index, n).sort(-1).values.int(), keep.sum(-1, dtype=torch.int32)


def build_selection(spec: Spec, setting: Setting) -> Problem:
    """Lists at threshold 0.9; the dense prompt; and both steps where the lists keep 95 % of the blocks."""
    q, k, v = states(spec, setting)
    stride = int(spec.kind.removeprefix("stride "))
    pattern = BlockSparse(threshold=0.9, stride=stride)
    rows = -(-spec.length // stride)
    problem = Problem(flops=2.0 * stride * spec.dim * spec.batch * spec.heads * rows * (rows + 1) / 2)
    kept, _ = block_problem(spec, random_blocks(spec, setting, 0.95))
    route = setting.int32([1] * spec.batch)

    def both() -> None:
        select_blocks(pattern, q, k)
        attend(q, k, v, route, kept)

    problem.contenders[OURS] = [lambda: select_blocks(pattern, q, k)]
    problem.contenders[f"{OURS}, dense prompt"] = [lambda: attend(q, k, v, None, Full())]
    problem.contenders[f"{OURS}, and then 95 % of the blocks"] = [both]
    if setting.peers and Q_BLOCK <= spec.length <= LONGEST_IN_TORCH:
        problem.contenders["PyTorch"] = [lambda: in_torch(q, k, stride, Q_BLOCK, 0.9)]
    return problem


def groups() -> list[Group]:
    """The most important cases first."""
    lengths = (16 * K, 32 * K, 64 * K, 128 * K, 8 * K, 4 * K)
    cases = [Spec("selection", f"stride {s}", 1, n) for s in (16, 8) for n in lengths]
    return [Group("selection", cases, build_selection)]
