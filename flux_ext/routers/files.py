"""The files of saved routers: their names, where they are found, and how they are written.

A folder, or a repository on a Hub, may hold a model, an adapter and routers side by side. The routers' files have
names of their own; a file of theirs that something else wrote is never replaced.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors.torch import save, save_file
from torch import Tensor

CONFIG_FILE = "flux_config.json"
WEIGHTS_FILE = "flux_routers.safetensors"
MODEL_CONFIG_FILE = "config.json"
"""Of transformers' models, of published checkpoints, and of routers of format version 0."""
MODEL_WEIGHTS_FILE = "model.safetensors"
CARD_FILE = "README.md"
SAVE_ID = "weights_id"
"""Entry of the configuration and of the weights' metadata that says of which tensors they are: :func:`digest`."""

_TENSOR = re.compile(r"layers\.\d+\.(encoder|classifier)\.\d+\.(weight|bias)")
_CHECKPOINT = re.compile(r"checkpoint-\d+")
_BEGUN = re.compile(r"\.flux_.*\.tmp|(rng_state|objective)(_|-)?\d*\.(pth|safetensors)")
"""What the processes of a training may have written into a checkpoint before its routers are in place."""


class Place:
    """A folder, or a repository on a Hub at a revision, with files in it.

    Args:
        name: folder or repository.
        subfolder: of it.
        hub: keywords of ``hf_hub_download``: revision, cache_dir, token, local_files_only, force_download.

    Raises:
        ValueError: ``name`` is a file, or an absolute path where nothing is.
    """

    def __init__(self, name: str | Path, subfolder: str | None = None, **hub: Any) -> None:
        self.folder: Path | None = None
        self.name, self.subfolder, self.hub = str(name), subfolder, hub
        self.unreachable: LocalEntryNotFoundError | None = None
        if Path(name).is_dir():
            self.folder = Path(name) / (subfolder or "")
            self.name = str(self.folder)
        elif os.path.exists(name) or Path(name).is_absolute():
            raise ValueError(f"{name} is not a folder of saved routers")
        elif subfolder:
            self.name = f"{name}/{subfolder}"
        self._repository = str(name)

    def __str__(self) -> str:
        return self.name

    def file(self, name: str) -> Path | None:
        """The file on this machine, downloaded where it must be; None where there is none of this name."""
        if self.folder is not None:
            path = self.folder / name
            return path if path.is_file() else None
        try:
            return Path(hf_hub_download(self._repository, name, subfolder=self.subfolder, **self.hub))
        except EntryNotFoundError as error:
            if isinstance(error, LocalEntryNotFoundError):  # not downloaded yet, and no way to do it now
                self.unreachable = error
            return None

    def needed(self, name: str) -> Path:
        """As :meth:`file`; ValueError where there is none."""
        if (path := self.file(name)) is None:
            raise ValueError(f"{self} has no {name}: it is missing") from self.unreachable
        return path


def read_json(file: Path) -> Any:
    """What a JSON file holds; ValueError where it cannot be read."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from None


def read_tensors(file: Path, wanted: Callable[[str], bool] | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors on the CPU, those whose names are ``wanted`` (a predicate) or all, and metadata of a safetensors file.

    Raises:
        ValueError: the file is missing, truncated or damaged.
    """
    try:
        with safetensors.safe_open(file, framework="pt") as opened:
            names = [name for name in opened.keys() if wanted is None or wanted(name)]  # noqa: SIM118
            return {name: opened.get_tensor(name) for name in names}, opened.metadata() or {}
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{file} is missing, truncated or damaged: {error}") from None


def is_unversioned(config: object) -> bool:
    """Whether a ``config.json`` is that of routers of format version 0."""
    return isinstance(config, Mapping) and {"granularity", "pattern"} <= config.keys() and "architectures" not in config


def contents(place: Place) -> str:
    """What a folder or repository without routers holds, in words, as far as small files tell."""
    found = []
    if (file := place.file(MODEL_CONFIG_FILE)) is not None:
        config = read_json(file)
        config = config if isinstance(config, Mapping) else {}
        name = (config.get("architectures") or [config.get("model_type")])[0]
        found.append(f"a model ({name})" if name else f"a {MODEL_CONFIG_FILE} of something else")
    if place.file("adapter_config.json") is not None:
        found.append("a PEFT adapter")
    return " and ".join(found) or "nothing known"


def _is_ours(file: Path) -> bool:
    """Whether a file with one of the routers' names was written by this package."""
    with contextlib.suppress(ValueError, OSError, safetensors.SafetensorError):
        if file.name == WEIGHTS_FILE:
            with safetensors.safe_open(file, framework="pt") as opened:
                return all(_TENSOR.fullmatch(name) for name in opened.keys())  # noqa: SIM118
        config = read_json(file)
        return isinstance(config, Mapping) and {"granularity", "pattern"} <= config.keys()
    return False


def _has_routers(folder: Path) -> bool:
    """Whether routers were saved in a folder, and no model or adapter."""
    old = folder / MODEL_CONFIG_FILE
    if old.is_file() or (folder / "adapter_config.json").is_file():
        return old.is_file() and _is_ours(old) and is_unversioned(read_json(old))
    return (folder / CONFIG_FILE).is_file() and _is_ours(folder / CONFIG_FILE)


def refuse_foreign(folder: Path) -> None:
    """ValueError where saving routers in a folder would replace a file that is not theirs."""
    for part in (folder, *folder.parents):
        if part.exists():
            if not part.is_dir():
                raise ValueError(f"routers cannot be saved in {folder}: {part} is a file")
            break
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        file = folder / name
        if file.exists() and not (file.is_file() and _is_ours(file)):
            raise ValueError(f"{file} was not written by flux_ext and would be replaced: choose another folder")


def check_output(folder: str | Path, also: Iterable[str] = ()) -> None:
    """Whether a training may keep its routers and checkpoints in a folder; to be called before it starts.

    Routers may be saved beside a model or an adapter. Checkpoints of another training in ``checkpoint-N`` may not be
    there: they would be written into, and deleted when there are too many.

    Args:
        folder: may be missing.
        also: names of further files that the training writes there. Only a folder of routers may have them.

    Raises:
        ValueError: a file or checkpoint of something else would be replaced; the message says which.
    """
    folder = Path(folder)
    refuse_foreign(folder)
    if not folder.is_dir():
        return
    if not _has_routers(folder):
        for name in also:
            if (folder / name).exists():
                what = contents(Place(folder))
                raise ValueError(f"{folder / name} would be replaced, and the folder holds {what}: choose another")
    for checkpoint in sorted(folder.glob("checkpoint-*")):
        if _CHECKPOINT.fullmatch(checkpoint.name) and not (checkpoint.is_dir() and _is_checkpoint(checkpoint)):
            what = contents(Place(checkpoint)) if checkpoint.is_dir() else "a file"
            raise ValueError(f"{checkpoint} is no checkpoint of routers (it holds {what}): choose another folder")


def _is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint of routers, or one whose writing was cut off before they were in it."""
    return _has_routers(folder) or all(_BEGUN.fullmatch(file.name) for file in folder.iterdir())


def digest(tensors: Mapping[str, Tensor]) -> str:
    """32 hexadecimal digits that stand for names, dtypes, shapes and values of tensors, whatever a file adds."""
    found = hashlib.sha256()
    for name, x in sorted(tensors.items()):
        found.update(f"{name} {x.dtype} {list(x.shape)}\n".encode())
        found.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:32]


def _digest_of_file(tensors: Mapping[str, Tensor]) -> str:
    """The digest of earlier versions: of the file that safetensors makes."""
    return hashlib.sha256(save(dict(tensors))).hexdigest()[:32]


def check_saved_together(
    config_file: Path, config_id: object, weights_file: Path, weights_id: str | None, tensors: Mapping[str, Tensor]
) -> None:
    """Whether both files of the routers are of one save, and the tensors those that it saved.

    Args:
        config_file, config_id: the configuration and its ``weights_id``.
        weights_file, weights_id: the weights and the ``weights_id`` of their metadata. Where neither file has one they
            are of an earlier version, or made by hand, and nothing is known of them.
        tensors: what the weights' file holds.

    Raises:
        ValueError: an id is not the digest of the tensors; the message names the file.
    """
    if config_id is None and weights_id is None:
        return
    found = digest(tensors)
    if found not in (config_id, weights_id) and (earlier := _digest_of_file(tensors)) in (config_id, weights_id):
        found = earlier
    if weights_id not in (None, found):
        raise ValueError(
            f"{weights_file} was changed after it was saved: {SAVE_ID} must be the digest of its tensors, {found}, "
            f"got {weights_id!r}"
        )
    if config_id != found:
        raise ValueError(
            f"{config_file} and {weights_file} were not saved together: {SAVE_ID} of the first must be the digest of "
            f"the other's tensors, {found}, got {config_id!r}; a save was interrupted, or a file replaced: save again"
        )


def write(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Writes both files of the routers, each whole or not at all.

    Both carry the :func:`digest` of the weights: should one be replaced or changed, :func:`check_saved_together` tells.

    Raises:
        ValueError: see :func:`refuse_foreign`; nothing was written.
    """
    refuse_foreign(folder)
    folder.mkdir(parents=True, exist_ok=True)
    data = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    save_id = digest(data)
    with _replacing(folder, WEIGHTS_FILE, CONFIG_FILE) as (weights_file, config_file):
        save_file(data, weights_file, metadata={"format": "pt", SAVE_ID: save_id})
        config_file.write_text(json.dumps({**config, SAVE_ID: save_id}, sort_keys=True, indent=2) + "\n")


@contextlib.contextmanager
def _replacing(folder: Path, *names: str) -> Iterator[list[Path]]:
    """Temporary files that take these names, in this order, where the block ends without an error."""
    files = [folder / f".{name}.{uuid.uuid4().hex[:8]}.tmp" for name in names]
    try:
        yield files
        for file in files:
            with file.open("rb+") as opened:
                os.fsync(opened.fileno())
        for file, name in zip(files, names, strict=True):
            os.replace(file, folder / name)
    finally:
        for file in files:
            file.unlink(missing_ok=True)
