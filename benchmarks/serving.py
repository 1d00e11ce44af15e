"""A routed model in vLLM beside vLLM without routers: memory, requests that fit, time to first token, throughput.

    python benchmarks/serving.py MODEL --tokens 4096          # in an environment with vLLM, see docs/serving.md

Routes are forced, so the figures say what a route costs, not which one is right. One engine at a time, in this process,
on the CPU; each variant's row is printed as soon as it is there.
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

HEADER = (
    "variant",
    "sparse layers",
    "pages, one request",
    "at once",
    "first token (s)",
    "decode, 4 at once (tokens/s)",
)


def pages(llm: Any) -> int:
    """Pages in use, of one layer each."""
    manager = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager
    pool, groups = manager.block_pool, manager.kv_cache_config.kv_cache_groups
    return (pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()) * len(groups[0].layer_names)


def force(llm: Any, sparse: int) -> None:
    """Every prompt's routes from now on: the first layers full, the last ``sparse`` ones sparse."""
    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    routed = [tap.routed for layer in layers.values() if (tap := getattr(layer, "flux_ext_layer", None)) is not None]
    for layer in routed:
        last = layer.router.classifier[4]
        with torch.no_grad():
            last.weight.zero_()
            last.bias.copy_(torch.tensor([0.0, -1.0 if layer.index >= len(routed) - sparse else 1.0]))


def measure(llm: Any, name: str, sparse: int | str, tokens: int, side_by_side: bool) -> None:
    """One row."""
    from vllm import SamplingParams

    engine = llm.llm_engine
    vocabulary = engine.vllm_config.model_config.get_vocab_size()
    made = 0

    def add(new: int) -> None:
        nonlocal made
        made += 1
        ids = torch.randint(10, vocabulary, (tokens,), generator=torch.Generator().manual_seed(made)).tolist()
        sampling = SamplingParams(max_tokens=new, temperature=0, ignore_eos=True, detokenize=False)
        engine.add_request(f"{name}-{sparse}-{made}", {"prompt_token_ids": ids}, sampling)

    begin = time.perf_counter()
    add(1)
    while engine.has_unfinished_requests():
        engine.step()
    first = time.perf_counter() - begin
    add(4)
    held = 0
    while engine.has_unfinished_requests():
        held = pages(llm) or held
        engine.step()
    most, rate = 0, 0.0
    if side_by_side:
        rate, most = decode(llm, add), fit(llm, add)
    row = (name, sparse, held, most or "", f"{first:.2f}", f"{rate:.1f}" if rate else "")
    print("| " + " | ".join(map(str, row)) + " |", flush=True)


def decode(llm: Any, add: Callable[[int], None]) -> float:
    """Tokens per second of four requests whose prompts are done."""
    engine = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    for _ in range(4):
        add(17)
    while sum(r.num_output_tokens > 0 for r in scheduler.running) < 4:
        engine.step()
    begin, steps = time.perf_counter(), 0
    while len(scheduler.running) == 4 and steps < 10:
        engine.step()
        steps += 1
    rate = 4 * steps / (time.perf_counter() - begin)
    while engine.has_unfinished_requests():
        engine.step()
    return rate


def fit(llm: Any, add: Callable[[int], None]) -> int:
    """How many of 24 requests run at once, until one has to wait."""
    engine = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    for _ in range(24):
        add(64)
    most = 0
    while engine.has_unfinished_requests() and len(scheduler.running) >= most:
        most = len(scheduler.running)
        for _ in range(2):
            engine.step()
    for request in [*scheduler.running, *scheduler.waiting]:
        engine.abort_request([request.request_id], internal=True)
    engine.step()
    return most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=4096, help="of every prompt")
    parser.add_argument("--alone", action="store_true", help="one request at a time only")
    parser.add_argument("--fit", type=int, default=4, help="requests that the pool holds, everything full")
    parser.add_argument("--sink", type=int, default=128)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--dtype", default="bfloat16")
    given = parser.parse_args()

    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR", FLUX_EXT_ROUTERS="given below")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
    from transformers import AutoConfig
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.distributed.kv_transfer.kv_transfer_state import ensure_kv_transfer_shutdown
    from vllm.plugins import load_general_plugins

    from flux_ext import FluxConfig, FluxRouters

    load_general_plugins()
    shape = AutoConfig.from_pretrained(given.model)
    count, page = shape.num_hidden_layers, 32
    head_dim = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    print("| " + " | ".join(HEADER) + " |\n" + "| --- " * len(HEADER) + "|", flush=True)
    for routed in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            settings = FluxConfig(sink=given.sink, window=given.window, num_layers=count, head_dim=head_dim)
            FluxRouters(settings).save_pretrained(folder)
            os.environ["FLUX_EXT_ROUTERS"] = folder if routed else ""
            fit = given.fit * -(-(given.tokens + 64) // page)
            llm = LLM(
                given.model,
                dtype=given.dtype,
                max_model_len=given.tokens + 64,
                max_num_batched_tokens=given.tokens,
                max_num_seqs=64,
                block_size=page,
                num_gpu_blocks_override=fit * (count if routed else 1) + 1,
                enforce_eager=True,
                enable_prefix_caching=False,
                skip_tokenizer_init=True,
            )
        if routed:
            for sparse in (0, count // 3, 2 * count // 3, count):
                force(llm, sparse)
                measure(llm, "routed", sparse, given.tokens, not given.alone)
        else:
            measure(llm, "vLLM", "-", given.tokens, not given.alone)
        llm.llm_engine.engine_core.shutdown()
        ensure_kv_transfer_shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    main()
