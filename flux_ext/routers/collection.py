"""All routers of one model as one module: saved, loaded and published apart from the backbone."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import HfApi, ModelCard, PyTorchModelHubMixin
from torch import Tensor, nn

from ..config import FluxConfig, check_integer
from . import card, files
from .files import CARD_FILE, CONFIG_FILE, MODEL_CONFIG_FILE, MODEL_WEIGHTS_FILE, WEIGHTS_FILE, Place
from .files import check_output as check_output  # public here
from .modules import PUBLISHED_CLASSIFIER, PUBLISHED_ENCODER, HeadRouter, LayerRouter, Router

# No `from __future__ import annotations` here: the Hub mixin reads the annotation of `config` as a type.

PUBLISHED_BLOCK = 128
"""The published code rounds sink and window up to blocks of 128 keys and aligns the window to them."""


class FluxRouters(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="flux-ext",
    tags=["flux-ext", "sparse-attention"],
    model_card_template=card.TEMPLATE,
):
    """One router (:mod:`flux_ext.routers.modules`) per routed layer.

    ``save_pretrained``, ``from_pretrained`` and ``push_to_hub`` are the Hugging Face Hub's. The files are
    ``flux_routers.safetensors`` and ``flux_config.json``, the :class:`~flux_ext.FluxConfig`: they may lie beside a
    model's or an adapter's.

    Args:
        config: with ``head_dim`` and ``num_layers`` (or ``layers_to_route``) filled in.
    """

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        if config.head_dim is None:
            raise ValueError("config.head_dim must be given to build routers")
        self.config = config
        kind = LayerRouter if config.granularity == "layer" else HeadRouter
        self.layers = nn.ModuleList(kind(config.head_dim, config.pool_size) for _ in config.routed_layers())

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        config: object = None,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        model_card_kwargs: dict[str, Any] | None = None,
        **push_to_hub_kwargs: Any,
    ) -> str | None:
        """Writes ``flux_config.json``, ``flux_routers.safetensors`` and, where there is no model, a model card.

        Files of something else are never replaced, and an interrupted save leaves the earlier files, or some that
        :meth:`from_pretrained` refuses.

        Args:
            save_directory: made where it is missing; may hold a model.
            config: as the Hub's ``push_to_hub`` gives it; the routers' own is saved.
            repo_id, push_to_hub, model_card_kwargs, push_to_hub_kwargs: see the Hub's ``save_pretrained``. Of the card,
                ``{"training": text}`` says how the routers were trained.

        Raises:
            ValueError: a file of something else would be replaced, or a router's layer was (an adapter's, a
                quantised one). Nothing was written.
        """
        folder = Path(save_directory)
        files.write(folder, self.config.to_dict(), self._tensors())
        if not (folder / CARD_FILE).exists() and not (folder / MODEL_CONFIG_FILE).exists():
            self.generate_model_card(**(model_card_kwargs or {})).save(folder / CARD_FILE)
        if not push_to_hub:
            return None
        return self.push_to_hub(repo_id or folder.name, model_card_kwargs=model_card_kwargs, **push_to_hub_kwargs)

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The card that :meth:`save_pretrained` writes; ``kwargs`` replace those of ``routers.card.facts``."""
        known = card.facts(self.config, sum(p.numel() for p in self.parameters()))
        return super().generate_model_card(*args, **{**known, **kwargs})

    def check_savable(self, folder: str | os.PathLike[str]) -> None:
        """ValueError where :meth:`save_pretrained` would refuse the folder or these routers."""
        files.refuse_foreign(Path(folder))
        self._tensors()

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Saves to the Hub repository ``repo_id``; other arguments as for the Hub's ``push_to_hub``.

        A repository that has a model card keeps it.
        """
        api = HfApi(token=kwargs.get("token"))
        repo_id = api.create_repo(repo_id=repo_id, private=kwargs.get("private"), exist_ok=True).repo_id
        if api.file_exists(repo_id, CARD_FILE, revision=kwargs.get("branch")):
            ignored = kwargs.get("ignore_patterns") or []
            kwargs["ignore_patterns"] = [*([ignored] if isinstance(ignored, str) else ignored), CARD_FILE]
        return super().push_to_hub(repo_id, **kwargs)

    def _tensors(self) -> dict[str, Tensor]:
        """The state dict, if it is what :meth:`from_pretrained` would expect."""
        own = self.state_dict()
        with torch.device("meta"):
            plain = FluxRouters(self.config).state_dict()
        if changed := sorted(plain.keys() ^ own.keys()):
            raise ValueError(
                f"layers of these routers were replaced ({changed[0]} for one), by adapters or a quantisation: "
                "merge or undo them, then save"
            )
        if absent := [name for name, tensor in own.items() if tensor.is_meta]:
            raise ValueError(f"{absent[0]} of these routers is not in memory (device meta): it cannot be saved")
        return own

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        subfolder: str | None = None,
        map_location: str = "cpu",
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> "FluxRouters":
        """Routers from a folder or a Hub repository, also one with a model in it, or a whole published checkpoint.

        Of a Hub repository only the files with routers in them are downloaded.

        Args:
            pretrained_model_name_or_path: folder or repository.
            subfolder: of it.
            map_location: device of the routers.
            revision, cache_dir, token, local_files_only, force_download: see ``huggingface_hub.hf_hub_download``.

        Raises:
            ValueError: there are no routers, they are of a newer version, damaged, do not fit their configuration, or
                are not those that were saved with it.
        """
        hub: dict[str, Any] = {
            "revision": revision,
            "cache_dir": cache_dir,
            "token": token,
            "local_files_only": local_files_only,
            "force_download": force_download,
        }
        place = Place(pretrained_model_name_or_path, subfolder, **hub)
        if (file := place.file(CONFIG_FILE)) is not None:
            return cls._load(place, file, WEIGHTS_FILE, map_location)
        if (file := place.file(MODEL_CONFIG_FILE)) is not None:
            config = files.read_json(file)
            if _is_published(config):
                return cls.load_published(pretrained_model_name_or_path, subfolder=subfolder, **hub).to(map_location)
            if files.is_unversioned(config):
                return cls._load(place, file, MODEL_WEIGHTS_FILE, map_location)
        holds = files.contents(place)
        raise ValueError(f"{place} has no {CONFIG_FILE}: no routers are there; it holds {holds}") from place.unreachable

    @classmethod
    def _load(cls, place: Place, config_file: Path, weights_name: str, device: str) -> "FluxRouters":
        values = files.read_json(config_file)
        save_id = values.pop(files.SAVE_ID, None) if isinstance(values, dict) else None
        config = FluxConfig.from_dict(values, str(config_file))
        try:
            routers = cls(config)
        except ValueError as error:
            raise ValueError(f"{config_file}: {error}") from None
        file = place.needed(weights_name)
        tensors, metadata = files.read_tensors(file)
        routers.load_weights(tensors, str(file))
        files.check_saved_together(config_file, save_id, file, metadata.get(files.SAVE_ID), tensors)
        return routers.to(device).eval()

    def load_weights(self, tensors: Mapping[str, Tensor], name: str = "the state dict") -> None:
        """Copies tensors of exactly this module's names and shapes; ``name`` is what errors call them.

        Raises:
            ValueError: a tensor is missing, superfluous or of another shape; nothing was changed.
        """
        own = self.state_dict()
        if missing := own.keys() - tensors.keys():
            raise ValueError(f"{name} lacks {len(missing)} tensors of these routers, {min(missing)} for one")
        if unknown := tensors.keys() - own.keys():
            raise ValueError(f"{name} has {len(unknown)} tensors these routers lack, {min(unknown)} for one")
        for key, value in own.items():
            if tensors[key].shape != value.shape:
                raise ValueError(
                    f"{key} has shape {list(tensors[key].shape)} in {name}, these routers {list(value.shape)}"
                )
        self.load_state_dict(dict(tensors))

    @classmethod
    def load_published(
        cls,
        source: str | Path | Mapping[str, Tensor],
        config: Mapping[str, Any] | None = None,
        *,
        subfolder: str | None = None,
        **hub: Any,
    ) -> "FluxRouters":
        """The routers inside a whole ``PawLlamaForCausalLM`` or ``PawQwen3ForCausalLM`` checkpoint, bit for bit.

        Args:
            source: a folder (``model.safetensors``, or shards with their index), a Hub repository, or a state
                dict with the published names (``...layers.N.self_attn.mask_allocator...``).
            config: the checkpoint's configuration; default: ``config.json`` of the folder, and the published
                defaults for a state dict.
            subfolder: of the folder or repository.
            hub: keywords of ``huggingface_hub.hf_hub_download``, as for :meth:`from_pretrained`.

        Raises:
            ValueError: no routers in it, or routers, a setting or a sparse mode this package does not have.
        """
        name = "the configuration"
        if isinstance(source, Mapping):
            tensors: Mapping[str, Tensor] = source
        else:
            place = Place(source, subfolder, **hub)
            if config is None:
                name = str(place.needed(MODEL_CONFIG_FILE))
                config = files.read_json(Path(name))
            tensors = _read_router_tensors(place)
        layers = sorted({int(key.split("layers.")[1].split(".")[0]) for key in tensors if _is_router(key)})
        if not layers:
            raise ValueError(f"no tensor of a published router ({PUBLISHED_ENCODER}) in the checkpoint")
        first = next(v for k, v in tensors.items() if _is_router(k) and k.endswith(PUBLISHED_ENCODER + ".0.weight"))
        routers = cls(_published_config(config or {}, layers, first, name))
        for layer, router in zip(layers, routers.layers, strict=True):
            try:
                cast(Router, router).load_published(tensors, layer)
            except KeyError as error:
                raise ValueError(f"the checkpoint's routers are incomplete: {error.args[0]}") from None
        return routers.eval()


def _published_config(config: object, layers: list[int], weight: Tensor, source: str) -> FluxConfig:
    """The published fields in ours; ``weight``, the first one of a router, tells head_dim and granularity."""
    if not isinstance(config, Mapping):
        raise ValueError(f"{source} must hold a JSON object, got {type(config).__name__}")
    hidden, head_dim = weight.shape
    granularity = {8: "layer", 4: "head"}.get(hidden // head_dim)
    if granularity is None:
        raise ValueError(f"a published router of shape {list(weight.shape)} is neither by layer nor by head")

    def mode(field: str, default: str, known: dict[str, str]) -> str:
        published = config.get(field, default)
        if not isinstance(published, str) or published not in known:
            raise ValueError(f"{field} must be one of {tuple(known)}, {source} has {published!r}")
        return known[published]

    def integer(field: str, default: int) -> int:
        return check_integer(field, config.get(field, default), f"{source}: ")

    def in_blocks(tokens: int) -> int:
        return -(-tokens // PUBLISHED_BLOCK) * PUBLISHED_BLOCK

    num_layers = integer("num_hidden_layers", layers[-1] + 1)
    architecture = (config.get("architectures") or [""])[0]
    sparse_modes = {"streaming": "streaming", "triangle": "triangle", "xattn": "block_sparse"}
    pattern = mode("toggle_type", "streaming", sparse_modes)
    fields: dict[str, Any] = {
        "pattern": pattern,
        "full": mode("retrieval_mode", "full", {"full": "full", "xattn": "block_sparse"}),
        "decode": "dense" if pattern == "block_sparse" else "sparse",
        "sink": in_blocks(integer("sink_size", 128)),
        "window": in_blocks(integer("local_window_size", 2048)),
        "align": PUBLISHED_BLOCK,
        "last_q": integer("triangle_n_last", 128),
        "granularity": granularity,
        "pool_size": integer("pool_size", 100),
        "layers_to_route": None if layers == list(range(num_layers)) else layers,
        "num_layers": num_layers,
        "head_dim": head_dim,
        "num_kv_heads": config.get("num_key_value_heads"),
        "model_type": {"PawLlamaForCausalLM": "llama", "PawQwen3ForCausalLM": "qwen3"}.get(architecture),
        "base_model_name_or_path": config.get("_name_or_path"),
    }
    return FluxConfig.from_dict(fields, source)


def _is_published(config: object) -> bool:
    if not isinstance(config, Mapping):
        return False
    return "toggle_type" in config or any(str(a).startswith("Paw") for a in config.get("architectures") or [])


def _is_router(key: str) -> bool:
    return "layers." in key and (f".{PUBLISHED_ENCODER}." in key or f".{PUBLISHED_CLASSIFIER}." in key)


def _read_router_tensors(place: Place) -> dict[str, Tensor]:
    """The routers' tensors of a checkpoint; nothing else of it is read, and no shard without them is fetched."""
    names = [MODEL_WEIGHTS_FILE]
    index = place.file(MODEL_WEIGHTS_FILE + ".index.json")
    if index is not None:
        shards = files.read_json(index)
        shards = shards.get("weight_map") if isinstance(shards, dict) else None
        if not isinstance(shards, dict) or not all(isinstance(f, str) and Path(f).name == f for f in shards.values()):
            raise ValueError(f"{index} must have a weight_map from tensors to names of files beside it")
        names = sorted({file for key, file in shards.items() if _is_router(key)})
    tensors: dict[str, Tensor] = {}
    for name in names:
        tensors |= files.read_tensors(place.needed(name), _is_router)[0]
    return tensors
