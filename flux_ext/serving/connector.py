"""Between scheduler and workers: which requests start and end, and which of their layers may give pages back.

A KV connector is the one channel that vLLM lets a plugin have in both directions; no keys or values go through it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .install import routed_layers
from .page_manager import RoutedPagesManager
from .requests import RouteTable
from .vllm_seam import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
    prompt_length,
)


@dataclass
class StepRequests(KVConnectorMetadata):  # type: ignore[misc]
    """To a worker: requests that ended before a step, and those that start with it (name, tokens of the prompt, first
    page in each group); whether no token of the step belongs to a prompt."""

    only_answers: bool
    ended: list[str] = field(default_factory=list)
    begun: list[tuple[str, int, tuple[int, ...]]] = field(default_factory=list)


@dataclass
class SparseLayers(KVConnectorWorkerMetadata):  # type: ignore[misc]
    """To the scheduler: of requests that were routed in a step, per group whether its layer is sparse."""

    sparse: dict[str, tuple[bool, ...]]

    def aggregate(self, other: SparseLayers) -> SparseLayers:
        """Workers that both routed a request would each have some of its layers or heads: none of that is served."""
        raise RuntimeError("routes of one request came from several workers")


class FluxRoutes(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """The connector that :func:`flux_ext.serving.engine.activate` sets."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._prompt_lens: dict[str, int] = {}
        self._sparse: dict[str, tuple[bool, ...]] = {}
        self._layers: list[Any] = []
        if role == KVConnectorRole.WORKER:
            found = routed_layers(vllm_config)
            groups = [group.layer_names for group in kv_cache_config.kv_cache_groups]
            self._num_groups = len(groups)
            for index, names in enumerate(groups):
                for name in names:
                    if name in found:
                        found[name].requests.groups[found[name].index] = index
                        self._layers.append(found[name])
            router = self._layers[0].router
            heads = vllm_config.model_config.get_total_num_kv_heads() if router.per_head else 1
            device = next(router.parameters()).device
            self._requests.table = RouteTable(kv_cache_config.num_blocks, heads, device)

    # --- In the worker.

    @property
    def _requests(self) -> Any:
        return self._layers[0].requests

    def bind_connector_metadata(self, connector_metadata: StepRequests) -> None:
        super().bind_connector_metadata(connector_metadata)
        for name in connector_metadata.ended:
            self._requests.end(name)
        for name, prompt_len, first_pages in connector_metadata.begun:
            self._requests.begin(name, prompt_len, first_pages)
        self._requests.next_step(connector_metadata.only_answers)

    def clear_connector_metadata(self) -> None:
        super().clear_connector_metadata()
        self._requests.end_step()

    def build_connector_worker_meta(self) -> SparseLayers | None:
        decided = self._requests.take_decided()
        if not decided:
            return None
        report = {}
        for request in decided:
            sparse = [False] * self._num_groups
            for layer in self._layers:
                sparse[self._requests.groups[layer.index]] = request.is_sparse(layer.index)
            report[request.name] = tuple(sparse)
        return SparseLayers(report)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None: ...

    def wait_for_layer_load(self, layer_name: str) -> None: ...

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None: ...

    def wait_for_save(self) -> None: ...

    # --- In the scheduler.

    @property
    def requires_kv_delivery(self) -> bool:
        return False

    def bind_kv_cache_manager(self, kv_cache_manager: Any) -> None:
        super().bind_kv_cache_manager(kv_cache_manager)
        for manager in kv_cache_manager.coordinator.single_type_managers:
            if isinstance(manager, RoutedPagesManager):
                manager.sparse = self._sparse

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        return 0, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None: ...

    def build_connector_meta(self, scheduler_output: Any) -> StepRequests:
        cached = scheduler_output.scheduled_cached_reqs
        computed = zip(cached.req_ids, cached.num_computed_tokens, strict=True)
        only_answers = not scheduler_output.scheduled_new_reqs and all(
            tokens >= self._prompt_lens[name] for name, tokens in computed
        )
        step = StepRequests(only_answers, ended=sorted(scheduler_output.finished_req_ids))
        for new in scheduler_output.scheduled_new_reqs:
            self._prompt_lens[new.req_id] = prompt_length(new)
            step.begun.append(self._begun(new.req_id, new.block_ids))
        for name, blocks in zip(cached.req_ids, cached.new_block_ids, strict=True):
            if name in cached.resumed_req_ids:
                step.begun.append(self._begun(name, blocks))
        return step

    def _begun(self, name: str, blocks: Any) -> tuple[str, int, tuple[int, ...]]:
        return name, self._prompt_lens[name], tuple(group[0] for group in blocks)

    def update_connector_output(self, connector_output: Any) -> None:
        report = connector_output.kv_connector_worker_meta
        if report is not None:
            alive = {name: sparse for name, sparse in report.sparse.items() if name in self._prompt_lens}
            self._sparse.update(alive)  # one that was given up meanwhile has no pages any more

    def request_finished_all_groups(self, request: Any, block_ids: Any) -> tuple[bool, None]:
        self._prompt_lens.pop(request.request_id, None)
        self._sparse.pop(request.request_id, None)
        return False, None
