"""Serving without vLLM: what a step does with requests, routes and pages, against dense masks.

A pager that stands for vLLM's hands out pages, takes back those that are out of sight and spoils what it took. What
vLLM itself does is in test_serving_vllm.py.
"""

import math
import os
import random
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import flux_ext_vllm
from flux_ext import FluxConfig, FluxRouters, Streaming, Triangle
from flux_ext.operators.patterns import dense_mask
from flux_ext.serving.layers import RoutedLayer, refuse_modes
from flux_ext.serving.pages import pages_of, store
from flux_ext.serving.requests import NULL_PAGE, Requests, RouteTable
from flux_ext.serving.steps import AnswerStep, PromptStep, Row, Steps
from flux_ext.serving.visible_pages import Span, hidden, hidden_pages, split

HEADS, KV_HEADS, DIM = 4, 2, 16


def test_unset_nothing_is_imported(monkeypatch):
    monkeypatch.setattr("builtins.__import__", None)
    monkeypatch.delenv(flux_ext_vllm.ROUTERS_VARIABLE, raising=False)
    flux_ext_vllm.register()
    monkeypatch.setenv(flux_ext_vllm.ROUTERS_VARIABLE, "")
    flux_ext_vllm.register()


def test_a_package_that_cannot_be_imported_is_said_when_the_plugin_is_called(tmp_path):
    """Not when it is imported: vLLM only logs that. Here the sources of a checkout are found first, without what a
    build puts there."""
    (tmp_path / "flux_ext").mkdir()
    (tmp_path / "flux_ext" / "__init__.py").write_text("raise ImportError('nothing was built')")
    code = "import sys, flux_ext_vllm\nassert 'flux_ext' not in sys.modules\nflux_ext_vllm.register()\n"
    environment = {"PYTHONPATH": str(Path(flux_ext_vllm.__file__).parent), flux_ext_vllm.ROUTERS_VARIABLE: "some"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and done.stderr.endswith("ImportError: nothing was built\n"), done.stderr


# --- Which tokens and pages are seen.


def test_a_prompt_in_one_chunk_is_sparse_from_its_first_token():
    assert split(0, 300, 0, 300, 0) == [Span(0, 300, True)]
    assert split(300, 301, 0, 300, 0) == [Span(300, 301, True)]


def test_chunks_before_the_decision_and_the_last_rows_are_dense():
    assert split(0, 512, 512, 700, 100) == [Span(0, 512, False)]
    assert split(512, 700, 512, 700, 100) == [Span(512, 600, True), Span(600, 700, False)]
    assert split(0, 720, 512, 700, 100) == [
        Span(0, 512, False),
        Span(512, 600, True),
        Span(600, 700, False),
        Span(700, 720, True),
    ]
    assert split(512, 700, 512, 700, 400) == [Span(512, 700, False)]


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(0, 60), st.integers(0, 20), st.data())
def test_spans_are_the_rows_of_the_dense_mask(prompt_len, dense_until, last_q, data):
    """However a request is cut into steps, each token attends in one way."""
    dense_until = min(dense_until, prompt_len)
    total = prompt_len + data.draw(st.integers(0, 20))
    cuts = sorted({0, total, *data.draw(st.lists(st.integers(0, total), max_size=6))})
    sparse: list[bool] = []
    for begin, end in pairwise(cuts):
        spans = split(begin, end, dense_until, prompt_len, last_q)
        assert spans[0].begin == begin and spans[-1].end == end
        assert all(a.end == b.begin and a.sparse != b.sparse for a, b in pairwise(spans))
        sparse += [s.sparse for s in spans for _ in range(s.begin, s.end)]
    expected = [p >= dense_until and (p >= prompt_len or p < prompt_len - last_q) for p in range(total)]
    assert sparse == expected


@settings(deadline=None)
@given(st.integers(0, 50), st.integers(1, 40), st.sampled_from([1, 4, 16]), st.integers(1, 40), st.integers(0, 400))
def test_hidden_pages_are_those_that_no_later_query_sees(sink, blocks, align, page_size, position):
    pattern = Streaming(sink, blocks * align, align)
    first, last = hidden(pattern, position, page_size)
    later = dense_mask(pattern, 120, position + 120).any(0)  # of the queries from position on
    seen = [bool(later[j : j + page_size].any()) for j in range(0, position, page_size)]
    for page, visible in enumerate(seen):
        whole = (page + 1) * page_size <= position
        assert (first <= page < last) == (not visible and whole and page > 0), page
    on_device = hidden_pages(pattern, torch.tensor([position, 0]).int(), page_size, len(seen) + 2)
    assert on_device.tolist() == [[first <= page < last for page in range(len(seen) + 2)], [False] * (len(seen) + 2)]


# --- Requests.


def test_a_request_is_found_by_its_first_page_until_it_ends():
    requests = Requests()
    requests.begin("a", 10, (3, 4))
    requests.begin("b", 20, (4, 3))
    assert requests.at(0, 3).name == "a" and requests.at(1, 3).name == "b" and requests.at(0, NULL_PAGE) is None
    requests.end("a")
    requests.end("never seen")
    assert len(requests) == 1
    with pytest.raises(RuntimeError, match="page 3 of group 0 is the first of no request"):
        requests.at(0, 3)


def test_a_preempted_request_keeps_its_routes_and_not_its_pages():
    requests = Requests()
    requests.begin("a", 10, (3,))
    requests.decide(requests.at(0, 3), 0, (1,), 0)
    assert [r.name for r in requests.take_decided()] == ["a"] and requests.take_decided() == []
    requests.begin("b", 20, (3,))  # has the page of a, which was preempted
    requests.begin("a", 10, (5,))
    assert requests.at(0, 3).name == "b"
    assert requests.at(0, 5).routes == {0: (1,)} and requests.take_decided() == []
    with pytest.raises(RuntimeError, match="layer 0 of request a has a route"):
        requests.decide(requests.at(0, 5), 0, (0,), 0)
    requests.end("b")
    requests.end("a")
    assert len(requests) == 0


# --- A layer over pages.


class Pager:
    """Pages of one layer for several requests, as a scheduler and its workers have them; ``heads_first``: in memory, as
    vLLM's build for CPUs has it."""

    def __init__(self, page_size: int, pages: int, dtype: torch.dtype, heads_first: bool = True) -> None:
        shape = (KV_HEADS, page_size) if heads_first else (page_size, KV_HEADS)
        self.memory = torch.full((pages, *shape, 2 * DIM), math.nan, dtype=dtype)
        self.k, self.v = pages_of(self.memory if heads_first else self.memory.transpose(1, 2))
        self.free = list(range(1, pages))
        self.tables: dict[str, list[int]] = {}  # the worker's: it is not told of pages that were taken
        self.owned: dict[str, dict[int, int]] = {}  # what the scheduler knows: by position, a page may come back

    def grow(self, name: str, tokens: int) -> None:
        table = self.tables.setdefault(name, [])
        while len(table) * self.k.shape[1] < tokens:
            table.append(self.free.pop(0))
            self.owned.setdefault(name, {})[len(table) - 1] = table[-1]

    def store(self, name: str, begin: int, k: torch.Tensor, v: torch.Tensor) -> None:
        places = (divmod(begin + i, self.k.shape[1]) for i in range(len(k)))
        slots = [self.tables[name][page] * self.k.shape[1] + place for page, place in places]
        padded = [torch.cat([x, torch.full_like(x[:1], math.nan)]) for x in (k, v)]  # a row that has no slot
        store(*padded, self.k, self.v, torch.tensor([*slots, -1]))

    def take(self, name: str, pages: range) -> None:
        """Takes pages back and spoils them."""
        for page in [self.owned[name].pop(i) for i in pages if i in self.owned[name]]:
            self.memory[page] = math.nan
            self.free.append(page)

    def drop(self, name: str) -> None:
        self.take(name, range(len(self.tables[name])))
        del self.tables[name]


def spread_router(
    per_head: bool, pool_size: int, pattern: str = "streaming", **fields
) -> tuple[FluxConfig, torch.nn.Module]:
    """A router whose decisions differ among prompts."""
    granularity = "head" if per_head else "layer"
    config = FluxConfig(
        pattern=pattern, granularity=granularity, num_layers=1, head_dim=DIM, pool_size=pool_size, **fields
    )
    router = FluxRouters(config).layers[0]
    with torch.no_grad():
        router.encoder[0].weight.mul_(40)
        router.classifier[4].weight.mul_(40)
        router.classifier[4].bias.zero_()
    return config, router


def twin(q, k, v, pattern, sparse, dense_until, prompt_len, last_q):
    """Attention of all tokens of one request at once, ``sparse`` one bool per KV head, by dense masks in fp64."""
    n = len(q)
    streaming = dense_mask(pattern, n, n)
    p = torch.arange(n)[:, None]
    everything = torch.ones(n, n, dtype=torch.bool).tril()
    dense_rows = (p < dense_until) | ((p >= prompt_len - last_q) & (p < prompt_len))
    out = torch.empty_like(q, dtype=torch.float64)
    group = q.shape[1] // k.shape[1]
    for h in range(q.shape[1]):
        visible = torch.where(dense_rows, everything, streaming) if sparse[h // group] else everything
        scores = q[:, h].double() @ k[:, h // group].double().T * DIM**-0.5
        out[:, h] = scores.masked_fill(~visible, -math.inf).softmax(-1) @ v[:, h // group].double()
    return out


def one_layer(config, router, pages: int) -> tuple[Requests, Steps, RoutedLayer]:
    """A worker whose model has one layer."""
    requests = Requests()
    requests.groups[0] = 0
    requests.table = RouteTable(pages, KV_HEADS if router.per_head else 1, "cpu")
    return requests, Steps(requests, config), RoutedLayer(0, router, config, requests)


@pytest.mark.parametrize("per_head", [False, True], ids=["layer", "head"])
@pytest.mark.parametrize("pattern", ["streaming", "triangle"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_requests_in_any_steps_attend_as_by_dense_masks(per_head, pattern, dtype):
    """Many requests of different lengths in random steps: chunks, single tokens, preemption and computation anew,
    pages taken back and given to others, spoilt in between."""
    choose = random.Random(per_head * 2 + (pattern == "triangle"))
    config, router = spread_router(per_head, 8, pattern, sink=5, window=24, align=8, last_q=20)
    last_q = config.last_q if pattern == "triangle" else 0
    requests, steps, layer = one_layer(config, router, pages=200)
    pager = Pager(page_size=8, pages=200, dtype=dtype, heads_first=per_head)
    whole: dict[str, dict] = {}
    for i in range(12):
        prompt_len, total = (n := choose.randint(1, 150)), n + choose.randint(1, 60)
        x = {name: torch.randn(total, h, DIM).to(dtype) for name, h in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS))}
        x["k"] += torch.randn(KV_HEADS, DIM).to(dtype)  # so that prompts differ in what a router sees
        x["q"] += torch.randn(HEADS, DIM).to(dtype)
        whole[f"r{i}"] = x | {"prompt_len": prompt_len, "total": total, "done": 0, "out": torch.zeros_like(x["q"])}
    chunked = sparse_seen = freed = of_answers = 0
    routes: dict[str, tuple] = {}
    while unfinished := [name for name, x in whole.items() if x["done"] < x["total"]]:
        rows, packed, tables = [], {"q": [], "k": []}, []
        for name in choose.sample(unfinished, min(4, len(unfinished))):
            x = whole[name]
            if name in pager.tables and choose.random() < 0.05:  # preempted
                pager.drop(name)
                x["done"] = 0
                continue
            if x["done"] < x["prompt_len"]:
                count = choose.choice([x["prompt_len"] - x["done"], choose.randint(1, x["prompt_len"] - x["done"])])
            elif name not in pager.tables:
                count = x["total"]
            else:
                count = 1
            if x["done"] == 0 and name in routes:  # computed anew, beyond the prompt in one step
                count = choose.randint(1, x["total"])
            begin, end = x["done"], min(x["done"] + count, x["total"])
            new = name not in pager.tables
            pager.grow(name, end)
            if new:
                requests.begin(name, x["prompt_len"], (pager.tables[name][0],))
            pager.store(name, begin, x["k"][begin:end], x["v"][begin:end])
            for part in packed:
                packed[part].append(x[part][begin:end])
            rows.append((name, begin, end))
            x["done"] = end
        if not rows:
            continue
        width = max(len(pager.tables[name]) for name, *_ in rows)
        tables = [pager.tables[name] + [NULL_PAGE] * (width - len(pager.tables[name])) for name, *_ in rows]
        lengths = torch.tensor([0, *(end - begin for _, begin, end in rows)]).cumsum(0).int()
        kv_len = torch.tensor([end for *_, end in rows]).int()
        requests.next_step(all(begin >= whole[name]["prompt_len"] for name, begin, _ in rows))
        page_table = torch.tensor(tables).int()
        step = steps.step(0, lengths, kv_len, page_table, max(end - begin for _, begin, end in rows))
        of_answers += isinstance(step, AnswerStep)
        q, k = torch.cat(packed["q"]), torch.cat(packed["k"])
        layer.see(k if per_head else q, step)
        out = layer.attend(q, pager.k, pager.v, page_table, step, DIM**-0.5)
        for name, begin, end in rows:
            x = whole[name]
            x["out"][begin:end] = out[: end - begin]
            out = out[end - begin :]
            request = requests.at(0, pager.tables[name][0])
            if end >= x["prompt_len"]:
                route = routes.setdefault(name, (request.routes[0], request.dense_until))
                assert route == (request.routes[0], request.dense_until)  # for ever
                chunked += request.dense_until > 0
                if request.is_sparse(0):
                    first, last = hidden(layer.pattern, end, 8)
                    pager.take(name, range(first, min(last, len(pager.tables[name]))))
                    freed += max(last - first, 0)
        for name in [name for name in pager.tables if whole[name]["done"] == whole[name]["total"]]:
            pager.drop(name)
            requests.end(name)
    assert len(requests) == 0 and sorted(pager.free) == list(range(1, 200))
    for name, x in whole.items():
        route, dense_until = routes[name]
        states = (x["k"] if per_head else x["q"])[: x["prompt_len"]]
        expected_route = router.decide(states[None])[1][0].tolist()
        assert list(route) == (expected_route if per_head else [expected_route]), name
        sparse = [bool(r) for r in (route if per_head else route * KV_HEADS)]
        sparse_seen += any(sparse)
        expected = twin(x["q"], x["k"], x["v"], layer.pattern, sparse, dense_until, x["prompt_len"], last_q)
        bound = 2e-6 if dtype == torch.float32 else 3e-2
        assert (x["out"].double() - expected).abs().max() < bound, (name, route, dense_until)
    assert chunked and freed and of_answers and 0 < sparse_seen < 12  # the cases meant were there


@pytest.mark.parametrize("only_answers", [True, False])
def test_pages_that_were_given_back_are_never_loaded(only_answers):
    """A kernel loads whole blocks of keys; beside the visible ones may lie another request's, or NaN."""
    config, router = spread_router(False, 4, sink=8, window=16)
    requests, steps, layer = one_layer(config, router, pages=20)
    pager = Pager(page_size=8, pages=20, dtype=torch.float32)
    pager.grow("a", 100)
    requests.begin("a", 99, (pager.tables["a"][0],))
    requests.decide(requests.at(0, pager.tables["a"][0]), 0, (1,), 0)
    k, v, q = torch.randn(100, KV_HEADS, DIM), torch.randn(100, KV_HEADS, DIM), torch.randn(1, HEADS, DIM)
    pager.store("a", 0, k, v)
    page_table = torch.tensor([pager.tables["a"]]).int()
    requests.next_step(only_answers)
    step = steps.step(0, torch.tensor([0, 1]).int(), torch.tensor([100]).int(), page_table, 1)
    assert isinstance(step, AnswerStep if only_answers else PromptStep)
    before = layer.attend(q, pager.k, pager.v, page_table, step, 0.25)
    first, last = hidden(layer.pattern, 99, 8)
    assert (first, last) == (1, 10)
    pager.take("a", range(first, last))
    assert torch.equal(layer.attend(q, pager.k, pager.v, page_table, step, 0.25), before)
    assert before.isfinite().all()


def test_a_step_is_made_once_for_all_layers_and_planned_once_for_each_of_their_routes():
    config, _router = spread_router(False, 4, sink=8, window=16)
    requests = Requests()
    for name, page, routes in (("a", 1, (1, 0, 1, 0)), ("b", 9, (1, 1, 1, 0))):
        requests.begin(name, 100, (page,))
        for layer, route in enumerate(routes):
            requests.decide(requests.at(0, page), layer, (route,), 0)
    cu_seqlens, kv_len = torch.tensor([0, 100, 200]).int(), torch.tensor([100, 100]).int()
    page_table = torch.stack([torch.arange(1, 17), torch.arange(9, 25)]).int()
    steps = Steps(requests, config)
    requests.next_step(False)
    step = steps.step(0, cu_seqlens, kv_len, page_table, 100)
    assert steps.step(1, cu_seqlens, kv_len, page_table + 99, 100) is step  # first pages that nobody announced
    plans = [step.plan(layer, 8, page_table) for layer in range(4)]
    assert plans[0] is plans[2] and len({id(plan) for plan in plans}) == 3
    assert plans[0].visible(page_table).tolist()[0] == page_table[0].tolist()  # the first query sees everything before
    requests.next_step(False)  # vLLM may have written the next step into the same tensors
    assert steps.step(0, cu_seqlens, kv_len, page_table, 100) is not step


def test_a_request_that_is_computed_anew_has_its_routes_by_its_new_first_page():
    requests = Requests()
    requests.groups.update({5: 0, 7: 1})
    requests.table = RouteTable(20, 2, "cpu")
    requests.begin("a", 10, (3, 4))
    requests.decide(requests.at(0, 3), 5, (1, 0), 0)
    requests.decide(requests.at(0, 3), 7, (1, 1), 0)
    requests.next_step(True)
    assert requests.routes_at(torch.tensor([4, 3, NULL_PAGE])).tolist() == [[1, 1], [1, 0], [0, 0]]
    requests.begin("a", 10, (9, 8))
    requests.begin("b", 10, (3, 4))
    requests.decide(requests.at(0, 3), 5, (0, 0), 0)
    requests.next_step(True)
    assert requests.routes_at(torch.tensor([9, 8, 3])).tolist() == [[1, 0], [1, 1], [0, 0]]


def test_a_router_that_was_not_asked_is_no_full_route():
    """A model may rotate its queries elsewhere than where its router looks."""
    config, router = spread_router(False, 4, sink=8, window=16)
    requests, steps, layer = one_layer(config, router, pages=20)
    requests.begin("a", 30, (1,))
    q, pages, page_table = (
        torch.randn(20, HEADS, DIM),
        torch.zeros(20, 8, KV_HEADS, DIM),
        torch.arange(1, 5)[None].int(),
    )
    for begin, end in ((0, 20), (20, 30)):
        requests.next_step(False)
        step = steps.step(0, torch.tensor([0, end - begin]).int(), torch.tensor([end]).int(), page_table, end - begin)
        if end < 30:
            layer.attend(q, pages, pages, page_table, step, 0.25)
        else:
            with pytest.raises(RuntimeError, match="the router of layer 0 did not see the prompt of request a"):
                layer.attend(q[: end - begin], pages, pages, page_table, step, 0.25)


class RecordingRouter:
    """A router that routes everything sparse, and its logits."""

    def __init__(self, router, seen):
        self.router, self.seen, self.pool_size = router, seen, router.pool_size

    def decide(self, *args):
        self.seen.append(self.router.decide(*args)[0])
        return self.seen[-1], torch.tensor([1])


def test_a_short_prompt_in_chunks_is_pooled_as_a_whole():
    """Below twice the pool size both ends overlap, and count twice where they do."""
    config, router = spread_router(False, 8, sink=4, window=16)
    for length in (1, 7, 8, 9, 15, 16, 17, 40):
        states = torch.randn(length, HEADS, DIM)
        whole = router.decide(states[None])[0]
        requests = Requests()
        layer = RoutedLayer(0, router, config, requests)
        seen = []
        layer.router = RecordingRouter(router, seen)
        requests.begin("a", length, (1,))
        done = 0
        for size in (5, 3, 6, 1, 30):
            end = min(done + size, length)
            step = PromptStep([Row(requests.at(0, 1), 0, end - done, done, end)], config.streaming(), 0)
            layer.see(states[done:end], step)
            done = end
        assert len(seen) == 1
        torch.testing.assert_close(seen[0], whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("only_answers", [True, False])
def test_rehearsals_without_requests_attend_fully(only_answers):
    config, router = spread_router(False, 8, sink=4, window=16)
    requests, steps, layer = one_layer(config, router, pages=3)
    requests.next_step(only_answers)
    page_table = torch.zeros(2, 4).int()
    step = steps.step(0, torch.tensor([0, 1, 2]).int(), torch.tensor([1, 0]).int(), page_table, 1)
    q, pages = torch.randn(2, HEADS, DIM), torch.zeros(3, 8, KV_HEADS, DIM)
    layer.see(q, step)
    assert torch.equal(layer.attend(q, pages, pages, page_table, step, 0.25), torch.zeros_like(q))
    empty = PromptStep([], layer.pattern, 0)
    assert torch.equal(layer.attend(q, pages, pages, page_table[:0], empty, 0.25), torch.zeros_like(q))


def test_a_rehearsal_between_steps_belongs_to_no_request():
    """vLLM's runner for GPUs warms up with page tables of requests that it makes up, and its connector is not told."""
    config, router = spread_router(False, 8, sink=4, window=16)
    requests, steps, layer = one_layer(config, router, pages=8)
    pager = Pager(page_size=8, pages=8, dtype=torch.float32)
    pager.grow("made up", 21)
    k, v, q = torch.randn(21, KV_HEADS, DIM), torch.randn(21, KV_HEADS, DIM), torch.randn(21, HEADS, DIM)
    pager.store("made up", 0, k, v)
    page_table = torch.tensor([pager.tables["made up"]]).int()

    def run(begin, end):
        step = steps.step(0, torch.tensor([0, end - begin]).int(), torch.tensor([end]).int(), page_table, end - begin)
        layer.see(q[begin:end], step)
        return layer.attend(q[begin:end], pager.k, pager.v, page_table, step, DIM**-0.5)

    expected = twin(q, k, v, layer.pattern, [False] * KV_HEADS, 0, 21, 0)
    for _ in range(2):  # before the first step and after one
        assert (run(0, 20).double() - expected[:20]).abs().max() < 2e-6
        assert (run(20, 21).double() - expected[20:]).abs().max() < 2e-6
        requests.next_step(True)
        requests.end_step()
    requests.next_step(False)
    with pytest.raises(RuntimeError, match="is the first of no request"):
        run(0, 20)


@pytest.mark.parametrize("preset, name", [("fa-xa", "pattern"), ("xa-ssa", "full"), ("fa-ssa", "decode")])
def test_modes_that_are_not_served_are_refused(preset, name):
    config = FluxConfig.preset(preset, **({"decode": "dense"} if name == "decode" else {}))
    with pytest.raises(ValueError, match=rf"routers with {name}='\w+' are not served: {name} must be one of"):
        refuse_modes(config)
    refuse_modes(FluxConfig.preset("fa-ta"))


def test_triangle_is_streaming_with_dense_last_rows():
    """The pattern that the operators have for whole prompts says the same as spans."""
    pattern = Triangle(sink=4, window=16, last_q=10, align=8)
    mask = dense_mask(pattern, 60, 60)
    streaming = dense_mask(pattern.decode(), 60, 60)
    for begin, end, sparse in split(0, 60, 0, 60, 10):
        expected = streaming if sparse else torch.ones(60, 60, dtype=torch.bool).tril()
        assert torch.equal(mask[begin:end], expected[begin:end])
