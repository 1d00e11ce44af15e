"""Whole models of real shapes with random weights: prefill, decode, memory, by share of sparse layers.

    python -m benchmarks end_to_end --minutes 9                              # the most important runs first
    python -m benchmarks end_to_end --runs qwen3-8b:262144x1 llama-3.1-8b:32768x4
    python -m benchmarks end_to_end --runs tiny:256x1 tiny:128x4             # seconds, on a CPU too
    python -m benchmarks end_to_end --structured --modes fa-ssa fa-ta fa-xa xa-ssa --shares 0.5 0.75 0.9 \\
        --runs llama-3.1-8b:32768x1 llama-3.1-8b:131072x1 llama-3.1-8b:262144x1

A run is MODEL:LENGTHxBATCH; a batch of more than one is ragged. Routes are forced (the weights are random), so the
figures say what a route costs, not which one is right. Modes with block selection need ``--structured``, without which
queries and keys have nothing to be selected (``benchmarks/structured.py``); ``blocks_kept`` is then the share of key
blocks up to the diagonal that are kept, the mean of three layers. The peer is the same model with stock PyTorch
attention (SDPA: cuDNN where it can, else flash). Every variant is on disk before the next starts.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import gc
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import flux_ext
from benchmarks.cuda.measure import first_line
from benchmarks.cuda.table import about
from benchmarks.structured import give_structure, noting_blocks, structured_tokens
from flux_ext import BlockSparse, FluxConfig, FluxStaticCache
from flux_ext.config import PRESETS

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


RUNS = (
    "llama-3.1-8b:131072x1", "llama-3.1-8b:262144x1", "qwen3-8b:131072x1", "llama-3.1-8b:32768x4",
    "llama-3.1-8b:32768x1", "llama-3.1-8b:8192x1", "qwen3-8b:262144x1", "qwen3-8b:32768x4", "qwen3-8b:8192x1",
)  # fmt: skip
PEER = "sdpa"
BACKENDS = [
    SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH,
]  # fmt: skip
FIELDS = (
    "model", "length", "batch", "variant", "prefill_s", "prefill_x", "decode_ms", "decode_x", "decode_graph_ms",
    "decode_graph_x", "peak_GB", "kv_GB", "blocks_kept", "note",
)  # fmt: skip
SELECTING = [name for name, modes in PRESETS.items() if "block_sparse" in modes.values()]
STEPS = 128
"""Room for decode steps in a static cache."""
WARM_UP = 2048
"""Tokens of the prompt that comes before anything is timed."""


def build(name: str, device: str, dtype: torch.dtype, max_length: int, shape: dict[str, Any] | None = None) -> Any:
    """A randomly initialised model of a real shape, made directly on the device."""
    import transformers

    config_class, real_shape = SHAPES[name]
    config = getattr(transformers, config_class)(**(shape or real_shape), max_position_embeddings=max_length + 1024)
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


def seconds_of(call: Callable[[], object], repeats: int, device: str) -> float:
    """Median time of a call."""
    times = []
    for _ in range(repeats):
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        else:
            begin = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin)
    return statistics.median(times)


def graphed(step: Callable[[], object], device: str) -> Callable[[], object]:
    """A replay of a step captured in a CUDA graph: its launches then cost no host time. On a CPU the step itself."""
    if device != "cuda":
        return step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def tensors(cache: Any) -> list[torch.Tensor]:
    """Keys and values of a stock cache."""
    layers = [layer for layer in cache.layers if getattr(layer, "is_initialized", True)]
    return [t for layer in layers for t in (layer.keys, layer.values)]


def measure(
    model: Any, ids: torch.Tensor, mask: torch.Tensor | None, decode_steps: int, repeats: int
) -> dict[str, float]:
    """Prefill and decode seconds, peak memory and cache bytes of one batch.

    Ours decodes over a static cache, stock attention over the dynamic cache it has. Steps are timed as they are
    called (``decode_ms``, host included) and replayed from a CUDA graph (``decode_graph_ms``; not for stock attention
    on a ragged batch, whose mask waits for the device).
    """
    (batch, length), device = ids.shape, ids.device.type
    ours = flux_ext.is_patched(model)
    state: dict[str, Any] = {}

    def prefill(tokens: int = length) -> None:
        state.clear()  # one cache at a time
        cache = None
        if ours:
            cache = FluxStaticCache(model.config, flux_ext.get_routers(model).config, tokens + STEPS)
        part = None if mask is None else mask[:, -tokens:]
        out = model(ids[:, -tokens:], attention_mask=part, past_key_values=cache, use_cache=True, logits_to_keep=1)
        state["cache"], state["token"] = out.past_key_values, out.logits[:, -1:].argmax(-1)

    prefill(min(length, WARM_UP))
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    prefill_seconds = seconds_of(prefill, repeats, device)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    cache, token = state["cache"], state["token"]
    stored = cache.nbytes() if ours else sum(t.nbytes for t in tensors(cache))

    position = torch.full((batch, 1), length, device=device) if mask is None else mask.sum(1, keepdim=True)
    steps = {"mask": mask}
    if ours and mask is not None:  # one for all steps, each of which has its column
        steps["mask"] = torch.nn.functional.pad(mask, (0, STEPS), value=1)

    def decode() -> None:
        if mask is not None and not ours:
            steps["mask"] = torch.nn.functional.pad(steps["mask"], (0, 1), value=1)
        model(token, attention_mask=steps["mask"], past_key_values=cache, use_cache=True, position_ids=position)

    held: list[torch.Tensor] = []

    def held_decode() -> None:
        held[:] = [] if ours else tensors(cache)  # a stock step replaces them, its replay reads them again
        decode()

    decode()
    decode_seconds = seconds_of(decode, decode_steps, device)
    graph_seconds = math.nan
    if ours or mask is None:
        graph_seconds = seconds_of(graphed(held_decode, device), decode_steps, device)
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


def blocks_kept(model: Any, ids: torch.Tensor, mode: str) -> float:
    """The share of key blocks that the block selection of a mode keeps in one prompt."""
    config = FluxConfig.preset(mode)
    pattern = next(p for p in (config.full_pattern(), config.sparse_pattern()) if isinstance(p, BlockSparse))
    with variant(model, f"{mode} 0.5"), noting_blocks(pattern, model.config.num_hidden_layers) as shares:
        model(ids, use_cache=False, logits_to_keep=1)
    return statistics.mean(shares)


@contextlib.contextmanager
def variant(model: Any, name: str) -> Iterator[None]:
    """The model with stock attention, or ours in one mode (``flux``: fa-ssa) with that share of its layers sparse."""
    if name == PEER:
        with sdpa_kernel(BACKENDS, set_priority=True):
            yield
        return
    mode, share = name.split()
    route = sparse_layers(model.config.num_hidden_layers, float(share))
    config = FluxConfig.preset("fa-ssa" if mode == "flux" else mode)
    with flux_ext.patched(model, config), flux_ext.routes(model, route):
        yield


class Writer:
    """Rows of a kind of benchmark on disk as they come."""

    def __init__(self, path: Path, device: str, kind: str, fields: Sequence[str], argv: list[str]) -> None:
        import transformers

        self._path, self._fields = path, tuple(fields)
        path.parent.mkdir(parents=True, exist_ok=True)
        command = " ".join([f"python -m benchmarks {kind}", *argv])
        info = {**about(device), "transformers": transformers.__version__, "command": command}
        with path.open("w", newline="") as file:
            file.writelines(f"# {key}: {value}\n" for key, value in info.items())
            csv.writer(file).writerow(self._fields)

    def add(self, row: dict[str, Any]) -> None:
        values = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()}
        with self._path.open("a", newline="") as file:
            csv.DictWriter(file, self._fields).writerow(values)
        shown = [k for k in self._fields if k in values]
        tqdm.write(" ".join(f"{k}={values[k]}" if self._fields.index(k) > 3 else str(values[k]) for k in shown))


def run(model: Any, name: str, length: int, batch: int, args: argparse.Namespace, writer: Writer) -> None:
    """All variants of one run: the peer, then ours from sparse to full."""
    device = model.device.type
    ids, mask = batch_of(length, batch, model.config.vocab_size, device)
    if args.structured:
        ids = structured_tokens(length, model.config.vocab_size, device)
    dense: dict[str, float] = {}
    kept: dict[str, float] = {}
    last = 0.0
    shares = sorted(args.shares, reverse=True)
    for label in (PEER, *(f"{mode} {share:g}" for mode in args.modes or ["flux"] for share in shares)):
        row: dict[str, Any] = {"model": name, "length": length, "batch": batch, "variant": label}
        begin = time.monotonic()
        if begin + last > args.deadline:
            writer.add({**row, "note": "not run: the time was up"})
            continue
        try:
            with variant(model, label):
                found = measure(model, ids, mask, args.decode_steps, args.repeats)
            if (mode := label.split()[0]) in SELECTING and args.structured:
                if mode not in kept:
                    kept[mode] = blocks_kept(model, ids, mode)
                found["blocks_kept"] = kept[mode]
            dense = dense if label != PEER else found
            speedups = {
                f"{k}_x": dense[f"{k}_{u}"] / found[f"{k}_{u}"]
                for k, u in (("prefill", "s"), ("decode", "ms"), ("decode_graph", "ms"))
                if dense and not math.isnan(dense[f"{k}_{u}"])
            }
            writer.add({**row, **found, **speedups})
        except Exception as error:  # out of memory above all
            writer.add({**row, "note": first_line(error)})
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
        last = time.monotonic() - begin


def parse_run(text: str) -> tuple[str, int, int]:
    """MODEL:LENGTHxBATCH."""
    name, _, shape = text.partition(":")
    length, _, batch = shape.partition("x")
    if name not in SHAPES or not length.isdigit() or not batch.isdigit():
        raise argparse.ArgumentTypeError(f"expected MODEL:LENGTHxBATCH with MODEL of {', '.join(SHAPES)}, got {text!r}")
    return name, int(length), int(batch)


@torch.no_grad()
def main(argv: list[str]) -> None:
    """The command line."""
    parser = argparse.ArgumentParser("benchmarks end_to_end", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--runs", type=parse_run, nargs="+", default=[parse_run(r) for r in RUNS])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.0, 0.5, 0.75, 0.9])
    parser.add_argument("--modes", nargs="+", choices=[*PRESETS], help="full and sparse mode (default: fa-ssa)")
    parser.add_argument("--structured", action="store_true", help="weights with sinks, local structure and passages")
    parser.add_argument("--minutes", type=float, default=60.0, help="start nothing that would end after this")
    parser.add_argument("--decode-steps", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=1, help="prefills that are timed, after a short one")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args(argv)
    if not 1 <= 2 * args.decode_steps + 4 <= STEPS:
        parser.error(f"--decode-steps must be 1 to {STEPS // 2 - 2}, got {args.decode_steps}")
    if args.structured and (wrong := [name for name, _, batch in args.runs if batch > 1 or name.startswith("qwen")]):
        parser.error(f"--structured is for one sequence of a Llama's shape (x1), got {wrong[0]}")
    args.deadline = time.monotonic() + 60 * args.minutes
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    writer = Writer(args.output / f"end_to_end-{device}.csv", device, "end_to_end", FIELDS, argv)
    model, built = None, ("", 0)
    for name, length, batch in tqdm(args.runs, desc="end to end", unit="run", file=sys.stderr, disable=None):
        if time.monotonic() > args.deadline:
            writer.add({"model": name, "length": length, "batch": batch, "note": "not run: the time was up"})
            continue
        longest = max(n for other, n, _ in args.runs if other == name)
        if built != (name, longest):
            model = None  # one model at a time
            gc.collect()
            shape = {**SHAPES[name][1], "attention_bias": True} if args.structured else None
            model, built = build(name, device, dtype, longest, shape), (name, longest)
            if args.structured:
                give_structure(model)
        run(model, name, length, batch, args, writer)
