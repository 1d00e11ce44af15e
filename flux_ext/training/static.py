"""Allocations that do not look at the input, to compare routers with: which layers, or which heads, stay full for all.

Layers are found by greedy search: the layer that costs least is made sparse, then the next one beside it, and so on.
Heads are found in DuoAttention's manner (arXiv 2410.10819): each KV head mixes its full and its sparse output by a gate
of its own; the gates learn to keep the last hidden states what they are with everything full, against a penalty on
their sum. Those with the largest gates stay full.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from ..models import patching
from ..operators.patterns import Streaming
from ..transformers_seam import KEEP_LOGITS, AttentionInterface, AttentionMaskInterface
from .backbone import PatchedModel
from .data import IGNORED

GATED = "flux_ext_gated"
"""The name under which transformers finds the gated attention."""


def greedy_passes(num_layers: int) -> float:
    """How many forward passes of one sequence :func:`greedy_layers` takes: those of a candidate start at its layer."""
    rounds = range(num_layers, 0, -1)
    return sum(1 + left * (num_layers + 1) / (2 * num_layers) for left in rounds)


def greedy_layers(
    model: nn.Module, batches: Sequence[Mapping[str, Any]], progress: Callable[[], object] = lambda: None
) -> list[int]:
    """The routed layers in the order in which greedy search makes them sparse: those whose loss is the smallest, given
    the ones before.

    Args:
        model: a patched model, in evaluation mode.
        batches: of :class:`~.data.PaddedCollator` or :class:`~.data.PackedCollator`, on the model's device; all of them
            are asked for every candidate.
        progress: called after each layer.
    """
    config = patching.get_routers(model).config
    index = config.routed_layers()
    count = len(index)
    sparse: list[int] = []
    while len(sparse) < count:
        left = [layer for layer in range(count) if layer not in sparse]
        total = torch.zeros(count, dtype=torch.float64)
        for batch in batches:
            routed = PatchedModel(model, batch, count, layers=index)
            rows = torch.arange(len(batch["task_ids"]), device=batch["task_ids"].device)
            with torch.no_grad():
                routed.loss(_chosen(sparse), dict.fromkeys(left, rows))
                for layer in left:
                    total[layer] += float(routed.loss_again(_chosen([*sparse, layer]), layer, rows).sum())
        sparse.append(min(left, key=lambda layer: float(total[layer])))
        progress()
    return sparse


def _chosen(sparse: Sequence[int]) -> Callable[[int, Tensor], Tensor]:
    """The policy that makes these layers sparse and no others."""
    return lambda layer, logits: torch.full_like(logits[..., 0], float(layer in sparse), dtype=torch.int32)


def layer_routes(order: Sequence[int], sparsity: float, num_heads: int) -> Tensor:
    """The first of the layers, in the order of :func:`greedy_layers`, sparse: int32 ``[L, Hkv]``, 1 sparse."""
    routes = torch.zeros(len(order), num_heads, dtype=torch.int32)
    routes[list(order[: round(sparsity * len(order))])] = 1
    return routes


def head_routes(gates: Tensor, sparsity: float) -> Tensor:
    """The heads with the smallest ``gates`` ``[L, Hkv]`` sparse: int32 ``[L, Hkv]``, 1 sparse."""
    routes = torch.zeros(gates.numel(), dtype=torch.int32)
    routes[gates.flatten().argsort()[: round(sparsity * gates.numel())]] = 1
    return routes.view_as(gates)


def fixed(routes: Tensor) -> Callable[[int, Tensor], Tensor]:
    """The policy that gives every input these ``routes`` ``[L, Hkv]``."""
    return lambda layer, logits: routes[layer].to(logits.device).expand(len(logits), -1)


def distilled_gates(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Any]],
    pattern: Streaming,
    *,
    learning_rate: float = 0.02,
    penalty: float = 0.05,
    steps: int | None = None,
    progress: Callable[[], object] = lambda: None,
) -> Tensor:
    """Gates of all KV heads, fp32 ``[L, Hkv]`` in [0, 1]: 1 where full attention is needed.

    Attention runs in plain PyTorch, which has a gradient on every device; so the model must not be patched.

    Args:
        model: a stock model all of whose layers have full attention; frozen, its parameters get no gradient.
        batches: one step each: batches of a single sequence or of several of one length, without a mask, of
            :class:`~.data.PaddedCollator`. The hidden states behind the answer's tokens are compared.
        pattern: what sparse heads see.
        learning_rate, penalty: of AdamW, and of the mean gate; the published ones.
        steps: of the learning rate's schedule, up over the first fifth, down over the last; None: it is constant.
        progress: called after each step.

    Raises:
        ValueError: the model is patched, or a layer has a sliding window of its own.
    """
    if patching.is_patched(model):
        raise ValueError("model must not be patched: gates are learned in plain PyTorch, call flux_ext.unpatch first")
    config = model.config
    shape = (config.num_hidden_layers, config.num_key_value_heads)
    gates = nn.Parameter(torch.ones(shape, device=model.device))
    optimizer = torch.optim.AdamW([gates], lr=learning_rate, weight_decay=0.0)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with _gated(model, pattern) as use:
        for step, batch in enumerate(batches):
            columns = (batch["labels"][:, 1:] != IGNORED).any(0).nonzero()[:, 0]  # what predicts the answer
            with torch.no_grad(), use(None):
                wanted = _hidden(model, batch, columns)
            with use(gates):
                found = _hidden(model, batch, columns)
            loss = (found.float() - wanted.float()).square().mean() + penalty * gates.abs().mean()
            loss.backward()
            if steps is not None:
                warm = max(1, steps // 5)
                optimizer.param_groups[0]["lr"] = learning_rate * min(1.0, (step + 1) / warm, (steps - step) / warm)
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                gates.clamp_(0, 1)
            progress()
    return gates.detach()


def _hidden(model: PreTrainedModel, batch: Mapping[str, Any], columns: Tensor) -> Tensor:
    """What goes into the model's head at these columns, ``[B, len(columns), width]``."""
    seen: list[Tensor] = []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        model(input_ids=batch["input_ids"], use_cache=False, **{KEEP_LOGITS: columns})
    finally:
        handle.remove()
    return seen[0]


@contextlib.contextmanager
def _gated(model: PreTrainedModel, pattern: Streaming) -> Iterator[Any]:
    """Lets the model's attention be the mixture, within a ``with`` block; gives ``use(gates or None)``."""
    current: list[Tensor | None] = [None]
    masks: dict[int, Tensor] = {}

    @contextlib.contextmanager
    def use(value: Tensor | None) -> Iterator[None]:
        current[0] = value
        try:
            yield
        finally:
            current[0] = None

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        if sliding_window is not None:
            raise ValueError(f"the model must have full attention in all layers, {module} has a sliding window")
        group, length = query.shape[1] // key.shape[1], query.shape[2]
        key, value = (x.repeat_interleave(group, 1) for x in (key, value))
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
        weights = current[0]
        if weights is not None:
            if length not in masks:
                masks.clear()
                masks[length] = streaming_mask(length, pattern, query.device)
            near = F.scaled_dot_product_attention(query, key, value, masks[length], scale=scaling)
            w = weights[module.layer_idx].to(query.dtype).repeat_interleave(group)[:, None, None]  # type: ignore[index]
            out = w * out + (1 - w) * near
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register(GATED, attention)
    AttentionMaskInterface.register(GATED, lambda *_, **__: None)
    before = model.config._attn_implementation
    model.set_attn_implementation(GATED)
    # Not cuDNN, which plans anew for every length: batches seldom have that of the one before.
    backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    try:
        with sdpa_kernel(backends):
            yield use
    finally:
        model.set_attn_implementation(before)


def streaming_mask(length: int, pattern: Streaming, device: torch.device) -> Tensor:
    """Which keys the queries of a sequence see, bool ``[length, length]``."""
    place = torch.arange(length, device=device)
    begin = pattern.window_begin(place)[:, None]
    return (place <= place[:, None]) & ((place < pattern.sink) | (place >= begin))
