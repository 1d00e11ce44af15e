"""Which dtype a model gets where the user does not say."""

from __future__ import annotations

import torch


def fast_on_cpu() -> torch.dtype:
    """bf16 where this processor multiplies it, else fp32: other processors convert every number first."""
    from .._C import isa

    return torch.bfloat16 if "bf16" in isa() else torch.float32


def default(device: str, stored: torch.dtype | None) -> torch.dtype | str:
    """What weights that are stored in ``stored`` are loaded in: that, but on a CPU only where it is fast there."""
    if torch.device(device).type != "cpu":
        return "auto"
    return torch.bfloat16 if stored == torch.bfloat16 == fast_on_cpu() else torch.float32
