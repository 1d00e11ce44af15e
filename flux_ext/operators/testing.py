"""What tests of attention need: tolerances that mean something, and inputs that show mistakes."""

from __future__ import annotations

import torch
from torch import Tensor


def relative_error(got: Tensor, exact: Tensor) -> float:
    """Relative Frobenius error over the elements that are finite in ``exact``."""
    finite = exact.isfinite()
    want = exact.detach()[finite].double()
    difference = (got.detach()[finite].double() - want).norm()
    return float(difference / want.norm().clamp_min(torch.finfo(torch.float64).tiny)) if want.numel() else 0.0


def assert_as_accurate(
    got: Tensor, exact: Tensor, plain: Tensor, factor: float = 2.0, floor: float | None = None, what: str = "output"
) -> None:
    """``got`` errs at most ``factor`` times as much as plain PyTorch does in the same precision.

    Args:
        got: the result under test.
        exact: the answer in float64.
        plain: plain PyTorch's answer to the same inputs in the precision of ``got``.
        factor: allowed ratio of the errors.
        floor: relative error that is always allowed; default a quarter of the dtype's epsilon (the rounding
            of the result itself), at least one epsilon of fp32 (the precision of all arithmetic).
    """
    assert got.shape == exact.shape, f"{what}: shape {list(got.shape)}, want {list(exact.shape)}"
    for kind, test in (("NaN", torch.isnan), ("inf", torch.isposinf), ("-inf", torch.isneginf)):
        wrong = test(got) != test(exact)
        assert not wrong.any(), f"{what}: {int(wrong.sum())} of {wrong.numel()} elements differ in being {kind}"
    error, plain_error = relative_error(got, exact), relative_error(plain, exact)
    if floor is None:
        floor = max(torch.finfo(got.dtype).eps / 4, torch.finfo(torch.float32).eps)
    assert error <= factor * plain_error + floor, (
        f"{what}: relative error {error:.2e}, plain PyTorch in {plain.dtype} has {plain_error:.2e}"
    )


def poisoned(rows: Tensor, capacity: int, start: int = 0) -> Tensor:
    """``[S, ...]`` set into ``[capacity, ...]`` from row ``start``; NaN wherever nothing was set."""
    out = torch.full((capacity, *rows.shape[1:]), torch.nan, dtype=rows.dtype, device=rows.device)
    out[start : start + len(rows)] = rows
    return out
