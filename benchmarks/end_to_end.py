"""Whole models of real shapes with random weights: prefill, decode, memory, by share of sparse layers.

    python -m benchmarks end_to_end --model llama-3.1-8b --lengths 8192 131072 --output results/

Routes are forced (the weights are random), so the figures say what a route costs, not which one is right. The peer
is the same model with stock PyTorch attention (SDPA: cuDNN or flash, whatever PyTorch prefers).
"""

from __future__ import annotations

import argparse
import csv
import gc
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import flux_ext
from flux_ext.static_cache import FluxStaticCache

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-3.1-8b": (
        "LlamaConfig",
        {
            "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "rope_theta": 5e5,
        },
    ),
    "qwen3-8b": (
        "Qwen3Config",
        {
            "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "rope_theta": 1e6,
        },
    ),
    "tiny": (
        "LlamaConfig",
        {
            "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
        },
    ),
}  # fmt: skip


def build(name: str, device: str, dtype: torch.dtype, max_length: int) -> Any:
    """A randomly initialised model of a real shape, made directly on the device."""
    import transformers

    config_class, shape = SHAPES[name]
    config = getattr(transformers, config_class)(**shape, max_position_embeddings=max_length + 1024)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.eval().requires_grad_(False)


def sparse_layers(num_layers: int, share: float) -> torch.Tensor:
    """Routes [L] with that share of sparse layers, spread evenly."""
    count = round(share * num_layers)
    route = torch.zeros(num_layers, dtype=torch.int32)
    if count:
        route[(torch.arange(count) * num_layers / count).long()] = 1
    return route


def _seconds(f: Any, repeats: int, device: str) -> float:
    times = []
    for _ in range(repeats):
        if device == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            f()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        else:
            import time

            begin = time.perf_counter()
            f()
            times.append(time.perf_counter() - begin)
    return statistics.median(times)


def cache_bytes(cache: Any) -> int:
    """What a cache's tensors occupy."""
    if hasattr(cache, "nbytes"):
        return int(cache.nbytes())
    layers = [layer for layer in cache.layers if getattr(layer, "is_initialized", True)]
    return sum(t.nbytes for layer in layers for t in (layer.keys, layer.values))


def _graphed(step: Callable[[], object], repeats: int) -> float:
    """Seconds of one replay of a step captured in a CUDA graph; the launches of a step then cost no host time."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return _seconds(graph.replay, repeats, "cuda")


@torch.no_grad()
def measure(model: Any, ids: torch.Tensor, mask: torch.Tensor | None, decode_steps: int, repeats: int) -> dict:
    """Prefill and decode seconds, peak memory and cache bytes of one batch.

    Decode steps are timed as they are called (``decode_ms``, host included) and, for one sequence on a GPU, replayed
    from a CUDA graph (``decode_graph_ms``): ours over a static cache, the stock model's over the dynamic cache it has.
    """
    device = ids.device.type
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()

    def prefill(cache: Any = None) -> Any:
        return model(ids, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1)

    out = prefill()
    token = out.logits[:, -1:].argmax(-1)
    state = {"cache": out.past_key_values, "mask": mask}
    del out
    stored = cache_bytes(state["cache"])

    def decode() -> None:
        if state["mask"] is not None:
            state["mask"] = torch.nn.functional.pad(state["mask"], (0, 1), value=1)
        model(token, attention_mask=state["mask"], past_key_values=state["cache"], use_cache=True)

    for _ in range(3):
        decode()
    decode_seconds = _seconds(decode, decode_steps, device)
    graph_seconds = math.nan
    if device == "cuda" and mask is None:
        if flux_ext.is_patched(model):
            config = flux_ext.get_routers(model).config
            state["cache"] = FluxStaticCache(model.config, config, ids.shape[1] + 64)
            prefill(state["cache"])
        position = torch.full((1, 1), ids.shape[1], device=device)
        graph_seconds = _graphed(
            lambda: model(token, past_key_values=state["cache"], position_ids=position), decode_steps
        )
    state.clear()
    gc.collect()
    prefill_seconds = _seconds(prefill, repeats, device)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    return {
        "prefill_s": prefill_seconds,
        "decode_ms": decode_seconds * 1e3,
        "decode_graph_ms": graph_seconds * 1e3,
        "peak_GB": peak / 1e9,
        "kv_GB": stored / 1e9,
    }


def batch_of(length: int, batch: int, vocab: int, device: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Random tokens; a batch is ragged (left-padded: all, 3/4, 1/2, 1/4 of the length)."""
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocab, (batch, length), generator=g).to(device)
    if batch == 1:
        return ids, None
    mask = torch.ones(batch, length, dtype=torch.long, device=device)
    for row in range(batch):
        mask[row, : length * row // batch] = 0
    return ids, mask


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("benchmarks end_to_end", description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--batches", type=int, nargs="+", default=[1])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.0, 0.5, 0.75, 0.9])
    parser.add_argument("--decode-steps", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = build(args.model, device, dtype, max(args.lengths))
    rows: list[dict] = []
    runs = [(length, batch) for length in args.lengths for batch in args.batches]
    progress = tqdm(total=len(runs) * (1 + len(args.shares)), file=sys.stderr)
    for length, batch in runs:
        ids, mask = batch_of(length, batch, model.config.vocab_size, device)
        base = {"model": args.model, "length": length, "batch": batch}
        variants: list[tuple[str, torch.Tensor | None]] = [("sdpa", None)]
        variants += [(f"flux {share:g}", sparse_layers(model.config.num_hidden_layers, share)) for share in args.shares]
        dense: dict = {}
        for name, route in variants:
            progress.set_description(f"{length} x {batch} {name}")
            try:
                if route is None:
                    found = dense = measure(model, ids, mask, args.decode_steps, args.repeats)
                else:
                    config = flux_ext.FluxConfig(sink=128, window=2048)
                    with flux_ext.patched(model, config), flux_ext.routes(model, route):
                        found = measure(model, ids, mask, args.decode_steps, args.repeats)
                speedup = {
                    f"{k}_x": dense[f"{k}_{u}"] / found[f"{k}_{u}"]
                    for k, u in (("prefill", "s"), ("decode", "ms"), ("decode_graph", "ms"))
                    if dense
                }
                rows.append({**base, "variant": name, **found, **speedup})
            except torch.OutOfMemoryError:
                rows.append({**base, "variant": f"{name} (out of memory)"})
                torch.cuda.empty_cache()
            progress.update()
    progress.close()
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / f"end_to_end-{args.model}-{device}.csv"
    fields = [
        "model",
        "length",
        "batch",
        "variant",
        "prefill_s",
        "prefill_x",
        "decode_ms",
        "decode_x",
        "decode_graph_ms",
        "decode_graph_x",
        "peak_GB",
        "kv_GB",
    ]
    with path.open("w", newline="") as f:
        writer = csv.DictWriter(f, fields)
        writer.writeheader()
        writer.writerows({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in r.items()} for r in rows)
    for row in rows:
        print("  ".join(f"{k} {row[k]:.4g}" if isinstance(row[k], float) else str(row[k]) for k in fields if k in row))
    print(f"written to {path}")


if __name__ == "__main__":
    main(sys.argv[1:])
