"""What this package takes from transformers: the one room that knows its names, and how releases differ in them.

Everything private, and everything public that a release has renamed before, stands here, with what is done where it
is absent. What is needed and absent is an ImportError, when ``flux_ext.patch`` is first used or when it is called,
that names the installed version and those tried: nothing that a patch replaces or looks for fails open.

Names of modules, arguments and layers that one model family has and another has not are in
:mod:`flux_ext.models.families`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, MutableMapping
from typing import Any

import torch
import transformers
from torch import nn

TRIED = ("5.17.0", "5.19.0", "5.20.2", "5.23.0", "5.24.0")
"""Releases of transformers that the tests have passed with."""


def missing(what: str) -> ImportError:
    """The error for something that the installed transformers does not have."""
    return ImportError(
        f"transformers {transformers.__version__} is installed and lacks what flux_ext needs, {what}: "
        f"install one of the versions that were tried, {', '.join(TRIED)}"
    )


try:
    from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer
    from transformers.configuration_utils import PreTrainedConfig
    from transformers.generation.configuration_utils import GenerationConfig
    from transformers.generation.utils import GenerationMixin
    from transformers.integrations.flash_attention import flash_attention_forward
    from transformers.integrations.flex_attention import flex_attention_forward
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import (
        LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING,
        AttentionMaskInterface,
        causal_mask_function,
        create_causal_mask,
        create_masks_for_generate,
        or_masks,
    )
    from transformers.modeling_layers import GradientCheckpointingLayer
    from transformers.modeling_utils import AttentionInterface, PreTrainedModel
except ImportError as error:
    raise missing(str(error)) from error

__all__ = [
    "AttentionInterface",
    "AttentionMaskInterface",
    "Cache",
    "CacheLayerMixin",
    "DynamicCache",
    "DynamicLayer",
    "PreTrainedModel",
]

# --- The cache. 5.24 renamed it: the argument `past_key_values` of models, decoders and attention modules, and the
# field of their outputs, is `cache`. Modules outside transformers may still use the old name.

CACHE_NAMES = ("cache", "past_key_values", "layer_past")
"""The last one is only of some families' attention modules (GPT-NeoX)."""


def cache_name(function: Callable[..., Any]) -> str:
    """The keyword under which a function takes its cache.

    Raises:
        ValueError: it takes none.
    """
    parameters = inspect.signature(function).parameters
    for name in CACHE_NAMES:
        if name in parameters:
            return name
    raise ValueError(f"{function.__qualname__} takes no cache: it has no parameter {' or '.join(CACHE_NAMES)}")


try:
    CACHE = cache_name(create_causal_mask)
    """The keyword of the installed transformers: its models and ``generate`` take a cache by this name."""
except ValueError as error:
    raise missing(str(error)) from None


def cache_of(x: Any) -> Any:
    """The cache in a model's or generate's output, or among keyword arguments; None where there is none."""
    for name in CACHE_NAMES:
        if name in x and x[name] is not None:
            return x[name]
    return None


def take_cache(kwargs: MutableMapping[str, Any]) -> Any:
    """As :func:`cache_of`, and removes it from the keyword arguments."""
    cache = cache_of(kwargs)
    for name in CACHE_NAMES:
        kwargs.pop(name, None)
    return cache


# --- The attention function. What stock ones take by name is what models may ask for.

ATTENTION_TERMS = ("softcap", "s_aux", "position_bias", "dropout")
"""Keywords that change the scores in ways the kernels do not compute; ``attention_function.py`` refuses them."""
ATTENTION_KEYWORDS = ("scaling", "sliding_window", "is_causal", *ATTENTION_TERMS)
"""Keywords that an attention function is called with, beside the module, the states and the mask."""
_GIVEN = {"module", "query", "key", "value", "attention_mask", "kwargs"}
_taken = {
    name
    for stock in (sdpa_attention_forward, flash_attention_forward, flex_attention_forward)
    for name in inspect.signature(stock).parameters
}
UNKNOWN_KEYWORDS = tuple(sorted(_taken - _GIVEN - set(ATTENTION_KEYWORDS)))
"""Keywords of a newer release, and the paged cache of continuous batching: refused where a model gives them."""


# --- The mask function.

FULL_MASK = "full_attention"
"""The type of the layers that are routed, under which ``generate`` hands over their mask."""


def attends_ahead(mask_function: Any) -> bool:
    """Whether a mask function is a union: something beside the causal mask, as images that see all of themselves.

    While compiling only the outermost function is looked at: torch.compile cannot read closures.
    """
    code = getattr(mask_function, "__code__", None)
    if code is or_masks(causal_mask_function, causal_mask_function).__code__:
        return True
    if torch.compiler.is_compiling():
        return False
    cells = [cell.cell_contents for cell in getattr(mask_function, "__closure__", None) or ()]
    inner = [f for x in cells for f in (x if isinstance(x, tuple) else (x,)) if inspect.isfunction(f)]
    return any(attends_ahead(f) for f in inner)


# --- Activation checkpointing, `gradient_checkpointing` before 5.24; the layers' attributes kept their names.


def checkpointing(decoder: Any) -> list[Any]:
    """The functions with which a decoder's layers recompute themselves in backward; none where they do not."""
    functions = []
    for layer in (decoder, *decoder.layers):
        if getattr(layer, "gradient_checkpointing", False):
            if not hasattr(layer, "_gradient_checkpointing_func"):
                raise missing("_gradient_checkpointing_func on a checkpointed layer")
            functions.append(layer._gradient_checkpointing_func)
    return functions


def reentrant_checkpointing(decoder: Any) -> bool:
    """Whether some layer recomputes itself the reentrant way, in which routers get no gradient."""
    return any(getattr(f, "keywords", {}).get("use_reentrant", True) for f in checkpointing(decoder))


# --- What patch replaces on a model, and what it reads.

REPLACED = {  # methods of GenerationMixin and the arguments that the replacement looks for
    "_prepare_cache_for_generation": ("generation_config", "model_kwargs", "max_cache_length"),
    "_get_candidate_generator": ("input_ids", "model_kwargs"),
    "generate_batch": (),
    "init_continuous_batching": (),
    "continuous_batching_context_manager": (),
}
NEEDED: list[tuple[Any, tuple[str, ...]]] = [  # what is looked for by name only when a model is patched or runs
    (PreTrainedModel, ("base_model", "get_decoder", "set_attn_implementation", "_keys_to_ignore_on_save")),
    (PreTrainedConfig, ("get_text_config", "_attn_implementation")),
    (GradientCheckpointingLayer, ("gradient_checkpointing",)),
    (Cache, ("is_compileable", "get_seq_length")),
]
GENERATION_SETTINGS = ("use_cache", "cache_implementation", "prefill_chunk_size", "is_assistant")


def check_installed() -> None:
    """That everything of :data:`NEEDED` and every keyword is there.

    Raises:
        ImportError: something is not.
    """
    for name in ATTENTION_KEYWORDS:
        if name not in _taken:
            raise missing(f"keyword {name} of attention functions")
    for owner, names in (*NEEDED, (GenerationConfig(), GENERATION_SETTINGS)):
        for name in names:
            if not hasattr(owner, name):
                raise missing(f"{owner.__name__ if isinstance(owner, type) else type(owner).__name__}.{name}")
    if FULL_MASK not in LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING:
        raise missing(f"mask of layers of the type {FULL_MASK}")
    if "gradient_checkpointing_func" not in inspect.signature(PreTrainedModel._set_gradient_checkpointing).parameters:
        raise missing("argument gradient_checkpointing_func of PreTrainedModel._set_gradient_checkpointing")


def replaceable(model: Any) -> list[str]:
    """The methods of ``generate`` that a patch must replace on a model; none on a model that does not generate.

    Raises:
        ImportError: one of them is gone or takes other arguments.
    """
    if not isinstance(model, GenerationMixin):
        return []
    for name, arguments in REPLACED.items():
        if not hasattr(model, name):
            raise missing(f"method {name} of {type(model).__name__}")
        parameters = inspect.signature(getattr(GenerationMixin, name)).parameters
        for argument in arguments:
            if argument not in parameters:
                raise missing(f"argument {argument} of {name}")
    return list(REPLACED)


def arguments_of(model: Any, method: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The arguments of a call to one of the replaced methods, by name."""
    return dict(inspect.signature(getattr(GenerationMixin, method)).bind(model, *args, **kwargs).arguments)


def masks_for_generate(model: Any) -> Callable[..., Any]:
    """With what ``generate`` makes the masks of a compiled step: the model's class's own, or transformers'."""
    own = inspect.getattr_static(type(model), "create_masks_for_generate", None)
    bound: Callable[..., Any] = create_masks_for_generate if own is None else own.__get__(model)
    return bound


def setting(config: Any, name: str) -> Any:
    """A field of a configuration, None where it has none; of one that differs among layers, some layer's."""
    try:
        return getattr(config, name, None)
    except Exception:  # the error of heterogeneous configurations, of another name in every release
        return next((x for c in config.per_layer_config if (x := getattr(c, name, None))), None)


# --- Logits of some columns only.

KEEP_LOGITS = "logits_to_keep"
"""The keyword with which a model makes logits of its last columns (a number), or of some (their indices)."""


def kept_logits(model: nn.Module, output: Any, count: int) -> torch.Tensor:
    """The logits ``[B, count, V]`` of a forward that was given :data:`KEEP_LOGITS`.

    Raises:
        ValueError: they are of other columns: this model's forward has no such keyword.
    """
    logits: torch.Tensor = output.logits
    if logits.shape[1] != count:
        raise ValueError(
            f"{type(model).__name__} must take {KEEP_LOGITS}: asked for the logits of {count} columns it gave "
            f"{logits.shape[1]}"
        )
    return logits


# --- The Trainer.

TRAINER_METHODS = {  # those that ours overrides or calls, and the arguments that it relies on
    "train": ("resume_from_checkpoint",),
    "evaluate": (),
    "compute_loss": ("model", "inputs", "return_outputs", "num_items_in_batch"),
    "training_step": ("model", "inputs"),
    "prediction_step": ("model", "inputs"),
    "create_optimizer": ("model",),
    "get_optimizer_cls_and_kwargs": ("args",),
    "log": ("logs",),
    "_prepare_inputs": ("inputs",),
    "_save": ("output_dir", "state_dict"),
    "_save_checkpoint": ("model", "trial"),
    "_save_rng_state": ("output_dir",),
    "_get_output_dir": ("trial",),
    "_load_from_checkpoint": ("resume_from_checkpoint", "model"),
    "_load_best_model": (),
}
TRAINER_FIELDS = (
    "can_return_loss",
    "is_deepspeed_enabled",
    "is_fsdp_enabled",
    "model_accepts_loss_kwargs",
    "optimizer_cls_and_kwargs",
)
"""What a Trainer sets on itself, and ours reads or sets."""


def check_trainer(trainer: type) -> None:
    """That transformers' ``Trainer`` (which imports much, so it is given) has all that ours overrides or calls.

    Raises:
        ImportError: something is gone or takes other arguments: ours would no longer be called.
    """
    for name, arguments in TRAINER_METHODS.items():
        if not hasattr(trainer, name):
            raise missing(f"method {name} of Trainer")
        parameters = inspect.signature(getattr(trainer, name)).parameters
        for argument in arguments:
            if argument not in parameters:
                raise missing(f"argument {argument} of Trainer.{name}")
    own = [cls for cls in trainer.__mro__ if cls.__module__.split(".")[0] == "transformers"]
    try:
        code = "".join(map(inspect.getsource, own))
    except OSError:  # installed without its source
        return
    for name in TRAINER_FIELDS:
        if f"self.{name}" not in code:
            raise missing(f"field {name} of Trainer")


# --- Where weights are. Tensor parallelism is transformers' own, offloading is accelerate's.


def tensor_parallel_size(model: Any) -> int:
    """Over how many processes a model's weights are cut; 1: whole."""
    return getattr(model, "_tp_size", None) or 1


def sharded_at_load(model: Any) -> bool:
    """Whether ``from_pretrained(distributed_config=...)`` has cut a model's weights up over the processes."""
    return bool(getattr(model, "is_distributed_loading_by_transformers", False))


def offloaded_to(module: nn.Module) -> list[Any]:
    """The devices that accelerate brings a module's weights to when it runs."""
    hooks: list[Any] = [getattr(m, "_hf_hook", None) for m in module.modules()]
    return [place for h in hooks if (place := getattr(h, "execution_device", None)) is not None]
