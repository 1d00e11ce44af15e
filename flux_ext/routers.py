"""All routers of one model as one module: saved, loaded and published apart from the backbone."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors
from huggingface_hub import PyTorchModelHubMixin, hf_hub_download, snapshot_download
from huggingface_hub.constants import SAFETENSORS_SINGLE_FILE
from safetensors.torch import load_file
from torch import Tensor, nn

from .config import FluxConfig
from .router import PUBLISHED_CLASSIFIER, PUBLISHED_ENCODER, HeadRouter, LayerRouter

# No `from __future__ import annotations` here: the Hub mixin reads the annotation of `config` as a type.

PUBLISHED_BLOCK = 128
"""The published code rounds sink and window up to blocks of 128 keys and aligns the window to them."""


class FluxRouters(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="flux-ext",
    tags=["flux-ext", "sparse-attention"],
):
    """One :class:`~flux_ext.router.LayerRouter` or :class:`~flux_ext.router.HeadRouter` per routed layer.

    ``save_pretrained``, ``from_pretrained`` and ``push_to_hub`` are the Hugging Face Hub's; the weights are one
    safetensors file and ``config.json`` is the :class:`~flux_ext.FluxConfig`.

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

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> str | None:
        """Writes ``config.json`` and ``model.safetensors``; see the Hub's ``save_pretrained``."""
        kwargs.setdefault("config", asdict(self.config))
        return super().save_pretrained(save_directory, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> "FluxRouters":
        """Routers from a folder or a Hub repository, also a whole published checkpoint.

        Raises:
            ValueError: the folder has no configuration, or its weights are damaged or do not fit it.
        """
        folder = Path(pretrained_model_name_or_path)
        if folder.is_dir():
            if not (folder / "config.json").is_file():
                raise ValueError(f"{folder} has no config.json: not a folder of saved routers")
            if _is_published(_read_json(folder / "config.json")):
                return cls.load_published(folder)
        elif os.path.exists(folder) or folder.is_absolute():
            raise ValueError(f"{folder} is not a folder of saved routers")
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def _from_pretrained(  # type: ignore[override]
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        map_location: str = "cpu",
        strict: bool = True,
        **model_kwargs: Any,
    ) -> "FluxRouters":
        if not isinstance(model_kwargs.get("config"), FluxConfig):
            raise ValueError(f"{model_id} has no usable config.json: not a repository of saved routers")
        if os.path.isdir(model_id):
            file = os.path.join(model_id, SAFETENSORS_SINGLE_FILE)
        else:
            file = hf_hub_download(
                model_id,
                SAFETENSORS_SINGLE_FILE,
                revision=revision,
                cache_dir=cache_dir,
                force_download=force_download,
                local_files_only=local_files_only,
                token=token,
            )
        routers = cls(**model_kwargs)
        routers.load_weights(_read_safetensors(file, map_location), file)
        return routers.eval()

    def load_weights(self, tensors: Mapping[str, Tensor], name: str = "the state dict") -> None:
        """Copies tensors of exactly this module's names and shapes.

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
        cls, source: str | Path | Mapping[str, Tensor], config: Mapping[str, Any] | None = None
    ) -> "FluxRouters":
        """The routers inside a whole ``PawLlamaForCausalLM`` or ``PawQwen3ForCausalLM`` checkpoint, bit for bit.

        Args:
            source: a folder (``model.safetensors``, or shards with their index), a Hub repository, or a state
                dict with the published names (``...layers.N.self_attn.mask_allocator...``).
            config: the checkpoint's configuration; default: ``config.json`` of the folder, and the published
                defaults for a state dict.

        Raises:
            ValueError: no routers in it, or routers or a sparse mode this package does not have.
        """
        if isinstance(source, Mapping):
            tensors: Mapping[str, Tensor] = source
        else:
            folder = Path(source)
            if not folder.is_dir():
                folder = Path(snapshot_download(str(source), allow_patterns=["config.json", "*.safetensors*"]))
            tensors = _read_router_tensors(folder)
            config = _read_json(folder / "config.json") if config is None else config
        layers = sorted({int(key.split("layers.")[1].split(".")[0]) for key in tensors if _is_router(key)})
        if not layers:
            raise ValueError(f"no tensor of a published router ({PUBLISHED_ENCODER}) in the checkpoint")
        first = next(v for k, v in tensors.items() if _is_router(k) and k.endswith(PUBLISHED_ENCODER + ".0.weight"))
        routers = cls(_published_config(config or {}, layers, first))
        for layer, router in zip(layers, routers.layers, strict=True):
            try:
                router.load_published(tensors, layer)  # type: ignore[operator]
            except KeyError as error:
                raise ValueError(f"the checkpoint's routers are incomplete: {error.args[0]}") from None
        return routers.eval()


def _published_config(config: Mapping[str, Any], layers: list[int], weight: Tensor) -> FluxConfig:
    """The published fields in ours; ``weight``, the first one of a router, tells head_dim and granularity."""
    hidden, head_dim = weight.shape
    granularity = {8: "layer", 4: "head"}.get(hidden // head_dim)
    if granularity is None:
        raise ValueError(f"a published router of shape {list(weight.shape)} is neither by layer nor by head")
    pattern = config.get("toggle_type", "streaming")
    if pattern not in ("streaming", "triangle"):
        raise ValueError(f'toggle_type must be "streaming" or "triangle", the checkpoint has {pattern!r}')
    if (retrieval := config.get("retrieval_mode", "full")) != "full":
        raise ValueError(f'retrieval_mode must be "full", the checkpoint has {retrieval!r}')

    def in_blocks(tokens: int) -> int:
        return -(-int(tokens) // PUBLISHED_BLOCK) * PUBLISHED_BLOCK

    num_layers = config.get("num_hidden_layers", layers[-1] + 1)
    architecture = (config.get("architectures") or [""])[0]
    return FluxConfig(
        pattern=pattern,
        sink=in_blocks(config.get("sink_size", 128)),
        window=in_blocks(config.get("local_window_size", 2048)),
        align=PUBLISHED_BLOCK,
        last_q=int(config.get("triangle_n_last", 128)),
        granularity=granularity,
        pool_size=int(config.get("pool_size", 100)),
        layers_to_route=None if layers == list(range(num_layers)) else layers,
        num_layers=num_layers,
        head_dim=head_dim,
        num_kv_heads=config.get("num_key_value_heads"),
        model_type={"PawLlamaForCausalLM": "llama", "PawQwen3ForCausalLM": "qwen3"}.get(architecture),
        base_model_name_or_path=config.get("_name_or_path"),
    )


def _is_published(config: Mapping[str, Any]) -> bool:
    return "toggle_type" in config or any(a.startswith("Paw") for a in config.get("architectures") or [])


def _is_router(key: str) -> bool:
    return "layers." in key and (f".{PUBLISHED_ENCODER}." in key or f".{PUBLISHED_CLASSIFIER}." in key)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from None


def _read_safetensors(file: str | Path, device: str = "cpu") -> dict[str, Tensor]:
    try:
        return load_file(file, device=device)
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{file} is missing, truncated or damaged: {error}") from None


def _read_router_tensors(folder: Path) -> dict[str, Tensor]:
    """The routers' tensors of a checkpoint folder, nothing else of it is read."""
    index = folder / (SAFETENSORS_SINGLE_FILE + ".index.json")
    if index.is_file():
        names = sorted({f for key, f in _read_json(index)["weight_map"].items() if _is_router(key)})
    else:
        names = [SAFETENSORS_SINGLE_FILE]
    tensors: dict[str, Tensor] = {}
    for name in names:
        try:
            with safetensors.safe_open(folder / name, framework="pt") as file:
                tensors |= {key: file.get_tensor(key) for key in file.keys() if _is_router(key)}  # noqa: SIM118
        except (OSError, safetensors.SafetensorError) as error:
            raise ValueError(f"{folder / name} is missing, truncated or damaged: {error}") from None
    return tensors
