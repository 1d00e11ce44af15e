"""A routed model in vLLM beside vLLM without routers: memory, requests that fit, time to first token, throughput.

    python benchmarks/serving.py MODEL --fits                         # in an environment with vLLM, see docs/serving.md
    python benchmarks/serving.py MODEL --routers ROUTERS --rounds 3   # routes as the routers decide

Without ``--routers`` routes are forced, so the figures say what a route costs, not which one is right. Each engine has
a process of its own, and variants take turns: of the rounds a figure is the best. Times are given on the clock and,
for a machine that has other work, of the processor (all threads).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

COLUMNS: dict[str, Callable[[list[Any]], Any]] = {  # and what of the rounds is printed
    "variant": min,
    "sparse layers or heads": min,
    "pages, one request": min,
    "at once": min,
    "first token (s)": min,
    "first token (CPU s)": min,
    "decode, 4 at once (tokens/s)": max,
    "decode, 4 at once (CPU ms per step)": min,
}


class Clock:
    """Seconds since it was made, on the clock and of the processor."""

    def __init__(self) -> None:
        self._begin = time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, float]:
        return time.perf_counter() - self._begin[0], time.process_time() - self._begin[1]


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


def routed_sparse(llm: Any) -> float:
    """The share of what is routed sparse, over all layers (or heads) and the requests that the engine knows."""
    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()
    requests = next(iter(layers)).flux_ext_layer.routed.requests
    routes = [number for request in requests for route in request.routes.values() for number in route]
    return sum(routes) / len(routes)


def measure(llm: Any, name: str, sparse: int | str | None, tokens: int, with_fit: bool) -> dict[str, Any]:
    """One row; ``sparse`` None: what the routers decide."""
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

    clock = Clock()
    add(1)
    while engine.has_unfinished_requests():
        engine.step()
    first = clock.read()
    add(4)
    held = 0
    while engine.has_unfinished_requests():
        held = pages(llm) or held
        engine.step()
    (wall, cpu), share = decode(llm, add, share=sparse is None)
    shown = f"{share:.0%}" if share is not None else sparse
    most = fit(llm, add) if with_fit else ""
    row = (name, shown, held, most, round(first[0], 2), round(first[1], 2), round(4 / wall, 1), round(cpu * 1e3, 1))
    return dict(zip(COLUMNS, row, strict=True))


def decode(llm: Any, add: Callable[[int], None], share: bool) -> tuple[tuple[float, float], float | None]:
    """Seconds of a step with four requests whose prompts are done, and what of them is routed sparse."""
    engine, steps = llm.llm_engine, 10
    scheduler = engine.engine_core.engine_core.scheduler
    for _ in range(4):
        add(steps + 10)
    while sum(r.num_output_tokens > 0 for r in scheduler.running) < 4:
        engine.step()
    clock = Clock()
    for _ in range(steps):
        engine.step()
    wall, cpu = clock.read()
    assert len(scheduler.running) == 4, "a request ended, or waits for pages"
    sparse = routed_sparse(llm) if share else None
    while engine.has_unfinished_requests():
        engine.step()
    return (wall / steps, cpu / steps), sparse


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


def serve(given: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one engine, with routers or without."""
    routed = given.only == "routed"
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR", FLUX_EXT_ROUTERS="given below")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
    from transformers import AutoConfig
    from vllm import LLM
    from vllm.plugins import load_general_plugins

    from flux_ext import FluxConfig, FluxRouters

    load_general_plugins()
    shape = AutoConfig.from_pretrained(given.model)
    count, page = shape.num_hidden_layers, 32
    head_dim = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    with tempfile.TemporaryDirectory() as folder:
        if given.routers is None:
            settings = FluxConfig(sink=given.sink, window=given.window, num_layers=count, head_dim=head_dim)
            FluxRouters(settings).save_pretrained(folder)
        os.environ["FLUX_EXT_ROUTERS"] = (given.routers or folder) if routed else ""
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
    if not routed:
        return [measure(llm, "vLLM", "-", given.tokens, given.fits)]
    if given.routers is not None:
        return [measure(llm, "routed", None, given.tokens, given.fits)]
    rows = []
    for sparse in (0, count // 3, 2 * count // 3, count):
        force(llm, sparse)
        rows.append(measure(llm, "routed", sparse, given.tokens, given.fits))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--routers", help="folder; without it routes are forced, at four sparsities")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=4096, help="of every prompt")
    parser.add_argument("--fits", action="store_true", help="also how many requests run at once")
    parser.add_argument("--fit", type=int, default=4, help="requests that the pool holds, everything full")
    parser.add_argument("--sink", type=int, default=128)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--only", choices=("vLLM", "routed"), help=argparse.SUPPRESS)  # for a process of its own
    given = parser.parse_args()
    if given.only:
        print("\n" + json.dumps(serve(given)), flush=True)
        return
    rounds: dict[str, list[list[dict[str, Any]]]] = {"vLLM": [], "routed": []}
    for _ in range(given.rounds):
        for only, of_variant in rounds.items():
            command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], "--only", only]
            said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            of_variant.append(json.loads(said.splitlines()[-1]))
    print("| " + " | ".join(COLUMNS) + " |\n" + "| --- " * len(COLUMNS) + "|")
    for of_variant in rounds.values():
        for rows in zip(*of_variant, strict=True):
            cells = (choose([row[name] for row in rows]) for name, choose in COLUMNS.items())
            print("| " + " | ".join(map(str, cells)) + " |")
    print(f"load of the machine at the end: {os.getloadavg()[0]:.1f}, of {os.cpu_count()} processors")


if __name__ == "__main__":
    main()
