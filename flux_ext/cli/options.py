"""The values of the command line's options: each rule is checked, and named, before anything is loaded."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch

from .. import FluxConfig
from ..config import PAPERS, PRESETS


class Parser(argparse.ArgumentParser):
    """Reports its errors in one line, like all others."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"flux-ext: error: {message}\n")


class Formatter(argparse.HelpFormatter):
    """Says each option's default, once: its own value, or what its help says behind ``(default: `` where the value
    (None, an empty list) says nothing."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if action.required:
            return f"{text} (required)"
        exits = isinstance(action, (argparse._HelpAction, argparse._VersionAction))
        if "(default: " in text or exits or not action.option_strings:
            return text
        default = action.default
        if isinstance(action, argparse._StoreTrueAction):
            default = "off"
        elif isinstance(default, list):
            default = " ".join(map(str, default))
        if default in (None, "", argparse.SUPPRESS):
            default = "none"
        return f"{text} (default: {default})"


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """Whole numbers in a range."""
    rule = f"a whole number >= {least}" if most is None else f"a whole number in [{least}, {most}]"

    def value(text: str) -> int:
        with contextlib.suppress(ValueError):
            n = int(text)
            if least <= n and (most is None or n <= most):
                return n
        raise argparse.ArgumentTypeError(f"must be {rule}, got {text!r}")

    return value


def number(rule: str, holds: Callable[[float], bool] = lambda _: True) -> Callable[[str], float]:
    """Finite numbers for which something holds."""

    def value(text: str) -> float:
        with contextlib.suppress(ValueError):
            x = float(text)
            if math.isfinite(x) and holds(x):
                return x
        raise argparse.ArgumentTypeError(f"must be a finite number{rule}, got {text!r}")

    return value


COUNT = whole(1)
SEED = whole(0, 2**32 - 1)
POSITIVE = number(" > 0", lambda x: x > 0)
NOT_NEGATIVE = number(" >= 0", lambda x: x >= 0)
SHARE = number(" in [0, 1]", lambda x: 0 <= x <= 1)


def target(text: str) -> tuple[str, float]:
    """A task and the share of sparse attention that it is to have."""
    task, equals, share = text.rpartition("=")
    if not task or not equals:
        raise argparse.ArgumentTypeError(f"must read TASK=SHARE, for example retrieval=0.45, got {text!r}")
    return task, SHARE(share)


def budget(text: str) -> tuple[str | None, float, str]:
    """``[TASK=]AMOUNT``, a share of the dense loss or, with ``nats`` behind it, nats per answer token: task or None,
    amount and unit, ``"share"`` or ``"nats"``."""
    task, equals, amount = text.rpartition("=")
    if equals and not task:
        raise argparse.ArgumentTypeError(f"must read [TASK=]AMOUNT, for example 0.01 or 0.02nats, got {text!r}")
    unit = "nats" if amount.endswith("nats") else "share"
    return task or None, NOT_NEGATIVE(amount.removesuffix("nats")), unit


def device(text: str) -> str:
    """A device of this machine on which there are kernels."""
    try:
        device = torch.device(text)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"must be cpu, cuda or one of several GPUs, like cuda:1, got {text!r}")
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        raise argparse.ArgumentTypeError(f"must be a device of this machine, which has {count} GPUs, got {text!r}")
    return text


def output_folder(text: str) -> Path:
    """A folder that exists and can be written to, or that can be made."""
    path = Path(text)
    there = next((p for p in (path, *path.absolute().parents) if p.exists()), path)
    if not there.is_dir():
        raise argparse.ArgumentTypeError(f"must be a folder, {str(there)!r} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(f"must be a folder to write to, {str(there)!r} is not writable")
    return path


def output_file(text: str) -> Path:
    """A file that can be written."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"must be a file, {text!r} is a folder")
    if not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"must be a file in a folder that exists, got {text!r}")
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"must be a file to write to, {text!r} is not writable")
    return path


def json_file(text: str) -> Path:
    """A file that can be written, beside which others are named after it."""
    path = output_file(text)
    if path.suffix != ".json":
        raise argparse.ArgumentTypeError(f"must be a file whose name ends in .json, got {text!r}")
    return path


MODES: dict[str, dict[str, Any]] = {
    "pattern": {"choices": ["streaming", "triangle", "block_sparse"], "help": "the sparse mode over a prompt"},
    "full": {"choices": ["full", "block_sparse"], "help": "the full mode over a prompt"},
    "decode": {"choices": ["sparse", "dense"], "help": "what sparse routes see and keep after the prompt"},
    "granularity": {"choices": ["layer", "head"], "help": "what a decision is for"},
    "sink": {"type": whole(0), "help": "first tokens that streaming, triangle and sparse decoding see"},
    "window": {"type": COUNT, "help": "last tokens that they see"},
    "align": {"type": COUNT, "help": "tokens of a block that shares one window"},
    "last_q": {"type": whole(0), "help": "rows at the end of a prompt that see everything (triangle)"},
    "threshold": {
        "type": number(" in (0, 1]", lambda x: 0 < x <= 1),
        "help": "share of the antidiagonal scores that block-sparse modes keep",
    },
    "stride": {"type": COUNT, "help": "tokens of a sub-block that is scored (block-sparse)"},
    "block_width": {"type": int, "choices": [64, 128], "help": "keys of a block (block-sparse)"},
    "pool_size": {"type": COUNT, "help": "tokens at either end that a router sees"},
}
"""Options that are fields of ``FluxConfig``."""


def add_modes(add: Callable[..., argparse.Action], but: str = "", papers: bool = False) -> None:
    """``--preset`` and the options of :data:`MODES`; :func:`config_of` reads them.

    Args:
        add: a command's ``add_argument``.
        but: one of them that the command has in another form.
        papers: whether ``--preset`` may name a paper, whose training :func:`fill_in_training` fills in.
    """
    recipes = (
        "; or a paper's whole recipe, modes, training and all: flux (arXiv 2604.07394) or elastic (arXiv 2601.17367)"
    )
    add(
        "--preset",
        choices=[*PRESETS, *(PAPERS if papers else ())],
        default=argparse.SUPPRESS,
        help="full mode and sparse mode as the papers name them, with the published numbers: full attention (fa) or "
        "block-sparse (xa), and streaming (ssa), triangle (ta) or block-sparse (xa)"
        f"{recipes if papers else ''} (default: fa-ssa)",
    )
    for name, option in MODES.items():
        if name == but:
            continue
        default = "the preset's" if name in PAPERS["flux"] else getattr(FluxConfig, name)
        text = f"{option['help']} (default: {default})"
        add(f"--{name.replace('_', '-')}", **{**option, "default": argparse.SUPPRESS, "help": text})


def config_of(args: argparse.Namespace, **instead: Any) -> FluxConfig:
    """The configuration that the options of :func:`add_modes` ask for.

    Args:
        args: the parsed options.
        instead: what takes the place of some of them.

    Raises:
        ValueError: they contradict each other, see ``FluxConfig``.
    """
    changes = {name: getattr(args, name) for name in MODES if hasattr(args, name)}
    return FluxConfig.preset(getattr(args, "preset", "fa-ssa"), **{**changes, **instead})


def given_modes(args: argparse.Namespace) -> list[str]:
    """Those of the options of :func:`add_modes` that were given, as they are written."""
    return [f"--{name.replace('_', '-')}" for name in ("preset", *MODES) if hasattr(args, name)]


TRAINING: dict[str, Any] = {
    "multipliers": "inequality",
    "multiplier_lr": 0.1,
    "batch_size": 4,
    "accumulate": 1,
    "lr": 1e-3,
}
"""Defaults of ``train`` where ``--preset`` names no paper. The parser leaves these options open (None)."""


def fill_in_training(args: argparse.Namespace) -> None:
    """Gives the options of ``train`` that are open the values of the paper that ``--preset`` names, or the defaults."""
    from ..training.config import PAPER_RECIPES, PUBLISHED_LENGTH, PUBLISHED_LR, published_accumulation

    values = dict(TRAINING)
    if recipe := PAPER_RECIPES.get(getattr(args, "preset", "")):
        if args.budget:
            raise ValueError(f"--budget must be left out with --preset {args.preset}, which has target sparsities")
        batch_size = args.batch_size or 1
        values |= {name: value for name, value in recipe.items() if name != "targets"}
        values |= {"lr": PUBLISHED_LR, "batch_size": batch_size, "accumulate": published_accumulation(batch_size)}
        values |= {"max_length": PUBLISHED_LENGTH}
        args.preset_targets = not args.target
        args.target = args.target or list(recipe["targets"].items())
    for name, value in values.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
