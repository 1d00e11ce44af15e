"""What serves a step, driven as vLLM's runner drives it (benchmarks/serving_steps.py), against attention of each
request alone over contiguous keys in fp32 on the CPU. On a GPU too, where there is one."""

from pathlib import Path

import pytest
import torch

import flux_ext
from flux_ext import FluxConfig

if not (Path(__file__).parent.parent / "benchmarks").is_dir():
    pytest.skip("the stand-in for vLLM's runner is not part of the package", allow_module_level=True)

from benchmarks import serving_steps
from benchmarks.serving_steps import GIVEN_BACK, ORDERS, StandIn

HEADS, PAGE = (4, 2), 8
ROUTES = [0, 1, 1]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def stand_in(order: str, granularity: str, num_pages: int, device: str = "cpu") -> StandIn:
    dim, dtype = (64, torch.bfloat16) if device == "cuda" else (16, torch.float32)
    fields = {"num_layers": len(ROUTES), "head_dim": dim, "num_kv_heads": HEADS[1], "pool_size": 8}
    config = FluxConfig(sink=8, window=32, granularity=granularity, **fields)
    return StandIn(config, ROUTES, HEADS, num_pages, PAGE, order, device, dtype)


class Conversation:
    """Requests of a stand-in whose tokens are known, so that what comes out can be checked.

    Attributes:
        lengths: of the prompts.
        routes: of each request, per layer.
    """

    def __init__(self, served: StandIn) -> None:
        self.served, self.lengths, self.routes, self.tokens = served, {}, {}, {}

    def begin(self, name: str, length: int, routes: list[int]) -> None:
        self.lengths[name], self.routes[name], self.tokens[name] = length, routes, self.served.random(length + 4)
        for layer, route in zip(self.served.layers, routes, strict=True):
            with torch.no_grad():  # of every prompt from now on
                layer.router.classifier[4].bias.copy_(torch.tensor([0.0, -1.0 if route else 1.0]))

    def packed(self, spans: dict[str, tuple[int, int]]) -> list[torch.Tensor]:
        """Queries, keys and values of a step; the requests have pages for them."""
        for name, (_, end) in spans.items():
            self.served.grow(name, end, self.lengths[name])
        return [torch.cat([self.tokens[name][part][b:e] for name, (b, e) in spans.items()]) for part in range(3)]

    def check(self, spans: dict[str, tuple[int, int]], layers: list[torch.Tensor]) -> None:
        """Every layer's rows."""
        bound = {"rtol": 1e-5, "atol": 1e-5} if layers[0].dtype == torch.float32 else {"rtol": 1.6e-2, "atol": 8e-3}
        pattern = self.served.steps.pattern
        for layer, out in enumerate(layers):
            alone = []
            for name, (begin, end) in spans.items():
                q, k, v = (x[None, :end].float().cpu() for x in self.tokens[name])
                route = torch.tensor([self.routes[name][layer]])
                alone.append(flux_ext.attention(q[:, begin:], k, v, route, sparse=pattern)[0])
            torch.testing.assert_close(out.float().cpu(), torch.cat(alone), **bound)

    def step(self, spans: dict[str, tuple[int, int]]) -> None:
        packed = self.packed(spans)
        self.check(spans, self.served.run(self.served.inputs(spans), *packed))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("batch", [1, 5, 64])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("granularity", ["layer", "head"])
def test_steps_over_pages_are_attention_over_contiguous_keys(order, batch, granularity, device):
    torch.manual_seed(0)
    served = stand_in(order, granularity, 3000, device)
    requests = Conversation(served)
    for i in range(batch):
        requests.begin(f"r{i}", 20 + (37 * i) % 100, ROUTES)
    lengths = dict(requests.lengths)
    requests.step({name: (0, length) for name, length in lengths.items()})
    given_back = sum(served.give_back(name, length) for name, length in lengths.items())
    assert given_back or batch == 1
    for new in range(2):
        requests.step({name: (length + new, length + new + 1) for name, length in lengths.items()})
    requests.begin("late", 50, ROUTES)  # a prompt beside an answer
    requests.step({"r0": (lengths["r0"] + 2, lengths["r0"] + 3), "late": (0, 50)})


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("granularity", ["layer", "head"])
def test_a_captured_step_serves_other_requests_when_its_tensors_change(granularity, device):
    """As a CUDA graph on a GPU: other lengths, page tables and slots in the same memory, other requests with other
    routes, rows of padding. On the CPU the step is called again."""
    torch.manual_seed(0)
    served = stand_in("NH", granularity, 400, device)
    requests = Conversation(served)
    for i in range(4):
        requests.begin(f"r{i}", 60 + 31 * i, ROUTES)
    requests.step({name: (0, length) for name, length in requests.lengths.items()})
    for name, length in requests.lengths.items():
        served.give_back(name, length)
    requests.begin("late", 77, [1, 0, 1])
    requests.step({"late": (0, 77)})
    served.give_back("late", 77)

    rows, width = 5, 40  # of the graph: more than any step needs

    def padded(spans):
        """A step's tensors as a runner pads them for a graph."""
        packed = requests.packed(spans)
        (_, kv_len), tables, slots, _ = served.inputs(spans)
        missing = rows - len(kv_len)
        zeros = [torch.zeros(rows, width, dtype=torch.int32, device=device) for _ in tables]
        for wide, table in zip(zeros, tables, strict=True):
            wide[: len(table), : table.shape[1]] = table
        return [
            torch.arange(rows + 1, dtype=torch.int32, device=device),
            torch.cat([kv_len, kv_len.new_zeros(missing)]),
            *zeros,
            *(torch.cat([slot, slot.new_full((missing,), -1)]) for slot in slots),
            *(torch.cat([x, x.new_full((missing, *x.shape[1:]), torch.nan)]) for x in packed),
        ]

    first = {f"r{i}": (60 + 31 * i, 61 + 31 * i) for i in range(4)}
    buffers = padded(first)
    count = len(ROUTES)
    outputs = []

    def run():
        served.requests.next_step(only_answers=True)
        inputs = buffers[:2], buffers[2 : 2 + count], buffers[2 + count : 2 + 2 * count], 1
        outputs[:] = served.run(inputs, *buffers[-3:])

    run()
    requests.check(first, [out[:4] for out in outputs])
    replay = serving_steps.capture(run).replay if device == "cuda" else run
    second = {"late": (77, 78), "r3": (154, 155), "r1": (92, 93), "r0": (61, 62)}
    third = {name: (begin + 1, end + 1) for name, (begin, end) in list(second.items())[:2]}
    for spans in (second, third):
        for name, (begin, _) in spans.items():
            served.give_back(name, begin)
        for buffer, changed in zip(buffers, padded(spans), strict=True):
            buffer.copy_(changed)
        replay()
        requests.check(spans, [out[: len(spans)] for out in outputs])
        assert all(not out[len(spans) :].any() for out in outputs)


@pytest.mark.parametrize("granularity", ["layer", "head"])
def test_a_step_of_answers_reads_nothing_back(granularity):
    """On a device whose tensors have no values to read; a step with prompts does read its lengths."""
    served = stand_in("NH", granularity, 200, device="meta")
    assert serving_steps.decode(served, 40, batch=3, repeats=1, graph=False)[0] > 0
    served.grow("prompt", 20, 20)
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        served.run(served.inputs({"prompt": (0, 20)}), *served.random(20))


def test_requests_that_answer_hold_what_they_see():
    served = stand_in("NH", "layer", 100)
    served.answer("a", 99, full_sets=1)
    full, sparse, other = served.tables["a"]
    assert len(full) == len(sparse) == 13 and GIVEN_BACK not in full
    assert [page == GIVEN_BACK for page in sparse.tolist()] == [False, *[True] * 7, *[False] * 5]
    assert not {*full.tolist(), *sparse.tolist()} & {*other.tolist()} - {GIVEN_BACK}
    out = served.run(served.inputs({"a": (99, 100)}), *served.random(1))
    assert all(x.isfinite().all() for x in out)
    with pytest.raises(ValueError, match="the pool has 4 pages left, 6 are needed"):
        for i in range(9):
            served.answer(f"b{i}", 99, full_sets=1)


def test_the_table_of_times(capsys):
    small = ["--tokens", "40", "--batch", "1", "3", "--layers", "2", "--heads", "2", "1", "--head-dim", "16"]
    serving_steps.main([*small, "--sink", "4", "--window", "16", "--repeats", "1"])
    *about, columns = capsys.readouterr().out.split("tokens,requests,")
    assert "# command: python -m benchmarks serving_steps --tokens 40" in about[0]
    rows = [row.split(",") for row in columns.splitlines()[1:]]
    assert len(rows) == 3 * (1 + 2) and rows[0][:3] == ["40", "1", "0 of 2"] and {len(row) for row in rows} == {8}
    with pytest.raises(SystemExit):
        serving_steps.main(["--graph"])
    with pytest.raises(SystemExit):
        serving_steps.main([*small, "--sparse", "3"])
    with pytest.raises(SystemExit):
        serving_steps.main([*small, "--sparse", "-1"])
    assert "--sparse must not be negative, got -1" in capsys.readouterr().err
