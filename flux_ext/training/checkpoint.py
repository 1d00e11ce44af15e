"""A trainer's checkpoint: read as a whole, and every file of it checked, before any of it is used."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from ..routers.collection import FluxRouters
from ..routers.files import CONFIG_FILE, check_output
from .config import Recipe

RECIPE_FILE = "recipe.json"
OBJECTIVE_FILE = "objective.safetensors"
STATE_FILE = "trainer_state.json"
OPTIMIZER_FILE = "optimizer.pt"
ARGUMENTS_FILE = "training_args.bin"
WHOLE_FILE = "whole.json"
"""Written last, when every file of every process is on the disk: a checkpoint without it is one whose writing was cut
off, by the end of a process or of the machine."""


def objective_file(rank: int) -> str:
    """The name of a process's objective: multipliers are the same on all processes, draws are each one's own."""
    return OBJECTIVE_FILE if rank == 0 else f"objective-{rank}.safetensors"


def check_output_folder(folder: str | os.PathLike[str]) -> None:
    """ValueError where keeping a training in a folder would replace files or checkpoints of something else; see
    :func:`flux_ext.routers.files.check_output`."""
    folder = Path(folder)
    also: tuple[str, ...] = (RECIPE_FILE, OBJECTIVE_FILE, ARGUMENTS_FILE)
    with contextlib.suppress(ValueError):
        _read_recipe(folder / RECIPE_FILE)
        also = ()  # they are those of a training
    check_output(folder, also)


def check_unused(folder: Path) -> None:
    """ValueError where a folder has the checkpoints or routers of an earlier training, which a new one would replace or
    be taken for."""
    found = sorted((n for n in _names(folder) if _NAME.fullmatch(n)), key=lambda n: int(n.removeprefix("checkpoint-")))
    found += [name for name in (CONFIG_FILE,) if (folder / name).is_file()]
    if found:
        raise ValueError(
            f"{folder} is the folder of an earlier training (it has {', '.join(found)})"
            ": go on with it (--resume), or choose another folder"
        )


@dataclass(frozen=True)
class Checkpoint:
    """What a trainer goes on with."""

    folder: Path
    recipe: Recipe
    tasks: tuple[str, ...]
    data: str | None
    """:func:`~.data.digest` of the examples; None of data without any, and of earlier checkpoints."""
    dtype: str | None
    """:func:`dtype_of` the model; None of earlier checkpoints."""
    routers: FluxRouters
    objectives: dict[int, dict[str, Tensor]]
    """The objective's state in the first process and, unless there were fewer, in this one, by rank."""

    @classmethod
    def read(cls, folder: Path, rank: int = 0) -> Checkpoint:
        """Routers, recipe and objective of a checkpoint.

        Raises:
            ValueError: a file is missing or damaged; the message names it.
        """
        if not folder.is_dir():
            raise ValueError(f"{folder} is no checkpoint of a FluxTrainer: there is no such folder")
        require(folder, RECIPE_FILE, OBJECTIVE_FILE)
        files = {r: folder / objective_file(r) for r in (0, rank)}
        return cls(
            folder,
            *_read_recipe(folder / RECIPE_FILE),
            FluxRouters.from_pretrained(folder),
            {r: _read_tensors(file) for r, file in files.items() if file.is_file()},
        )

    def warn_of_dtype(self, dtype: str) -> None:
        """A warning where the training goes on with the model in another dtype: its losses are a little different."""
        if self.dtype not in (None, dtype):
            warnings.warn(
                f"{self.folder} was trained with the model in {self.dtype}, and the training goes on in {dtype}: load "
                f"it in torch.{self.dtype} (flux-ext train: --dtype {self.dtype}) to go on as it began",
                stacklevel=2,
            )

    def check_goes_on(self, recipe: Recipe, tasks: Sequence[str]) -> None:
        """ValueError where a recipe or its tasks have something else that cannot change within a training."""
        began = replace(recipe, start_bias=self.recipe.start_bias).initial_bias
        for name, own, saved in (
            ("tasks", tuple(tasks), self.tasks),
            ("objective", recipe.objective, self.recipe.objective),
            ("multipliers", recipe.multipliers, self.recipe.multipliers),
            ("start_bias", recipe.initial_bias, began),
            ("constraint", _constraint(recipe), _constraint(self.recipe)),
            ("flip_choice", recipe.flip_choice, self.recipe.flip_choice),
        ):
            if own != saved:
                raise ValueError(f"{self.folder} was trained with {name} {saved!r}, not {own!r}")


def dtype_of(model: Any) -> str:
    """That of a model's first weights, which no quantisation touches, as ``"bfloat16"``."""
    return str(next(p.dtype for p in model.parameters() if p.is_floating_point())).removeprefix("torch.")


def _constraint(recipe: Recipe) -> str:
    """What the objective's state is of, in words."""
    if not recipe.has_budget:
        return "targets"
    return ", ".join(["budget", *(f"budget of {task}" for task in sorted(recipe.budgets))])


def check_progress(folder: Path, rank: int, optimizer: Mapping[str, Any] | None) -> None:
    """Checks what the Hugging Face Trainer keeps for resuming, which it reads at several later moments.

    Args:
        folder: a checkpoint.
        rank: of this process.
        optimizer: the options it is going to have, by their names in a parameter group (the optimiser goes on with
            those of the checkpoint); None where it is kept in other files (DeepSpeed, FSDP).

    Raises:
        ValueError: a file is missing or damaged, or an option of the optimiser is another; the message names it.
    """
    require(folder, STATE_FILE)
    step = read_object(folder / STATE_FILE).get("global_step")
    if not isinstance(step, int):
        raise ValueError(f"{folder / STATE_FILE} is damaged: global_step must be a whole number, it is {step!r}")
    if optimizer is not None:
        require(folder, OPTIMIZER_FILE, "scheduler.pt")
    for name in (OPTIMIZER_FILE, "scheduler.pt", "scaler.pt", "rng_state.pth", f"rng_state_{rank}.pth"):
        if (folder / name).is_file():
            _check_archive(folder / name)
    if optimizer is None:
        return
    file = folder / OPTIMIZER_FILE
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)["param_groups"][0]
    except (RuntimeError, pickle.UnpicklingError, LookupError, TypeError) as error:
        raise ValueError(f"{file} is damaged: {error}") from None
    for name, value in optimizer.items():
        if name in saved and saved[name] != value:
            raise ValueError(f"{file} goes on with {name} {saved[name]!r}, the arguments ask for {value!r}")


def require(folder: Path, *names: str) -> None:
    """ValueError where one of these files is missing."""
    for name in names:
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is no whole checkpoint of a FluxTrainer: it has no {name}")


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object; ValueError that names the file where there is none."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is damaged: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file} is damaged: it must hold an object, it holds a {type(value).__name__}")
    return value


def _read_recipe(file: Path) -> tuple[Recipe, tuple[str, ...], str | None, str | None]:
    saved = read_object(file)
    try:
        recipe = Recipe(**{f.name: saved[f.name] for f in fields(Recipe) if f.name in saved})
        return recipe, tuple(saved["tasks"]), saved.get("data"), saved.get("dtype")
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"{file} is damaged: {error}") from None


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{file} is damaged: {error}") from None


def _check_archive(file: Path) -> None:
    """torch.save writes ZIP archives, whose checksums show a cut or changed file without unpickling it."""
    try:
        with zipfile.ZipFile(file) as archive:
            broken = archive.testzip()
    except (OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{file} is damaged: {error}") from None
    if broken is not None:
        raise ValueError(f"{file} is damaged: the checksum of {broken} is wrong")


def begin(folder: Path) -> None:
    """A checkpoint that is about to be written (again) is no whole one."""
    (folder / WHOLE_FILE).unlink(missing_ok=True)


def flush(folder: Path) -> None:
    """Brings a checkpoint's files to the disk, so that they outlive the machine's end. Each process that has written
    some does so after its last."""
    for file in [*folder.iterdir(), folder]:
        try:
            opened = os.open(file, os.O_RDONLY)
        except FileNotFoundError:  # the temporary one of a process that is still at it
            continue
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def finish(folder: Path, processes: int, objectives: int) -> None:
    """Marks a checkpoint as whole: the files of so many processes are there, and on the disk.

    Args:
        folder: the checkpoint.
        processes: of the training.
        objectives: those of them that draw for themselves; the others share sequences with them.
    """
    file = folder / f".{WHOLE_FILE}.tmp"
    file.write_text(json.dumps({"processes": processes, "objectives": objectives}), encoding="utf-8")
    flush(folder)
    os.replace(file, folder / WHOLE_FILE)
    flush(folder)


def check_whole(folder: Path) -> None:
    """ValueError where a checkpoint's writing was cut off, or a file of it is damaged; the message names it."""
    if not (folder / WHOLE_FILE).is_file():
        raise ValueError(f"{folder} is no whole checkpoint: its writing was cut off ({WHOLE_FILE} is missing)")
    counts = read_object(folder / WHOLE_FILE)
    for name in ("processes", "objectives"):
        if not isinstance(counts.get(name), int) or counts[name] < 1:
            raise ValueError(f"{folder / WHOLE_FILE} is damaged: {name} must be >= 1, it is {counts.get(name)!r}")
    Checkpoint.read(folder)
    for stream in range(counts["objectives"]):
        require(folder, objective_file(stream))
        _read_tensors(folder / objective_file(stream))
    for rank in range(counts["processes"]):
        check_progress(folder, rank, {} if rank == 0 else None)


def latest_checkpoint(folder: str | os.PathLike[str]) -> str | None:
    """The newest whole checkpoint in a folder, None where there are none.

    Newer ones that are not whole are passed over, with a warning that says what they lack.

    Raises:
        ValueError: there are checkpoints, and none is whole.
    """
    found = [(int(m[1]), m[0]) for m in map(_NAME.fullmatch, _names(Path(folder))) if m]
    errors = []
    for _, name in sorted(found, reverse=True):
        try:
            check_whole(Path(folder) / name)
        except ValueError as error:
            errors.append(str(error))
            continue
        if errors:
            warnings.warn(f"resuming from {Path(folder) / name}: {'; '.join(errors)}", stacklevel=2)
        return os.fspath(Path(folder) / name)
    if errors:
        raise ValueError(f"no checkpoint in {folder} is whole: {'; '.join(errors)}")
    return None


def what_is_lost(folder: Path, step: int, steps: int) -> str:
    """What an interruption costs after so many steps of a training whose checkpoints are in a folder, in words."""
    if step == 0:
        return "interrupted before the first step was done"
    newest = None
    with contextlib.suppress(ValueError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        newest = latest_checkpoint(folder)
    lost = f"resuming goes on from {newest}, later steps are lost" if newest else "there is no checkpoint, all is lost"
    return f"interrupted after step {step} of {steps}: {lost}"


_NAME = re.compile(r"checkpoint-(\d+)")


def _names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
