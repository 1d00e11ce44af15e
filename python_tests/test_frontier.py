"""The frontier: its table, its picture, and the command that fills it, on the bundled model."""

import json
import math
from dataclasses import replace

import pytest

from flux_ext import FluxConfig, FluxRouters
from flux_ext.cli import commands, frontier
from flux_ext.cli.demo import BACKBONE
from flux_ext.evaluation import tasks
from flux_ext.evaluation.frontier import COLUMNS, Point, picture, read_table, spreads, write_table
from flux_ext.examples import save_examples

POINT = Point("code", "routed", "head", "streaming 16+64", "0.01", 0, 10, "bits_per_byte", 1.1, 1.0, 0.8)
DENSE = [
    Point("code", "dense", "", "", "", 0, 10, "bits_per_byte", 1.0, 1.0, 0.0),
    Point("single", "dense", "", "", "", 0, 10, "accuracy", 0.8, 0.8, 0.0),
    Point("hard", "dense", "", "", "", 0, 10, "accuracy", 0.01, 0.01, 0.0),
]


def points():
    """Dense, all sparse, static layers and routers per head of two seeds, on three tasks."""
    found = [*DENSE]
    for d in DENSE:

        def worse(share, d=d):
            return round(1 + share if d.measure == "bits_per_byte" else d.score * (1 - share), 6)

        sparse = replace(d, routes="sparse", sparsity=1.0, score=worse(0.5))
        found.append(sparse)
        for seed in (0, 1):
            found.append(replace(d, routes="static", granularity="layer", seed=seed, sparsity=0.5, score=worse(0.2)))
            found.append(
                replace(d, routes="routed", granularity="head", budget="0.01", seed=seed, sparsity=0.6 + seed / 5,
                        score=worse(0.1 + seed / 10))
            )  # fmt: skip
    return found


def test_a_table_comes_back_as_it_was(tmp_path):
    path = tmp_path / "t.csv"
    given = [*points(), replace(POINT, dense_score=math.nan)]
    write_table(given, path, ["machine: one", "command: flux-ext frontier"])
    text = path.read_text().splitlines()
    assert text[0] == "# machine: one" and text[2] == ",".join(COLUMNS)
    back = read_table(path)
    assert back[:-1] == given[:-1] and math.isnan(back[-1].dense_score)


@pytest.mark.parametrize("row", ["code,routed", "code,routed,head,s,0.01,zero,10,accuracy,1,1,0.5"])
def test_a_damaged_table_is_refused(tmp_path, row):
    path = tmp_path / "t.csv"
    path.write_text(f"# a line\n{','.join(COLUMNS)}\n{row}\n")
    with pytest.raises(ValueError, match=r"t\.csv, line 3: not a row of task, routes"):
        read_table(path)


def test_what_is_kept():
    """Of bits the inverse, so that 1 is dense and more is better whatever is measured."""
    assert POINT.kept == pytest.approx(1 / 1.1)
    assert replace(POINT, measure="accuracy", score=0.4, dense_score=0.8).kept == 0.5
    assert math.isnan(replace(POINT, measure="accuracy", score=0.4, dense_score=0.0).kept)


def test_mean_and_deviation_over_the_seeds():
    found = spreads(points())
    s = found["routed", "head", "0.01"]["single"]
    assert (s.seeds, s.sparsity, s.score) == (2, pytest.approx(0.7), pytest.approx(0.8 * 0.85))
    assert s.score_deviation == pytest.approx(0.8 * 0.1 / 2**0.5)
    assert found["static", "layer", "0.50"]["single"].score_deviation == 0
    assert found["sparse", "", ""]["code"].seeds == 1


def test_the_picture_has_a_panel_per_task_and_one_for_all(tmp_path):
    figure = picture(points())
    large, *small = figure.axes
    assert [axes.get_title(loc="left") for axes in small] == [
        "code, bits per byte",
        "single, score",
        "hard, score\n(dense fails too)",
    ]
    assert small[0].yaxis_inverted() and not small[1].yaxis_inverted()  # up is better
    [mean] = [x for x in large.containers if x.lines[0].get_marker() == "o"]
    assert mean.lines[0].get_xydata().tolist() == [
        [pytest.approx(0.7), pytest.approx(((1 / 1.1 + 1 / 1.2) / 2 + 0.85) / 2)]
    ]
    static = next(x for x in large.containers if x.lines[0].get_marker() == "s")
    assert [round(x, 2) for x in static.lines[0].get_xdata()] == [0, 0.5, 1]  # from dense to all sparse
    figure.savefig(tmp_path / "f.png")
    assert (tmp_path / "f.png").stat().st_size > 1000


def test_where_all_full_is_not_dense_static_allocations_begin_with_it():
    """With another full mode than full attention, none sparse is what that gives."""
    full = [replace(d, routes="full", pattern="block_sparse 0.9", score=d.score * 0.9) for d in DENSE]
    found = [p for p in points() if p.measure == "accuracy"] + [p for p in full if p.measure == "accuracy"]
    large, single, _ = picture(found).axes
    for axes, height in ((large, 0.9), (single, 0.8 * 0.9)):
        static = next(x for x in axes.containers if x.lines[0].get_marker() == "s")
        assert static.lines[0].get_xydata()[0].tolist() == [0, pytest.approx(height)]
        alone = [x.lines[0].get_xydata().tolist() for x in axes.containers if x.lines[0].get_marker() == "x"]
        assert [[0, pytest.approx(height)]] in alone
    labels = [text.get_text() for text in large.figure.legends[0].get_texts()]
    assert "all by the full mode" in labels and "dense" in labels


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for split, count in (("train", 4), ("heldout", 2)):
        save_examples(
            tasks.retrieval(count, length=560, distance=208, facts=1, split=split)
            + tasks.continuation(count, length=400, answer_length=8, split=split),
            folder / f"{split}.jsonl",
        )
    return folder


def options(data, output, *more):
    return [
        "frontier", "--model", str(BACKBONE), "--data", str(data / "train.jsonl"),
        "--test", str(data / "heldout.jsonl"), "--output", str(output), "--device", "cpu", "--steps", "2",
        "--batch-size", "2", "--sink", "16", "--window", "192", "--pool-size", "64", *more,
    ]  # fmt: skip


def test_the_whole_frontier(data, tmp_path, capsys, monkeypatch):
    """Trained, searched, scored, drawn; and what is there is not done again."""
    more = ("--granularity", "layer", "head", "--budgets", "0.02nats,retrieval=0.01nats",
            "--static", "layer", "head", "--static-sparsity", "0.5", "0.875", "--calibrate", "9nats",
            "--teacher-forced", "retrieval")  # fmt: skip
    assert commands.main(options(data, tmp_path, *more)) == 0
    rows = read_table(tmp_path / "frontier.csv")
    found = {(r.routes, r.granularity) for r in rows}
    assert found == {("dense", ""), ("sparse", ""), ("static", "layer"), ("static", "head"), ("routed", "layer"),
                     ("straight_through", "head")}  # fmt: skip
    assert len(rows) == 2 * (2 + 2 * 2 + 2 * 2) and all(r.examples == 2 for r in rows)
    by = {(r.task, r.routes): r for r in rows}
    assert by["retrieval", "dense"].sparsity == 0 and by["retrieval", "sparse"].sparsity == 1
    assert by["retrieval", "dense"].score == 1 and by["retrieval", "sparse"].score == 0
    assert {r.sparsity for r in rows if r.routes == "static"} == {0.5, 0.875}
    own, further = "0.02nats,retrieval=0.01nats", "9nats (trained 0.02nats,retrieval=0.01nats)"
    for trained in ("routed", "straight_through"):
        assert {r.budget for r in rows if r.routes == trained} == {own, further}
    # Where anything may be lost, calibration makes everything sparse without another training.
    assert {r.sparsity for r in rows if r.budget == further} == {1.0}
    assert {r.score for r in rows if r.budget == further} == {r.score for r in rows if r.routes == "sparse"}
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")
    name = "straight_through-head-0.02nats+retrieval=0.01nats-0"
    assert FluxRouters.from_pretrained(tmp_path / "routers" / name).config.granularity == "head"
    assert json.loads((tmp_path / "runs" / f"{name}.json").read_text())["training_seconds"] > 0
    card = (tmp_path / "routers" / f"{name}@9nats" / "README.md").read_text()
    assert "Calibrated on 8 sequences: sparsity 1.000" in card

    monkeypatch.setattr(frontier, "_give", None)  # nothing is done again
    (tmp_path / "frontier.csv").unlink()
    assert commands.main(options(data, tmp_path, *more)) == 0
    assert read_table(tmp_path / "frontier.csv") == rows

    capsys.readouterr()
    assert commands.main(options(data, tmp_path, *more, "--window", "96")) == 1
    assert "holds a frontier with --window 192, not 96: give another --output" in capsys.readouterr().err


def test_other_objectives_and_modes_are_contenders_too(data, tmp_path):
    more = ("--preset", "fa-ta", "--static", "none", "--objective", "soft", "--steps", "1", "--no-calibrate")
    name = "soft-layer-0.01-0"
    assert commands.main(options(data, tmp_path, *more, "--only", "dense", name)) == 0
    assert (tmp_path / "routers" / name / "flux_config.json").exists()
    assert commands.main(options(data, tmp_path, *more, "--only", "sparse")) == 0
    assert commands.main(options(data, tmp_path, *more, "--budgets", "0.01")) == 0
    rows = [r for r in read_table(tmp_path / "frontier.csv") if r.routes == "soft"]
    assert len(rows) == 2 and {(r.granularity, r.pattern, r.budget) for r in rows} == {
        ("layer", "triangle 16+192", "0.01")
    }


def test_calibrated_on_examples_of_their_own(data, tmp_path, capsys):
    """All of --data is trained on then, and other examples are another frontier."""
    name = "routed-layer-0.01-0"
    more = ("--static", "none", "--budgets", "0.01", "--steps", "1", "--only", name)
    run = options(data, tmp_path, *more, "--calibration-data")
    assert commands.main([*run, str(data / "heldout.jsonl")]) == 0
    assert "Calibrated on 4 sequences" in (tmp_path / "routers" / name / "README.md").read_text()
    capsys.readouterr()
    assert commands.main([*run, str(data / "train.jsonl")]) == 1
    assert "holds a frontier with --calibration-data" in capsys.readouterr().err


def test_dense_is_not_the_full_mode(data, tmp_path):
    """Where that is block-sparse it is a contender of its own, and what is kept is kept of full attention."""
    shared = ("--static", "none", "--budgets", "0.01", "--steps", "1", "--no-calibrate")
    blocks = ("--preset", "xa-ssa", "--threshold", "0.05", "--block-width", "64")
    assert commands.main(options(data, tmp_path / "fa", *shared, "--only", "dense")) == 0
    assert commands.main(options(data, tmp_path / "xa", *shared, *blocks)) == 0
    want = json.loads((tmp_path / "fa" / "runs" / "dense.json").read_text())["scores"]
    rows = read_table(tmp_path / "xa" / "frontier.csv")
    assert [r.routes for r in rows] == [x for x in ("dense", "full", "sparse", "routed") for _ in range(2)]
    for task in ("continuation", "retrieval"):
        dense, full, _, routed = (r for r in rows if r.task == task)
        [true] = [s[dense.measure] for s in want if s["task"] == task]
        assert dense.score == pytest.approx(true) and {r.dense_score for r in rows if r.task == task} == {dense.score}
        assert dense.kept == 1 and full.kept < 1 and full.sparsity == routed.sparsity == 0
        assert routed.score == full.score  # routers that are hardly trained choose full
        assert (dense.pattern, full.pattern) == ("", "block_sparse 0.05")


@pytest.mark.parametrize("name", ["sparse", "static-layer-0"])
def test_scoring_that_was_interrupted_goes_on(data, tmp_path, name):
    """Whatever was drawn before: no router is asked here, and the results know them all the same."""
    run = options(data, tmp_path, "--static-sparsity", "0.5", "--steps", "1", "--only", name)
    assert commands.main(run) == 0
    [results] = (tmp_path / "runs").glob(f"{name}*-results.jsonl")
    kept = results.read_text().splitlines(keepends=True)[:-2]
    results.write_text("".join(kept))
    (tmp_path / "runs" / f"{name}.json").unlink()
    assert commands.main(run) == 0
    assert results.read_text().splitlines(keepends=True)[: len(kept)] == kept


def test_dense_that_was_scored_by_the_full_mode_is_scored_anew(data, tmp_path):
    """By an earlier version, which noted no attention."""
    run = options(data, tmp_path, "--preset", "xa-ssa", "--only", "dense")
    assert commands.main(run) == 0
    file = tmp_path / "runs" / "dense.json"
    found = json.loads(file.read_text())
    assert found.pop("attention") == "full"
    file.write_text(json.dumps({**found, "scores": []}))
    assert commands.main(run) == 0
    scored = json.loads(file.read_text())["scores"]
    assert [s["accuracy"] for s in scored] == [s["accuracy"] for s in found["scores"]] and len(scored) == 2


@pytest.mark.parametrize(
    "preset, changes, text",
    [
        ("fa-ssa", {}, "streaming 128+512"),
        ("fa-xa", {"threshold": 0.8}, "block_sparse 0.8"),
        ("xa-ssa", {}, "streaming 128+512 beside block_sparse"),
    ],
)
def test_how_the_table_names_modes(preset, changes, text):
    config = FluxConfig.preset(preset, **changes)
    want = text.replace("128+512", f"{config.sink}+{config.window}")
    assert frontier._pattern(config) == want


def test_data_that_sink_and_window_show_whole_are_refused_before_the_training(data, tmp_path, capsys):
    more = ("--static", "none", "--window", "2048", "--only", "routed-layer-0.01-0")
    assert commands.main(options(data, tmp_path, *more)) == 1
    assert "has nothing to learn from: the longest example has" in capsys.readouterr().err


def test_processes_share_the_work(data, tmp_path, capsys, monkeypatch):
    """Each contender in one of its own; a failed one is named, with its log, and leaves the others alone."""
    assert commands.main(options(data, tmp_path, "--static", "none", "--jobs", "2", "--only", "dense", "sparse")) == 0
    assert {p.stem for p in (tmp_path / "runs").glob("*.json")} == {"dense", "sparse", "settings"}
    assert not (tmp_path / "frontier.csv").exists()  # of all, once they are there
    monkeypatch.setattr(frontier, "PROGRAM", ["false"])
    capsys.readouterr()
    budgets = ["--static", "none", "--budgets", "0.01", "0.02", "--jobs", "2"]
    assert commands.main(options(data, tmp_path, *budgets)) == 1
    assert "2 of 2 contenders failed, routed-layer-0.01-0 for one: see" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more, message",
    [
        (["--only", "routed-layer-0.5-0"], "--only must be among dense, sparse, static-layer-0, routed-layer-0.01-0"),
        (["--budgets", "0.01,=3"], "--budgets must read [TASK=]AMOUNT"),
        (["--budgets", "0.01,code=0.02nats"], "all amounts must be shares, or all nats"),
        (["--calibrate", "much"], "--calibrate must be a finite number >= 0, got 'much'"),
        (["--calibrate", "0.1", "--no-calibrate"], "--calibrate must be left out with --no-calibrate"),
        (["--calibration-data", "f", "--no-calibrate"], "--calibration-data must be left out with --no-calibrate"),
        (["--static", "head", "--preset", "fa-xa"], "--static head needs the pattern streaming"),
        (
            ["--static", "none", "--granularity", "head", "--flips", "3"],
            "--flips must be left out where nothing is flipped, got 3",
        ),
    ],
)
def test_bad_options(data, tmp_path, capsys, more, message):
    assert commands.main(options(data, tmp_path / "out", *more)) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
