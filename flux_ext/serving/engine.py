"""What is changed in vLLM so that it serves with routers, and what it may not be asked for then."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch

from flux_ext_vllm import ROUTERS_VARIABLE

from ..config import FluxConfig
from ..routers.collection import FluxRouters
from .backend import RoutedBackend
from .install import install
from .layers import refuse_modes
from .page_manager import register_pages
from .vllm_seam import (
    BaseModelLoader,
    EngineArgs,
    KVTransferConfig,
    check_installed,
    current_platform,
    init_logger,
    replace_method,
)

ROUTERS = "flux_ext_routers"
"""Entry of the connector's configuration with the routers' folder or repository: so every process knows it."""
SETTINGS = {
    "enable_prefix_caching": (False, "a prompt's pages are given back in the middle and its routes are its own"),
    "enforce_eager": (True, "routes are decided between a layer's operators, which compiled graphs cannot do yet"),
    "disable_hybrid_kv_cache_manager": (False, "layers need page tables of their own"),
    "enable_sleep_mode": (
        False,
        "deep sleep gives up the routers' weights, and reloading brings back the model's alone",
    ),
}
"""Arguments of the engine that are set, and why they may not be the other way."""


PARALLEL = (
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "decode_context_parallel_size",
    "prefill_context_parallel_size",
)
CONNECTOR = "FluxRoutes"


def activate() -> None:
    """Makes the engines of this process serve with the routers that :data:`ROUTERS_VARIABLE` names when they are made;
    without effect the second time.

    Raises:
        ImportError: see :func:`flux_ext.serving.vllm_seam.check_installed`.
    """
    check_installed()
    register_pages()
    replace_method(EngineArgs, "create_engine_config", _with_settings)
    replace_method(BaseModelLoader, "load_model", _with_routers)


def _with_settings(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        routers = os.environ.get(ROUTERS_VARIABLE, "")
        if not routers:
            return original(self, *args, **kwargs)
        settings = prepare(self, routers)
        config = original(self, *args, **kwargs)
        refuse_unsupported(config, settings)
        init_logger("vllm.flux_ext").info("Serving with the routers in %s.", routers)
        return config

    return create_engine_config


def prepare(arguments: Any, routers: str) -> FluxConfig:
    """Sets what routing needs in the arguments of an engine, and returns the routers' settings.

    Raises:
        ValueError: they ask for something that excludes it, or there are no routers of this name.
    """
    for name, (value, why) in SETTINGS.items():
        given = getattr(arguments, name)
        asked = given is not None and given != EngineArgs.__dataclass_fields__[name].default
        if asked and given != value:
            raise ValueError(f"with routers {name} must be {value}, got {given}: {why}")
        setattr(arguments, name, value)
    connector = arguments.kv_transfer_config  # ours, where a configuration is made of the same arguments once more
    if connector is not None and getattr(connector, "kv_connector", None) != CONNECTOR:
        raise ValueError("with routers there is no other KV connector: kv_transfer_config must not be given")
    if arguments.speculative_config is not None:
        raise ValueError("speculative decoding is not supported with routers: speculative_config must not be given")
    settings = FluxRouters.from_pretrained(routers).config  # here too, where an error is seen best
    refuse_modes(settings)
    arguments.kv_transfer_config = KVTransferConfig(
        kv_connector=CONNECTOR,
        kv_connector_module_path="flux_ext.serving.connector",
        kv_role="kv_both",
        kv_connector_extra_config={ROUTERS: routers},
    )
    return settings


def refuse_unsupported(config: Any, settings: FluxConfig) -> None:
    """ValueError where a finished configuration is one that routers, or these ones, were not made for."""
    refuse_platform(current_platform)
    parallel = config.parallel_config
    for name in PARALLEL:
        if (size := getattr(parallel, name)) != 1:
            raise ValueError(f"with routers {name} must be 1, got {size}: a router needs all heads of all layers")
    if (connector := config.kv_transfer_config.kv_connector) != CONNECTOR:
        raise ValueError(f"with routers there is no other KV connector: an argument of the engine asks for {connector}")
    if parallel.use_ubatching:
        raise ValueError("with routers a step is one batch: enable_dbo and ubatch_size must not be given")
    if (dtype := config.cache_config.cache_dtype) not in (taken := RoutedBackend.supported_kv_cache_dtypes):
        raise ValueError(f"with routers kv_cache_dtype must be one of {', '.join(taken)}, got {dtype}")
    if (runner := config.model_config.runner_type) != "generate":
        raise ValueError(f"with routers the model must generate, got runner_type {runner!r}")
    model = config.model_config
    have = {
        "layers": (settings.num_layers, model.get_total_num_hidden_layers()),
        "head_dim": (settings.head_dim, model.get_head_size()),
        "num_kv_heads": (settings.num_kv_heads, model.get_total_num_kv_heads()),
    }
    for name, (theirs, ours) in have.items():
        if theirs not in (None, ours):
            counted = f"{theirs} layers" if name == "layers" else f"{name} {theirs}"
            raise ValueError(f"the routers are of a model with {counted}, this one has {ours}")


def refuse_platform(platform: Any) -> None:
    """ValueError where vLLM runs on a device that this package has no kernels for."""
    if platform.is_cpu():
        return
    if not platform.is_cuda():
        raise ValueError(f"routers are served on CPUs and CUDA GPUs, this vLLM runs on {platform.device_type}")
    if not torch._C._dispatch_has_kernel_for_dispatch_key("flux_ext::attend", "CUDA"):
        raise ValueError("vLLM runs on a GPU, and flux_ext was built without its CUDA kernels: build it where nvcc is")
    init_logger("vllm.flux_ext").warning(
        "Routed attention was tested on GPUs, but not yet inside a vLLM that runs on one (docs/serving.md)."
    )


def _with_routers(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load_model(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        model = original(self, vllm_config, *args, **kwargs)
        channel = vllm_config.kv_transfer_config
        if channel is not None and ROUTERS in channel.kv_connector_extra_config:
            install(model, FluxRouters.from_pretrained(channel.kv_connector_extra_config[ROUTERS]))
        return model

    return load_model
