"""The benchmarks run: every group in tiny cases on the CPU, the CUDA timing with stand-ins, criteria, scripts."""

from __future__ import annotations

import csv
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_training
import torch

ROOT = Path(__file__).parent.parent
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("the benchmarks are not part of the package", allow_module_level=True)
sys.path.append(str(ROOT))  # last: the package itself stays the one that is tested

from benchmarks import end_to_end, launch, picture, pooled_states, step, structured, training  # noqa: E402
from benchmarks.cuda import compare, criteria, measure, peers, run, table  # noqa: E402
from benchmarks.cuda.prefill import block_problem, random_blocks  # noqa: E402
from benchmarks.cuda.problems import OURS, Setting, Spec, attend, visible_pairs  # noqa: E402
from flux_ext import Full, Streaming, Triangle  # noqa: E402
from flux_ext.operators.patterns import dense_mask  # noqa: E402
from flux_ext.training import PaddedCollator, start  # noqa: E402

K = 1024
TINY = Setting("cpu", tiny=True)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where the command lines run
LIMITS = table.Ceilings(1.0, 1.0)


# --- Every case


@pytest.mark.parametrize("name", run.ORDER)
def test_every_group_runs(name: str) -> None:
    """Every contender that can run on a CPU has a time; the others say why not."""
    group = run.GROUPS[name]
    for spec in dict.fromkeys(TINY.shrink(s) for s in group.specs):
        rows = run.run_case(group, spec, TINY, LIMITS)
        assert OURS in [r.contender for r in rows]
        for row in rows:
            assert row.us is not None or row.note == "needs CUDA", (row.case, row.contender, row.note)
        assert table.line(rows, "").startswith(rows[0].case)


def test_order_has_every_group_once() -> None:
    assert sorted(run.ORDER) == sorted(run.GROUPS)
    specs = [spec for group in run.GROUPS.values() for spec in group.specs]
    assert len({spec.label for spec in specs}) == len(specs)
    for name, group in run.GROUPS.items():
        assert {spec.group for spec in group.specs} == {name}


class PagedDecode:
    """A stand-in for FlashInfer's ``BatchDecodeWithPagedKVCacheWrapper``: what its arguments say, in plain PyTorch."""

    def __init__(self, workspace: torch.Tensor, layout: str, use_tensor_cores: bool) -> None:
        assert workspace.dtype == torch.uint8 and layout == "NHD"

    def plan(self, first_page: Any, pages: Any, last_page_len: Any, heads: int, kv_heads: int, dim: int, size: int,
             q_data_type: torch.dtype, kv_data_type: torch.dtype) -> None:  # fmt: skip
        assert (heads, kv_heads, dim, q_data_type, kv_data_type) == (8, 2, 16, torch.float32, torch.float32)
        self.plans = [
            (pages[a:b].long(), int((b - a - 1) * size + last))
            for a, b, last in zip(first_page[:-1], first_page[1:], last_page_len, strict=True)
        ]

    def run(self, q: torch.Tensor, cache: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        rows = []
        for one, (pages, length) in zip(q, self.plans, strict=True):
            k, v = (x[pages].flatten(0, 1)[:length].repeat_interleave(4, 1).transpose(0, 1) for x in cache)
            rows.append(torch.nn.functional.scaled_dot_product_attention(one[:, None], k, v)[:, 0])
        return torch.stack(rows)


def test_the_peer_over_pages_is_asked_for_the_same() -> None:
    setting, length, size = Setting("cpu", tiny=True, dtype=torch.float32), 300, 64
    k, v = (setting.random(15, size, 2, 16) for _ in range(2))
    q, table = setting.random(2, 1, 8, 16), torch.randperm(15).int()[:10].view(2, 5)
    module = SimpleNamespace(BatchDecodeWithPagedKVCacheWrapper=PagedDecode)
    got = peers._paged(module, torch.empty(1, dtype=torch.uint8), False, q[:, 0], k, v, table, length)()
    route, end = setting.int32([[0, 0]] * 2), setting.int32([length] * 2)
    want = attend(q, k, v, route, setting.sparse, end=end, page_table=table)
    torch.testing.assert_close(got, want[:, 0])


@pytest.mark.parametrize("pattern", [Full(), Streaming(16, 32), Streaming(0, 64, align=64)], ids=str)
@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 1), (1, 300), (130, 130), (50, 200)])
def test_visible_pairs_counts_the_mask(pattern: Full | Streaming | Triangle, q_len: int, kv_len: int) -> None:
    assert visible_pairs(pattern, q_len, kv_len) == int(dense_mask(pattern, q_len, kv_len).sum())


@pytest.mark.parametrize("length", [128, 300, 1000])
@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_block_lists_have_their_density_and_work(length: int, density: float) -> None:
    spec = Spec("block-sparse", "", 1, length, 16, 8, 4)
    keep = random_blocks(spec, TINY, density)
    n = keep.shape[-1]
    assert keep[..., 0].all() and keep.diagonal(dim1=-2, dim2=-1).all() and not keep.triu(1).any()
    share = keep.sum() / (4 * n * (n + 1) / 2)
    assert share <= max(density + 0.1, 2 / n + 0.5)
    pattern, flops = block_problem(spec, keep)
    mask = dense_mask(pattern, length, length)
    assert flops == 4.0 * 16 * 2 * int(mask.sum())
    if density == 1.0:
        assert torch.equal(mask, dense_mask(Full(), length, length).expand_as(mask))


# --- Timing


class FakeEvent:
    clock = 0.0

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing

    def record(self) -> None:
        self.time = FakeEvent.clock

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: FakeEvent) -> float:
        return end.time - self.time


class FakeGraph:
    """Captures by running; a replay takes 2 ms of the fake clock."""

    def replay(self) -> None:
        FakeEvent.clock += 2.0


class FakeCapture:
    def __init__(self, graph: FakeGraph) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, stand_in in (
        ("Event", FakeEvent), ("CUDAGraph", FakeGraph), ("graph", FakeCapture),
        ("synchronize", lambda: None), ("empty_cache", lambda: None),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stand_in)


def test_times_are_those_of_one_call(fake_cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(measure, "GRAPH_SECONDS", 1e3)  # a busy machine would make calls look long, and graphs short
    timings = measure.race({"a": [lambda: calls.append(0)] * 3, "b": [lambda: calls.append(1)]}, "cuda", 0.1)
    graph_calls = measure.GRAPH_NODES // 3 * 3
    assert timings["a"].us == pytest.approx(2000 / graph_calls)
    assert timings["b"].us == pytest.approx(2000 / measure.GRAPH_NODES)
    assert timings["a"].spread == 0 and timings["a"].note == ""


def test_a_contender_that_fails_does_not_end_the_others(fake_cuda: None) -> None:
    def out_of_memory() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried\nto allocate")

    timings = measure.race({"a": [out_of_memory], "b": [lambda: None]}, "cuda", 0.1)
    assert timings["b"].ok and not timings["a"].ok
    assert timings["a"].note == "OutOfMemoryError: CUDA out of memory. Tried"


def test_what_cannot_be_captured_is_timed_as_it_is(fake_cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    class NoCapture(FakeCapture):
        def __enter__(self) -> None:
            raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", NoCapture)

    def call() -> None:
        FakeEvent.clock += 0.5

    timing = measure.race({"a": [call]}, "cuda", 0.1)["a"]
    assert timing.us == pytest.approx(500) and "without a graph" in timing.note


def test_a_lost_device_goes_on_in_a_new_process(
    fake_cuda: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    started: list[list[str]] = []

    class Started(Exception):
        pass

    def execv(path: str, arguments: list[str]) -> None:
        started.append(arguments)
        raise Started

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setattr(run, "ceilings", lambda setting: (LIMITS, []))
    monkeypatch.setattr(run, "run_case", lambda *_: measure.race({"a": [lost]}, "cuda", 0.1))
    results = table.Table(tmp_path / "cuda.csv", "cpu")
    with pytest.raises(Started):
        run.run_groups(["decode", "router"], TINY, results, math.inf)
    assert started[0][started[0].index("--groups") + 1] == "router" and "--append" in started[0]
    assert "illegal memory access" in table.read(tmp_path / "cuda.csv")[-1].note


def test_the_budget_ends_a_run() -> None:
    results = table.Table(None, "cpu")
    assert run.run_groups(["decode", "router"], TINY, results, 0.0) == ["decode", "router"]
    assert {row.group for row in results.rows} == {"ceiling"}


# --- Tables


def rows_for(us: float = 10.0) -> list[table.Row]:
    """A table in which everything takes as long."""
    rows = [replace(row, us=us) for row in criteria.everything(run.GROUPS.values()).rows]
    return rows


def verdict(rows: list[table.Row], name: str, bound: str, models: list[dict[str, str]] | None = None) -> tuple:
    lines = criteria.verdicts(criteria.Results(rows, models or []), criteria.everything(run.GROUPS.values()))
    return next(line[2:] for line in lines if line[0].startswith(name) and line[1] == bound)


def test_criteria() -> None:
    rows = rows_for()
    assert verdict(rows, "full decode 128K", "must >= 0.8") == ("1", "full 1 x 131072", "yes", "2/2")
    assert verdict(rows, "streaming decode", "must <= 10")[2:] == ("yes", "3/3")
    assert verdict(rows, "streaming decode", "aim <= 6")[2:] == ("NO", "0/3")
    assert verdict(rows, "mixed heads, time over that", "must <= 1.1")[0] == "1"
    assert verdict(rows, "mixed-head decode, us beyond 1.05", "aim <= 3")[0] == "-0.5"
    assert verdict(rows, "block-sparse, choosing", "aim <= 0.1")[0] == "inf"
    assert verdict(rows, "prefill of a model at 256K, 0.9", "must >= 3")[2:] == ("not measured", "0/1")
    one = [r for r in rows if r.group != "decode" or r.batch == 1]
    assert verdict(one, "full decode 128K", "must >= 0.8")[2:] == ("so far", "1/2")
    slow = [replace(r, us=30.0) if (r.group, r.length) == ("mixed-heads", 128 * K) else r for r in rows]
    assert verdict(slow, "mixed heads, time over that", "must <= 1.1") == ("3", "half 1 x 131072", "NO", "2/4")
    models = [{"model": "m", "length": str(256 * K), "variant": "flux 0.9", "prefill_x": "3.1"}]
    assert verdict(rows, "prefill of a model at 256K, 0.9", "must >= 3", models)[2:] == ("yes", "1/1")


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = table.Table(tmp_path / "cuda.csv", "cpu")
    written.add(rows_for(12.5)[:3])
    written.add([table.Row(**vars(Spec("dense", "dense", 1, 8)), contender="x, y", note="why, not")])
    assert table.read(tmp_path / "cuda.csv") == written.rows
    more = table.Table(tmp_path / "cuda.csv", "cpu", append=True)
    more.add(written.rows[:1])
    assert len(table.read(tmp_path / "cuda.csv")) == 5


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run.main(["--tiny", "--groups", "decode-mixed", "--out", str(tmp_path)])
    assert "-- decode-mixed:" in capsys.readouterr().out
    assert (tmp_path / "criteria.csv").exists()
    run.main(["--summary", str(tmp_path / "cuda.csv")])
    assert "mixed-head decode" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run.main(["--groups", "nothing"])


def test_two_libraries_beside_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flux_ext._library import FOLDER

    monkeypatch.chdir(ROOT)
    times = compare.run(FOLDER, ["--tiny", "--groups", "decode-mixed"])  # a process that takes its libraries from there
    assert len(times) >= 4 and all(us > 0 for us in times.values())
    found = iter([{("case", OURS): 8.0}, {("case", OURS): 4.0}, {("case", OURS): 9.0}, {("case", OURS): 6.0}])
    monkeypatch.setattr(compare, "run", lambda *_: next(found))
    compare.main([Path("a"), Path("b")], 2, [], tmp_path)
    assert (tmp_path / "compare.csv").read_text().splitlines()[1] == "case,flux_ext,8.00,4.00,0.500"


# --- The others


def test_whole_models(tmp_path: Path) -> None:
    end_to_end.main(
        ["--runs", "tiny:64x1", "tiny:60x4", "--decode-steps", "2", "--shares", "0", "0.9", "--output", str(tmp_path)]
    )
    rows = criteria.read_models(tmp_path / f"end_to_end-{DEVICE}.csv")
    assert [r["variant"] for r in rows] == ["sdpa", "flux 0.9", "flux 0"] * 2
    assert all(float(r["prefill_s"]) > 0 and float(r["decode_ms"]) > 0 and not r["note"] for r in rows)
    assert picture.pictures(tmp_path / f"end_to_end-{DEVICE}.csv")


def test_every_mode_of_whole_models(tmp_path: Path) -> None:
    modes = ["fa-ssa", "fa-ta", "fa-xa", "xa-ssa"]
    options = ["--runs", "tiny:700x1", "--decode-steps", "1", "--shares", "0.5", "--output", str(tmp_path)]
    end_to_end.main(["--structured", "--modes", *modes, *options])
    rows = criteria.read_models(tmp_path / f"end_to_end-{DEVICE}.csv")
    assert [r["variant"] for r in rows] == ["sdpa", *(f"{mode} 0.5" for mode in modes)]
    assert all(float(r["prefill_s"]) > 0 and not r["note"] for r in rows)
    kept = [r["blocks_kept"] for r in rows]
    assert kept[:3] == ["", "", ""] and 0.3 < float(kept[3]) == float(kept[4]) < 0.9
    with pytest.raises(SystemExit):
        end_to_end.main(["--structured", "--runs", "qwen3-8b:64x1", "--output", str(tmp_path)])


def test_structured_keys_leave_blocks_out() -> None:
    """Where random keys keep 90 % of the blocks, these keep what a head looks at: near tokens, the sink, passages."""
    shape = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 64, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 128, "rope_theta": 5e5}
    model = end_to_end.build("tiny", "cpu", torch.float32, 4096, {**shape, "attention_bias": True})
    ids = structured.structured_tokens(4096, 512, "cpu")
    assert ids[0, 0] == 0 and int((ids == 0).sum()) == 1 and 64 <= int((ids <= structured.KINDS).sum()) <= 129
    random_share = end_to_end.blocks_kept(model, ids, "fa-xa")
    structured.give_structure(model)
    assert end_to_end.blocks_kept(model, ids, "fa-xa") < 0.5 < 0.8 < random_share


def test_whole_models_within_a_budget(tmp_path: Path) -> None:
    end_to_end.main(["--runs", "tiny:64x1", "--minutes", "0", "--output", str(tmp_path)])
    assert criteria.read_models(tmp_path / f"end_to_end-{DEVICE}.csv")[0]["note"].startswith("not run")


def test_training_steps(tmp_path: Path) -> None:
    """Every objective has a line, with the routes that were asked for; one that fails does not end the others."""
    options = ["--objectives", "dense", "counterfactual", "soft", "straight_through", "--steps", "2"]
    training.main(["--runs", "tiny:300", "--granularity", "layer", "head", *options, "--output", str(tmp_path)])
    rows = criteria.read_models(tmp_path / f"training-{DEVICE}.csv")
    assert [(r["objective"], r["granularity"]) for r in rows] == [
        ("dense", ""), *((o, g) for o in ("counterfactual", "soft", "straight_through") for g in ("layer", "head"))
    ]  # fmt: skip
    assert all(float(r["step_s"]) > 0 and float(r["dense_x"]) > 0 and not r["note"] for r in rows)
    assert all(float(r["sparse"]) == 0.5 and r["steps"] == "2" for r in rows[1:])


def test_training_steps_that_do_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried\nto allocate")

    monkeypatch.setattr(training, "losses", out_of_memory)
    training.main(["--runs", "tiny:64", "--objectives", "dense", "counterfactual", "--output", str(tmp_path)])
    training_csv = tmp_path / f"training-{DEVICE}.csv"
    failed, ran = criteria.read_models(training_csv)
    assert failed["note"] == "OutOfMemoryError: CUDA out of memory. Tried" and ran["note"] == ""
    training.main(["--runs", "tiny:64", "--minutes", "0", "--output", str(tmp_path)])
    assert criteria.read_models(training_csv)[0]["note"].startswith("not run")
    with pytest.raises(SystemExit):
        training.main(["--runs", "nothing:64"])


@pytest.mark.parametrize("share", ["-0.1", "2", "nan"])
def test_training_steps_of_no_share(share: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        training.main(["--runs", "tiny:64", "--share", share])
    assert f"--share must be from 0 to 1, got {float(share)}" in capsys.readouterr().err


@pytest.mark.parametrize("layers", [4, 7, 10, 32, 36])
def test_the_deck_of_training_steps_is_even(layers: int) -> None:
    deck = training.even_deck(layers)
    assert sorted(deck) == list(range(layers))
    assert all(a + b == layers - 1 for a, b in zip(deck[0::2], deck[1::2], strict=False))


def test_every_launch_runs(capsys: pytest.CaptureFixture[str]) -> None:
    launch.main([*launch.SMALL, "--profile", "--tiny"])
    out = capsys.readouterr().out
    assert out.count("ran: ") == len(launch.SMALL) and out.count("profiled: ") == len(launch.REAL)


@pytest.mark.skipif(DEVICE == "cuda", reason="kernels have other names than operators")
def test_a_step_is_taken_apart(tmp_path: Path) -> None:
    step.main(["--model", "tiny", "--length", "40", "--steps", "3", "--output", str(tmp_path)])
    with (tmp_path / "step-tiny-cpu.csv").open() as file:
        names = [row["kernel"] for row in csv.DictReader(file) if row["route"] == "sparse" and row["how"] == "graph"]
    assert names.count("flux_ext::attend") == 1


@pytest.mark.parametrize("granularity, routers", [("layer", 3), ("head", 6)])
def test_what_routers_see_is_read_as_they_see_it(granularity: str, routers: int) -> None:
    m, rows = tiny_training.model(granularity), tiny_training.dataset(2)
    batch = PaddedCollator(0)([rows[0]])
    found = pooled_states.pooled_states(m, batch, [2, 4])
    assert found.shape == (2, routers, 8)
    want = torch.stack(start.pooled_states(m, [batch]), 1)[0]  # with pools of 4, the model's own
    torch.testing.assert_close(found[1], want.view(routers, 8))


def test_tasks_are_read_off_states_that_tell_them_and_off_no_others() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 40, 3, 8, generator=generator)
    shift = torch.tensor([0.0, 0.5, 6.0])[:, None]  # of the three routers' states
    nothing, something, all_of_it = pooled_states.right(a + shift, b).tolist()
    assert 0.3 < nothing < 0.7 < something < 1 and all_of_it == 1


def test_pictures_of_the_committed_tables(tmp_path: Path) -> None:
    tables = sorted((ROOT / "benchmarks/results").glob("*.csv"))
    picture.main([*map(str, tables), "--output", str(tmp_path)])
    drawn = [path.name for path in tmp_path.glob("*.png")]
    kinds = re.compile(r"(cuda|end_to_end|cpu)-.*|.*-frontier")
    for path in tables:
        assert any(name.startswith(f"{path.stem}-") for name in drawn) == bool(kinds.fullmatch(path.stem)), path


SCRIPTS = sorted((ROOT / "benchmarks").glob("*.sh"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_scripts_are_sound(script: Path) -> None:
    subprocess.run(["sh", "-n", str(script)], check=True)
    assert os.access(script, os.X_OK)
    used = set(re.findall(r"--groups ([a-z0-9,-]+)", script.read_text()))
    assert {name for names in used for name in names.split(",")} <= set(run.ORDER)


def test_sanitize_script(tmp_path: Path) -> None:
    """With a stand-in for the tool: it is asked for launches that exist, and what it finds is reported."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(
        '#!/bin/sh\necho "$*" >>"$ASKED"\ncase "$*" in *route*) echo "ERROR SUMMARY: 1 error"; exit 9 ;; esac\n'
    )
    tool.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "ASKED": str(tmp_path / "asked"),
        "CUDA_TEST": "/bin/true",
    }
    command = ["sh", str(ROOT / "benchmarks/sanitize.sh"), str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "FOUND" in done.stdout and "router-layer" in done.stdout and "clean memcheck:" in done.stdout
    asked = (tmp_path / "asked").read_text()
    launches = set(re.findall(r"benchmarks launch (\S+)", asked))
    assert launches == set(launch.SMALL)
