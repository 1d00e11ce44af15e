"""The code that serves a step, without vLLM: driven as vLLM's runner drives it, on the CPU or a GPU.

    python -m benchmarks serving_steps                                        # in small, on the CPU
    python -m benchmarks serving_steps --device cuda --tokens 32768 131072 --batch 1 8 64 --graph

Its page tables, its pages in any of its orders in memory and its requests stand here; what is timed is the package's
own: steps, routes by first page, stores into pages, routers and attention. The rest of a model is not there: a figure
is that of the attention layers of a step, by device time on a GPU and wall time on a CPU. Prompts come one at a time,
each in one step; the pages of a decode step are filled without computing its prompts.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from flux_ext import FluxConfig, FluxRouters
from flux_ext.serving.layers import RoutedLayer
from flux_ext.serving.pages import pages_of, store
from flux_ext.serving.requests import Requests, RouteTable
from flux_ext.serving.steps import Step, Steps
from flux_ext.serving.visible_pages import hidden

ORDERS = {"HN": (0, 1, 2, 3), "NH": (0, 2, 1, 3), "H-outermost": (1, 0, 2, 3)}
"""How vLLM's layouts LBHNC, LBNHC and LHBNC order a layer's pages [B, H, N, C] in memory."""


class StandIn:
    """A scheduler, a pool of pages and a runner, for the attention layers of a model.

    Args:
        config: of the routers, with ``num_layers`` and ``head_dim``; every layer is routed.
        sparse: 0 or 1 per layer, the route of every request.
        num_pages: of the pool, page 0 among them, which is no request's.
        order: one of :data:`ORDERS`.
    """

    def __init__(
        self,
        config: FluxConfig,
        sparse: list[int],
        heads: tuple[int, int],
        num_pages: int,
        page_size: int = 16,
        order: str = "NH",
        device: str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.heads, self.head_dim, self.page_size = heads, config.head_dim, page_size
        self.device, self.dtype = device, dtype
        shape = (num_pages, heads[1], page_size, 2 * config.head_dim)
        memory = torch.zeros([shape[axis] for axis in ORDERS[order]], device=device, dtype=dtype)
        self.kv_cache = memory.permute([ORDERS[order].index(axis) for axis in range(4)])
        self.pages = pages_of(self.kv_cache)
        self.free = list(range(1, num_pages))
        self.requests = Requests()
        self.requests.groups = {layer: layer for layer in range(len(sparse))}
        per_head = config.granularity == "head"
        self.requests.table = RouteTable(num_pages, heads[1] if per_head else 1, device)
        self.steps = Steps(self.requests, config)
        self.sparse = sparse
        self.layers = []
        for layer, (router, route) in enumerate(zip(FluxRouters(config).layers, sparse, strict=True)):
            with torch.no_grad():
                router.classifier[4].weight.zero_()
                router.classifier[4].bias.copy_(torch.tensor([0.0, -1.0 if route else 1.0]))
            router.to(device, dtype).requires_grad_(False)
            self.layers.append(RoutedLayer(layer, router, config, self.requests))
        self.prompt_lens: dict[str, int] = {}
        self.tables: dict[str, list[list[int]]] = {}
        """Pages of a request, by layer. As in vLLM's worker, those that were given back are still named here."""

    def grow(self, name: str, tokens: int, prompt_len: int) -> None:
        """Gives a request the pages for so many tokens; a new one is announced."""
        new = name not in self.tables
        tables = self.tables.setdefault(name, [[] for _ in self.layers])
        for table in tables:
            while len(table) * self.page_size < tokens:
                table.append(self.free.pop())
        if new:
            self.prompt_lens[name] = prompt_len
            self.requests.begin(name, prompt_len, [table[0] for table in tables])

    def give_back(self, name: str, tokens: int) -> int:
        """Spoils the pages that a request's sparse layers will not see again; returns how many."""
        request = self.requests.at(0, self.tables[name][0][0])
        spoilt = 0
        for layer, table in zip(self.layers, self.tables[name], strict=True):
            if request is not None and request.is_sparse(layer.index):
                first, last = hidden(layer.pattern, tokens, self.page_size)
                self.kv_cache[table[first:last]] = torch.nan
                spoilt += last - first
        return spoilt

    def inputs(self, spans: dict[str, tuple[int, int]]) -> tuple[list[Tensor], list[Tensor], list[Tensor], int]:
        """What the runner hands to a step that computes tokens ``[begin, end)`` of requests: lengths of queries and
        keys, per layer the page table, per layer the slots, and the most tokens of one request."""
        lengths = [0, *(end - begin for begin, end in spans.values())]
        width = max(len(self.tables[name][0]) for name in spans)
        tables, slots = [], []
        for layer in range(len(self.layers)):
            own = [self.tables[name][layer] for name in spans]
            tables.append(torch.tensor([pages + [0] * (width - len(pages)) for pages in own], dtype=torch.int32))
            places = []
            for pages, (begin, end) in zip(own, spans.values(), strict=True):
                positions = torch.arange(begin, end)
                places.append(
                    torch.tensor(pages)[positions // self.page_size] * self.page_size + positions % self.page_size
                )
            slots.append(torch.cat(places).to(self.device))
        cu_seqlens = torch.tensor(lengths).cumsum(0).int().to(self.device)
        kv_len = torch.tensor([end for _, end in spans.values()]).int().to(self.device)
        self.requests.next_step(all(begin >= self.prompt_lens[name] for name, (begin, _) in spans.items()))
        return [cu_seqlens, kv_len], [table.to(self.device) for table in tables], slots, max(lengths)

    def run(
        self, inputs: tuple[list[Tensor], list[Tensor], list[Tensor], int], q: Tensor, k: Tensor, v: Tensor
    ) -> list[Tensor]:
        """One step through all layers, of which each gets the same ``[T, H, D]``; what they give."""
        lengths, tables, slots, longest = inputs
        out = []
        for layer, table, slot in zip(self.layers, tables, slots, strict=True):
            step: Step = self.steps.step(layer.index, *lengths, table, longest)
            layer.see(k if layer.router.per_head else q, step)
            store(k, v, *self.pages, slot)
            out.append(layer.attend(q, *self.pages, table, step, self.head_dim**-0.5))
        return out

    def random(self, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of so many tokens."""
        hq, hkv = self.heads
        return tuple(
            torch.randn(tokens, h, self.head_dim, device=self.device, dtype=self.dtype) for h in (hq, hkv, hkv)
        )


def timed(run: Callable[[], object], device: str, repeats: int) -> float:
    """Median seconds of a call, after one that does not count."""
    run()
    times = []
    for _ in range(repeats):
        if device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        else:
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def prefill(stand_in: StandIn, tokens: int, repeats: int) -> float:
    """Seconds of a step with one prompt, routers included."""
    q, k, v = stand_in.random(tokens)
    stand_in.grow("prompt", tokens, tokens)

    def anew() -> object:
        request = stand_in.requests.at(0, stand_in.tables["prompt"][0][0])
        assert request is not None
        request.routes.clear()  # so that it is routed as at first
        return stand_in.run(stand_in.inputs({"prompt": (0, tokens)}), q, k, v)

    return timed(anew, stand_in.device, repeats)


def decode(stand_in: StandIn, tokens: int, batch: int, repeats: int, graph: bool) -> float:
    """Seconds of a step with one token of each of ``batch`` requests whose prompts are done."""
    for i in range(batch):
        stand_in.grow(f"answer {i}", tokens + 1, tokens)
        request = stand_in.requests.at(0, stand_in.tables[f"answer {i}"][0][0])
        assert request is not None
        for layer in stand_in.layers:
            route = [stand_in.sparse[layer.index]] * (stand_in.heads[1] if layer.router.per_head else 1)
            stand_in.requests.decide(request, layer.index, tuple(route), 0)
    inputs = stand_in.inputs({f"answer {i}": (tokens, tokens + 1) for i in range(batch)})
    q, k, v = stand_in.random(batch)

    def step() -> object:
        return stand_in.run(inputs, q, k, v)

    if not graph:
        return timed(step, stand_in.device, repeats)
    step()  # writes the routes
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        step()
    return timed(captured.replay, stand_in.device, repeats)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048], help="of every prompt")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4], help="requests of a decode step")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, nargs=2, default=[32, 8], help="of queries, of keys and values")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--page", type=int, default=16)
    parser.add_argument("--order", choices=ORDERS, default="NH")
    parser.add_argument("--sink", type=int, default=128)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--granularity", choices=("layer", "head"), default="layer")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--graph", action="store_true", help="decode steps as a CUDA graph")
    given = parser.parse_args(arguments)
    if given.graph and given.device != "cuda":
        parser.error("--graph needs --device cuda")
    config = FluxConfig(
        sink=given.sink, window=given.window, granularity=given.granularity, num_layers=given.layers,
        head_dim=given.head_dim, num_kv_heads=given.heads[1],
    )  # fmt: skip
    print("| tokens | requests | sparse layers | prompt (ms) | decode step (ms) |\n" + "| --- " * 5 + "|")
    for tokens in given.tokens:
        for sparse in (0, given.layers // 2, given.layers):
            for batch in given.batch:
                pages = given.layers * (-(-(tokens + 1) // given.page)) * (batch + 1) + 1
                routes = [0] * (given.layers - sparse) + [1] * sparse
                stand_in = StandIn(config, routes, tuple(given.heads), pages, given.page, given.order, given.device)
                first = f"{prefill(stand_in, tokens, given.repeats) * 1e3:.2f}" if batch == given.batch[0] else ""
                step = decode(stand_in, tokens, batch, given.repeats, given.graph) * 1e3
                print(f"| {tokens} | {batch} | {sparse} of {given.layers} | {first} | {step:.3f} |", flush=True)


if __name__ == "__main__":
    main()
