"""The code that serves a step, without vLLM: driven as vLLM's runner drives it, on the CPU or a GPU.

    python -m benchmarks serving_steps                                        # in small, on the CPU
    python -m benchmarks serving_steps --device cuda --tokens 32768 131072 --batch 1 8 64 --graph

Its page tables, its pages in any of its orders in memory and its requests stand here; what is timed is the package's
own: steps, routes by first page, stores into pages, routers and attention. The rest of a model is not there: a figure
is that of the attention layers of a step, by device time on a GPU and wall time on a CPU. Prompts come one at a time,
each in one step.

The requests of a decode step hold what they would hold then, without their prompts being computed: of a sparse layer
the pages in sight, filled with random numbers; all others of its page table are one page of NaN. Where the full
layers' pages would not fit beside each other (``--gigabytes``), several full layers read the same ones, which are more
than a cache of the device holds.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from benchmarks.cuda.table import about
from flux_ext import FluxConfig, FluxRouters
from flux_ext.serving.layers import RoutedLayer
from flux_ext.serving.pages import pages_of, store
from flux_ext.serving.requests import NULL_PAGE, Request, Requests, RouteTable
from flux_ext.serving.steps import Step, Steps
from flux_ext.serving.visible_pages import hidden

ORDERS = {"HN": (0, 1, 2, 3), "NH": (0, 2, 1, 3), "H-outermost": (1, 0, 2, 3)}
"""How vLLM's layouts LBHNC, LBNHC and LHBNC order a layer's pages [B, H, N, C] in memory."""


GIVEN_BACK = 1
"""The page that stands for all that a request's sparse layers have given back: NaN, never given to a request."""


class StandIn:
    """A scheduler, a pool of pages and a runner, for the attention layers of a model.

    Args:
        config: of the routers, with ``num_layers`` and ``head_dim``; every layer is routed.
        sparse: 0 or 1 per layer, the route of every request.
        num_pages: of the pool, two of them no request's: :data:`NULL_PAGE` and :data:`GIVEN_BACK`.
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
        memory = torch.empty([shape[axis] for axis in ORDERS[order]], device=device, dtype=dtype).normal_()
        self.kv_cache = memory.permute([ORDERS[order].index(axis) for axis in range(4)])
        self.kv_cache[GIVEN_BACK] = torch.nan
        self.pages = pages_of(self.kv_cache)
        self.free = 2 + torch.randperm(num_pages - 2, dtype=torch.int32)
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
        self.tables: dict[str, list[Tensor]] = {}
        """Pages of a request, by layer. As in vLLM's worker, those that were given back are still named here."""

    def _take(self, count: int) -> Tensor:
        if count > len(self.free):
            raise ValueError(f"the pool has {len(self.free)} pages left, {count} are needed")
        taken, self.free = self.free[:count], self.free[count:]
        return taken

    def _announce(self, name: str, prompt_len: int) -> None:
        self.prompt_lens[name] = prompt_len
        self.requests.begin(name, prompt_len, [int(table[0]) for table in self.tables[name]])

    def grow(self, name: str, tokens: int, prompt_len: int) -> None:
        """Gives a request the pages for so many tokens; a new one is announced."""
        new = name not in self.tables
        tables = self.tables.setdefault(name, [torch.empty(0, dtype=torch.int32) for _ in self.layers])
        for layer, table in enumerate(tables):
            tables[layer] = torch.cat([table, self._take(-(-tokens // self.page_size) - len(table))])
        if new:
            self._announce(name, prompt_len)

    def answer(self, name: str, prompt_len: int, full_sets: int) -> None:
        """A request whose prompt is done and decided, with the pages that it holds for one more token.

        Args:
            full_sets: how many full layers have pages of their own; the next ones read theirs in turn.
        """
        pages = -(-(prompt_len + 1) // self.page_size)
        tables: list[Tensor] = []
        full: list[Tensor] = []
        for layer, sparse in zip(self.layers, self.sparse, strict=True):
            if sparse:
                first, last = hidden(layer.pattern, prompt_len, self.page_size)
                held = self._take(pages - (last - first))
                gone = torch.full((last - first,), GIVEN_BACK, dtype=torch.int32)
                tables.append(torch.cat([held[:first], gone, held[first:]]))
            else:
                if len(full) < full_sets:
                    full.append(self._take(pages))
                tables.append(full[sum(route == 0 for route in self.sparse[: layer.index]) % full_sets])
        self.tables[name] = tables
        self._announce(name, prompt_len)
        for layer in self.layers:
            route = (self.sparse[layer.index],) * (self.heads[1] if layer.router.per_head else 1)
            self.requests.decide(self.request(name), layer.index, route, 0)

    def request(self, name: str) -> Request:
        found = self.requests.at(0, int(self.tables[name][0][0]))
        assert found is not None
        return found

    def give_back(self, name: str, tokens: int) -> int:
        """Spoils the pages that a request's sparse layers will not see again; returns how many."""
        spoilt = 0
        for layer, table in zip(self.layers, self.tables[name], strict=True):
            if self.request(name).is_sparse(layer.index):
                first, last = hidden(layer.pattern, tokens, self.page_size)
                self.kv_cache[table[first:last].long()] = torch.nan
                spoilt += last - first
        return spoilt

    def inputs(self, spans: dict[str, tuple[int, int]]) -> tuple[list[Tensor], list[Tensor], list[Tensor], int]:
        """What the runner hands to a step that computes tokens ``[begin, end)`` of requests: lengths of queries and
        keys, per layer the page table, per layer the slots, and the most tokens of one request."""
        lengths = [0, *(end - begin for begin, end in spans.values())]
        tables, slots = [], []
        for layer in range(len(self.layers)):
            own = [self.tables[name][layer] for name in spans]
            tables.append(pad_sequence(own, batch_first=True, padding_value=NULL_PAGE).to(self.device))
            places = []
            for pages, (begin, end) in zip(own, spans.values(), strict=True):
                positions = torch.arange(begin, end)
                places.append(pages.long()[positions // self.page_size] * self.page_size + positions % self.page_size)
            slots.append(torch.cat(places).to(self.device))
        cu_seqlens = torch.tensor(lengths).cumsum(0).int().to(self.device)
        kv_len = torch.tensor([end for _, end in spans.values()]).int().to(self.device)
        self.requests.next_step(all(begin >= self.prompt_lens[name] for name, (begin, _) in spans.items()))
        return [cu_seqlens, kv_len], tables, slots, max(lengths)

    @torch.inference_mode()
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
    inputs = stand_in.inputs({"prompt": (0, tokens)})

    def anew() -> None:
        stand_in.request("prompt").routes.clear()  # so that it is routed as at first
        stand_in.requests.next_step(only_answers=False)
        stand_in.run(inputs, q, k, v)

    return timed(anew, stand_in.device, repeats)


def decode(
    stand_in: StandIn, tokens: int, batch: int, repeats: int, graph: bool, full_sets: int | None = None
) -> tuple[float, float | None]:
    """Seconds of a step with one token of each of ``batch`` requests whose prompts are done: called, and as a graph."""
    names = [f"answer {i}" for i in range(batch)]
    for name in names:
        stand_in.answer(name, tokens, full_sets or len(stand_in.layers))
    inputs = stand_in.inputs(dict.fromkeys(names, (tokens, tokens + 1)))
    q, k, v = stand_in.random(batch)

    def step() -> None:
        stand_in.requests.next_step(only_answers=True)
        stand_in.run(inputs, q, k, v)

    called = timed(step, stand_in.device, repeats)
    if not graph:
        return called, None
    captured = capture(step)
    return called, timed(captured.replay, stand_in.device, repeats)


def capture(step: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A step as a CUDA graph, once it ran as it is called."""
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        step()
    return captured


@dataclass(frozen=True)
class Measured:
    """What one row is of: ``layers`` layers, the last ``sparse`` of them sparse, and requests of so many tokens."""

    config: FluxConfig
    given: argparse.Namespace
    tokens: int
    sparse: int

    def stand_in(self, num_pages: int) -> StandIn:
        given, full = self.given, self.given.layers - self.sparse
        routes = [0] * full + [1] * self.sparse
        return StandIn(self.config, routes, tuple(given.heads), num_pages, given.page, given.order, given.device)

    @property
    def page_bytes(self) -> int:
        return 2 * 2 * self.given.page * self.given.heads[1] * self.given.head_dim

    def prefill(self) -> float:
        pages = self.given.layers * -(-self.tokens // self.given.page)
        return prefill(self.stand_in(pages + 2), self.tokens, self.given.repeats)

    def held(self) -> tuple[int, int]:
        """Pages of one request that answers, in a full and in a sparse layer."""
        full = -(-(self.tokens + 1) // self.given.page)
        first, last = hidden(self.config.streaming(), self.tokens, self.given.page)
        return full, full - (last - first)

    def decode(self, batch: int) -> tuple[float, float | None, float, float]:
        """Seconds of a step, called and as a graph; bytes that its attention reads; bytes that its requests hold."""
        full, sparse = self.held()
        full_layers = self.given.layers - self.sparse
        room = self.given.gigabytes * 1e9 / self.page_bytes - self.sparse * sparse * batch
        full_sets = max(1, min(full_layers, int(room // (full * batch))))
        pages = batch * (min(full_sets, full_layers) * full + self.sparse * sparse) + 2
        times = decode(self.stand_in(pages), self.tokens, batch, self.given.repeats, self.given.graph, full_sets)
        rows = full_layers * self.tokens + self.sparse * min(self.tokens, self.config.sink + self.config.window)
        held = batch * self.page_bytes * (full_layers * full + self.sparse * sparse)
        return *times, batch * rows * self.page_bytes / self.given.page, held


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048], help="of every prompt")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4], help="requests of a decode step")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--sparse", type=int, nargs="+", help="layers (default: none, half, all)")
    parser.add_argument("--heads", type=int, nargs=2, default=[32, 8], help="of queries, of keys and values")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--page", type=int, default=16)
    parser.add_argument("--order", choices=ORDERS, default="NH")
    parser.add_argument("--sink", type=int, default=128)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--granularity", choices=("layer", "head"), default="layer")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--graph", action="store_true", help="decode steps as a CUDA graph too")
    parser.add_argument("--gigabytes", type=float, default=100, help="most memory for the pages of a decode step")
    parser.add_argument("--only", choices=("prompts", "answers"), help="one kind of step")
    given = parser.parse_args(arguments)
    if given.graph and given.device != "cuda":
        parser.error("--graph needs --device cuda")
    numbers = given.sparse or [0, given.layers // 2, given.layers]
    if max(numbers) > given.layers:
        parser.error(f"--sparse must be at most the layers, {given.layers}, got {max(numbers)}")
    if min(numbers) < 0:
        parser.error(f"--sparse must not be negative, got {min(numbers)}")
    config = FluxConfig(
        sink=given.sink, window=given.window, granularity=given.granularity, num_layers=given.layers,
        head_dim=given.head_dim, num_kv_heads=given.heads[1],
    )  # fmt: skip
    command = shlex.join(["python", "-m", "benchmarks", "serving_steps", *(arguments or sys.argv[1:])])
    for name, value in {**about(given.device), "command": command}.items():
        print(f"# {name}: {value}")
    print("tokens,requests,sparse layers,prompt ms,step ms,step as a graph ms,read TB/s,pages held GB", flush=True)
    for tokens in given.tokens:
        for sparse in numbers:
            measured, case = Measured(config, given, tokens, sparse), f"{sparse} of {given.layers}"
            if given.only != "answers":
                print(f"{tokens},1,{case},{measured.prefill() * 1e3:.2f},,,,", flush=True)
            for batch in given.batch if given.only != "prompts" else ():
                called, graph, read, held = measured.decode(batch)
                rate = read / (graph or called) / 1e12
                shown = f"{graph * 1e3:.3f}" if graph else ""
                print(f"{tokens},{batch},{case},,{called * 1e3:.3f},{shown},{rate:.2f},{held / 1e9:.2f}", flush=True)


if __name__ == "__main__":
    main()
