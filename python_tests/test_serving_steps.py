"""What serves a step, driven as vLLM's runner drives it (benchmarks/serving_steps.py), against attention of each
request alone over contiguous keys."""

from pathlib import Path

import pytest
import torch

import flux_ext
from flux_ext import FluxConfig

if not (Path(__file__).parent.parent / "benchmarks").is_dir():
    pytest.skip("the stand-in for vLLM's runner is not part of the package", allow_module_level=True)

from benchmarks import serving_steps
from benchmarks.serving_steps import ORDERS, StandIn

HEADS, DIM, PAGE = (4, 2), 16, 8
ROUTES = [0, 1, 1]


def stand_in(order: str, granularity: str, num_pages: int, device: str = "cpu") -> StandIn:
    fields = {"num_layers": len(ROUTES), "head_dim": DIM, "num_kv_heads": HEADS[1], "pool_size": 8}
    config = FluxConfig(sink=8, window=32, granularity=granularity, **fields)
    return StandIn(config, ROUTES, HEADS, num_pages, PAGE, order, device, torch.float32)


@pytest.mark.parametrize("batch", [1, 5, 64])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("granularity", ["layer", "head"])
def test_steps_over_pages_are_attention_over_contiguous_keys(order, batch, granularity):
    torch.manual_seed(0)
    served = stand_in(order, granularity, num_pages=3000)
    pattern = served.steps.pattern
    lengths = {f"r{i}": 20 + (37 * i) % 100 for i in range(batch)}
    tokens = {name: served.random(length + 3) for name, length in lengths.items()}

    def step(spans):
        """Runs it and compares every layer's rows."""
        for name, (_, end) in spans.items():
            served.grow(name, end, lengths[name])
        packed = [torch.cat([tokens[name][part][b:e] for name, (b, e) in spans.items()]) for part in range(3)]
        layers = served.run(served.inputs(spans), *packed)
        for route, out in zip(ROUTES, layers, strict=True):
            alone = []
            for name, (begin, end) in spans.items():
                q, k, v = (x[None, :end] for x in tokens[name])
                alone.append(flux_ext.attention(q[:, begin:], k, v, torch.tensor([route]), sparse=pattern)[0])
            torch.testing.assert_close(out, torch.cat(alone), rtol=1e-5, atol=1e-5)

    step({name: (0, length) for name, length in lengths.items()})
    given_back = sum(served.give_back(name, length) for name, length in lengths.items())
    assert given_back or batch == 1
    for new in range(2):
        step({name: (length + new, length + new + 1) for name, length in lengths.items()})
    first = next(iter(lengths))  # beside a prompt that came later
    lengths["late"], tokens["late"] = 50, served.random(50)
    step({first: (lengths[first] + 2, lengths[first] + 3), "late": (0, 50)})


@pytest.mark.parametrize("granularity", ["layer", "head"])
def test_a_step_of_answers_reads_nothing_back(granularity):
    """On a device whose tensors have no values to read; a step with prompts does read its lengths."""
    served = stand_in("NH", granularity, 200, device="meta")
    assert serving_steps.decode(served, 40, batch=3, repeats=1, graph=False) > 0
    served.grow("prompt", 20, 20)
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        served.run(served.inputs({"prompt": (0, 20)}), *served.random(20))


def test_the_table_of_times(capsys):
    small = ["--tokens", "40", "--batch", "1", "3", "--layers", "2", "--heads", "2", "1", "--head-dim", "16"]
    serving_steps.main([*small, "--sink", "4", "--window", "16", "--repeats", "1"])
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 2 + 3 * 2 and rows[2].startswith("| 40 | 1 | 0 of 2 | ")
    with pytest.raises(SystemExit):
        serving_steps.main(["--graph"])
