"""A vLLM engine inside a test's own process, what can be seen of its scheduler, and a model that says what is right."""

import contextlib
import gc
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from flux_ext import FluxConfig, FluxRouters
from flux_ext.operators.patterns import dense_mask
from flux_ext_vllm import ROUTERS_VARIABLE

VOCABULARY, LAYERS, PAGE = 512, 4, 32


def make_model(folder: Path) -> Path:
    """A tiny Llama with random weights, large enough that sparse attention changes its answers, and a tokenizer."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        num_hidden_layers=LAYERS,
        head_dim=32,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=2,
        **sizes,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                weight.mul_(6 if name.endswith(("q_proj.weight", "k_proj.weight")) else 3)
    model.save_pretrained(folder)
    special = {"<unk>": 0, "<s>": 1, "</s>": 2}
    tokenizer = Tokenizer(WordLevel(special | {f"t{i}": i for i in range(3, VOCABULARY)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    wrapped.save_pretrained(folder)
    return folder


def make_routers(folder: Path, routes: str | None = None, **fields: Any) -> Path:
    """Routers whose routes differ among prompts, or the given ones for all, one of "0" and "1" per layer."""
    torch.manual_seed(1)
    settings = {"sink": 32, "window": 64, "pool_size": 20, "num_layers": LAYERS, "head_dim": 32, "num_kv_heads": 2}
    routers = FluxRouters(FluxConfig(**{**settings, **fields}))
    with torch.no_grad():
        for i, router in enumerate(routers.layers):
            last = router.classifier[4]
            if routes is None:
                router.encoder[0].weight.mul_(8)
                last.weight.mul_(40)
                last.bias.zero_()
            else:
                last.weight.zero_()
                last.bias.copy_(torch.tensor([0.0, 1.0 if routes[i] == "0" else -1.0]))
    routers.save_pretrained(folder)
    return folder


def prompt(seed: int, length: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()


@dataclass
class Decision:
    """A request's routes, and where the chunk began with which they were decided."""

    prompt_len: int
    dense_until: int
    routes: dict[int, tuple[int, ...]]


@dataclass
class Engine:
    """A running engine.

    Attributes:
        used: pages in use after each schedule, of one layer each.
        steps: for each schedule, of every request in it the tokens that are in the cache before it.
        decisions: by request id.
    """

    llm: Any
    used: list[int] = field(default_factory=list)
    steps: list[list[int]] = field(default_factory=list)
    preempted: int = 0
    decisions: dict[str, Decision] = field(default_factory=dict)

    @property
    def core(self) -> Any:
        return self.llm.llm_engine.engine_core.engine_core

    @property
    def pool(self) -> Any:
        return self.core.scheduler.kv_cache_manager.block_pool

    @property
    def groups(self) -> Any:
        return self.core.scheduler.kv_cache_manager.kv_cache_config.kv_cache_groups

    @property
    def layers(self) -> dict[str, Any]:
        return self.llm.llm_engine.vllm_config.compilation_config.static_forward_context

    def pages_in_use(self) -> int:
        """Pages of one layer each: where layers share a page table, its pages count once for each of them."""
        return (self.pool.num_gpu_blocks - 1 - self.pool.get_num_free_blocks()) * len(self.groups[0].layer_names)

    def generate(self, prompts: list[list[int]], tokens: int) -> list[Any]:
        """The outputs in the order of the prompts, greedy, with log-probabilities of what was chosen."""
        from vllm import SamplingParams

        self.used.clear()
        self.steps.clear()
        sampling = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, logprobs=0, detokenize=False)
        outputs = self.llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
        assert self.pages_in_use() == 0
        return [output.outputs[0] for output in outputs]


def load_plugins() -> None:
    """Lets vLLM load its plugins, once in a process, and ours change it: engines without routers have that too."""
    from vllm.plugins import load_general_plugins

    os.environ[ROUTERS_VARIABLE] = "each engine has its own"
    load_general_plugins()
    os.environ[ROUTERS_VARIABLE] = ""


@contextlib.contextmanager
def engine(model: Path, routers: Path | None, poison: bool = True, **arguments: Any) -> Iterator[Engine]:
    """An engine in this process, with routers or as vLLM is without them; its freed pages are spoilt."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.distributed.kv_transfer.kv_transfer_state import ensure_kv_transfer_shutdown

    load_plugins()
    os.environ[ROUTERS_VARIABLE] = str(routers or "")

    settings = {"dtype": "float32", "max_num_seqs": 8, "block_size": PAGE, "seed": 0, "enforce_eager": True}
    llm = LLM(str(model), **{**settings, "enable_prefix_caching": False, **arguments})
    found = Engine(llm)
    try:
        _watch(found, poison)
        yield found
    finally:
        llm.llm_engine.engine_core.shutdown()
        ensure_kv_transfer_shutdown()
        del llm, found.llm
        gc.collect()
        cleanup_dist_env_and_memory()
        os.environ[ROUTERS_VARIABLE] = ""


def _watch(found: Engine, poison: bool) -> None:
    scheduler, pool = found.core.scheduler, found.pool
    schedule, free, preempt = scheduler.schedule, pool.free_blocks, scheduler._preempt_request

    def watched_schedule(*args: Any, **kwargs: Any) -> Any:
        result = schedule(*args, **kwargs)
        found.used.append(found.pages_in_use())
        new = [r.num_computed_tokens for r in result.scheduled_new_reqs]
        found.steps.append(new + list(result.scheduled_cached_reqs.num_computed_tokens))
        return result

    def watched_free(blocks: Any) -> None:
        blocks = list(blocks)
        free(blocks)
        for block in blocks:
            if poison and block.ref_cnt == 0 and not block.is_null:
                for layer in found.layers.values():
                    layer.kv_cache[block.block_id] = torch.nan

    def watched_preempt(*args: Any, **kwargs: Any) -> Any:
        found.preempted += 1
        return preempt(*args, **kwargs)

    scheduler.schedule, pool.free_blocks, scheduler._preempt_request = watched_schedule, watched_free, watched_preempt
    taps = [tap for layer in found.layers.values() if (tap := getattr(layer, "flux_ext_layer", None)) is not None]
    if not taps:
        return
    requests = taps[0].routed.requests
    decide = requests.decide

    def watched_decide(request: Any, layer: int, route: tuple[int, ...], dense_until: int) -> None:
        decide(request, layer, route, dense_until)
        decision = found.decisions.setdefault(request.name, Decision(request.prompt_len, dense_until, {}))
        assert layer not in decision.routes, "decided twice"
        decision.routes[layer] = route

    requests.decide = watched_decide
    if poison:  # what no request ever owned
        for layer in found.layers.values():
            layer.kv_cache[0] = torch.nan


class Oracle:
    """The model in transformers with dense masks and routers that look at its query projections: no operator, cache or
    page of this package."""

    def __init__(self, model: Path, routers: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self.routers = FluxRouters.from_pretrained(routers)
        AttentionInterface.register("serving_oracle", self._attention)
        self.model.set_attn_implementation("serving_oracle")
        for i, layer in enumerate(self.model.model.layers):
            layer.self_attn.q_proj.register_forward_hook(self._route(i))
        self.routes: dict[int, int] = {}

    def _route(self, index: int) -> Any:
        def hook(module: Any, inputs: Any, output: torch.Tensor) -> None:
            states = output[:, : self.prompt_len].unflatten(-1, (-1, self.routers.config.head_dim))
            self.routes[index] = int(self.routers.layers[index].decide(states)[1])

        return hook

    def _attention(self, module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float, **kwargs: Any) -> Any:
        n, config = q.shape[2], self.routers.config
        visible = torch.ones(n, n, dtype=torch.bool).tril()
        if self.routes[module.layer_idx]:
            p = torch.arange(n)[:, None]
            last_q = config.last_q if config.pattern == "triangle" else 0
            dense = (p < self.dense_until) | ((p >= self.prompt_len - last_q) & (p < self.prompt_len))
            visible = torch.where(dense, visible, dense_mask(config.streaming(), n, n))
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, visible, scale=scaling)
        return out.transpose(1, 2), None

    @torch.no_grad()
    def check(self, prompt: list[int], output: Any, decision: Decision, bound: float = 2e-3) -> None:
        """That every token was the likeliest, with the probability that it should have, and the routes were right."""
        self.prompt_len, self.dense_until = len(prompt), decision.dense_until
        tokens = list(output.token_ids)
        logits = self.model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].float()
        assert {i: (r,) for i, r in self.routes.items()} == decision.routes
        expected = logits.log_softmax(-1)
        assert tokens == expected.argmax(-1).tolist()
        given = torch.tensor([step[token].logprob for step, token in zip(output.logprobs, tokens, strict=True)])
        difference = (given - expected[torch.arange(len(tokens)), tokens]).abs().max()
        assert difference < bound, f"log-probabilities differ by {difference}"
