"""Attention of the routed layers in vLLM, in the place of its own: by this package's operators, over vLLM's pages.

It derives from what vLLM's backends for any device have in common, so it is the same on CPUs and GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .pages import pages_of, store
from .vllm_seam import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    MultipleOf,
)

ROUTED = "flux_ext_layer"
"""Where an attention layer of vLLM holds its :class:`flux_ext.serving.install.Tap`."""


class RoutedImplementation(AttentionImpl):  # type: ignore[misc]
    """Attention of one layer; vLLM stores a step's keys and values by :meth:`do_kv_cache_update` before it."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        """As vLLM calls it.

        Raises:
            ValueError: attention that is more than scaled, causal and over all earlier keys of the layer.
        """
        asked = {
            "ALiBi slopes": alibi_slopes is not None,
            "a sliding window": sliding_window is not None,
            f"keys and values in {kv_cache_dtype}": kv_cache_dtype not in RoutedBackend.supported_kv_cache_dtypes,
            "soft-capped scores": bool(logits_soft_cap),
            f"{attn_type} attention": attn_type != AttentionType.DECODER,
            "another layer's keys and values": kv_sharing_target_layer_name is not None,
            "learned sinks": sinks is not None,
        }
        for what, wanted in asked.items():
            if wanted:
                raise ValueError(f"attention with {what} cannot be routed")
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.kv_cache_dtype = kv_cache_dtype

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Stores ``key`` and ``value``, ``[T, Hkv, D]``, of which rows beyond ``slot_mapping`` are padding."""
        store(key[: len(slot_mapping)], value[: len(slot_mapping)], *pages_of(kv_cache), slot_mapping)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: RoutedMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Fills ``output``, ``[T, Hq, D]``; zeros in a rehearsal without metadata.

        Args:
            kv_cache: ``[pages, Hkv, page_size, 2 * D]`` in any of vLLM's layouts (:func:`pages_of`).
        """
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("routed attention does not quantise its output")
        if attn_metadata is None:
            return output.zero_()
        tap, tokens = getattr(layer, ROUTED), attn_metadata.num_actual_tokens
        k_pages, v_pages = pages_of(kv_cache)
        step = tap.step(attn_metadata)
        page_table = attn_metadata.block_table[
            : len(attn_metadata.seq_lens), : -(-attn_metadata.max_seq_len // k_pages.shape[1])
        ]
        output[:tokens] = tap.routed.attend(query[:tokens], k_pages, v_pages, page_table, step, self.scale)
        return output


@dataclass
class RoutedMetadata(AttentionMetadata):  # type: ignore[misc]
    """What a layer is told of a step, as vLLM's own backends name it.

    Attributes:
        num_actual_tokens: rows of the step that are not padding.
        max_query_len, max_seq_len: the most tokens that it computes of a request, and the most that one has.
        query_start_loc: int32 ``[B + 1]``.
        seq_lens: int32 ``[B]``.
        block_table: int32 ``[>= B, max_pages]``, of the layer's group.
        slot_mapping: int64 ``[T]``.
    """

    num_actual_tokens: int
    max_query_len: int
    query_start_loc: Tensor
    max_seq_len: int
    seq_lens: Tensor
    block_table: Tensor
    slot_mapping: Tensor


class RoutedMetadataBuilder(AttentionMetadataBuilder):  # type: ignore[misc]
    """Hands on what a step's layers share: nothing is worked out here.

    Its CUDA graphs: none. A step of answers could be replayed, it reads nothing back. But vLLM's runner replays the
    graph of such a step also where the last token of a prompt comes alone, and there the routers have to decide.
    """

    _cudagraph_support = AttentionCGSupport.NEVER

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> RoutedMetadata:
        """Raises RuntimeError where a step's tokens shall see later ones."""
        if common_attn_metadata.causal is not True:
            raise RuntimeError(f"routed attention is causal, {self.layer_names[0]} was asked for another one")
        return RoutedMetadata(
            num_actual_tokens=common_attn_metadata.num_actual_tokens,
            max_query_len=common_attn_metadata.max_query_len,
            query_start_loc=common_attn_metadata.query_start_loc,
            max_seq_len=common_attn_metadata.max_seq_len,
            seq_lens=common_attn_metadata.seq_lens,
            block_table=common_attn_metadata.block_table_tensor,
            slot_mapping=common_attn_metadata.slot_mapping,
        )


class RoutedBackend(AttentionBackend):  # type: ignore[misc]
    """What vLLM asks of the backend of a routed layer. It takes pages in every layout (:func:`pages_of`)."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]  # fp32: on CPUs
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", "float16", "bfloat16"]
    forward_includes_kv_cache_update = False

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"  # of those that vLLM knows

    @staticmethod
    def get_impl_cls() -> type[RoutedImplementation]:
        return RoutedImplementation

    @staticmethod
    def get_builder_cls() -> type[RoutedMetadataBuilder]:
        return RoutedMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        """Tokens of a page. Of others the Hopper kernels leave calls to slower ones."""
        return [MultipleOf(8)]

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        """What vLLM takes where it is not told a size: the Hopper kernels load whole blocks of 64 keys, and a prompt in
        pages of 16 takes 1.4 times as long (benchmarks/results/serving-steps-h200.txt)."""
        return default_block_size if default_block_size % 64 == 0 else 64

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return 8 <= head_size <= 256 and head_size % 8 == 0

    @classmethod
    def supports_compute_capability(cls, capability: Any) -> bool:
        return (capability.major, capability.minor) >= (8, 0)
