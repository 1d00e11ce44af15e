"""The scheduler's side of a routed layer's pages: which go back to the pool while a request runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..operators.patterns import Streaming
from .visible_pages import hidden
from .vllm_seam import FullAttentionManager, FullAttentionSpec, KVCacheSpecRegistry


class RoutedPagesManager(FullAttentionManager):  # type: ignore[misc]
    """Pages of one layer.

    Attributes:
        sparse: by request id, per group whether its layer is routed sparse; filled by the connector as the worker
            reports it. A request that is not there keeps everything.
    """

    def __init__(self, kv_cache_spec: RoutedPagesSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.pattern = Streaming(kv_cache_spec.sink, kv_cache_spec.window, kv_cache_spec.align)
        self.sparse: Mapping[str, tuple[bool, ...]] = {}

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Gives back what neither the next token nor a later one sees, from the end of the prompt on.

        ``processed_computed_tokens`` leaves out steps that still run: their attention may see more.
        """
        if num_prompt_tokens is None or processed_computed_tokens < num_prompt_tokens:
            return
        sparse = self.sparse.get(request_id)
        if sparse is None or not sparse[self.kv_cache_group_id]:
            return
        first, last = hidden(self.pattern, processed_computed_tokens, self.block_size)
        self._remove_blocks_in_range(request_id, first, last)


@dataclass(frozen=True, kw_only=True)
class RoutedPagesSpec(FullAttentionSpec):  # type: ignore[misc]
    """Pages of one layer with full attention: a group of its own, so that it can give back pages that others keep."""

    layer_index: int
    sink: int
    window: int
    align: int

    @classmethod
    def of(cls, spec: Any, layer_index: int, pattern: Streaming) -> RoutedPagesSpec:
        """From the stock one of the layer."""
        stock = {f.name: getattr(spec, f.name) for f in fields(spec) if f.init}
        return cls(**stock, layer_index=layer_index, sink=pattern.sink, window=pattern.window, align=pattern.align)

    @classmethod
    def merge(cls, specs: list[Any]) -> Any:
        """One layer per group: specs merge with themselves alone (vLLM takes AssertionError as no)."""
        if any(spec != specs[0] for spec in specs):
            raise AssertionError("layers that are routed apart have page tables of their own")
        return specs[0]

    def is_uniform_with_collection(self, kv_cache_specs: Mapping[str, Any]) -> bool:
        return all(spec == self for spec in kv_cache_specs.values())


def register_pages() -> None:
    """Makes the spec and its manager known to vLLM."""
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(RoutedPagesSpec, RoutedPagesManager)
