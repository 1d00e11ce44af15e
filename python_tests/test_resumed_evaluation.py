"""An evaluation that was interrupted goes on from its file, and gives what it would have given; its reports."""

import csv
import json
import math
from dataclasses import replace

import pytest
import torch
from tiny_training import Bytes, model

import flux_ext
from flux_ext.evaluation import Score, evaluate, report
from flux_ext.evaluation.results import ResultsFile, digest
from flux_ext.examples import Example

EXAMPLES = [Example("The source of it " * (1 + i % 3), " is?", "abc"[: 1 + i % 2], "pq"[i % 2]) for i in range(10)]


class Interrupted(Exception):
    pass


def run(path, m=None, examples=EXAMPLES, **options):
    scores = evaluate(m or model(), Bytes(), examples, batch_size=2, progress=False, results=path, **options)
    return [replace(s, seconds=0.0) for s in scores]


def stopping(m, after):
    """A model whose ``generate`` is interrupted, and the list of its calls."""
    generate, calls = m.generate, []

    def counted(*args, **kwargs):
        calls.append(args[0].shape)
        if len(calls) > after:
            raise Interrupted
        return generate(*args, **kwargs)

    m.generate = counted
    return m, calls


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "results.jsonl"
    return run(path), path


@pytest.mark.parametrize("after", [0, 1, 7, 17])
@pytest.mark.parametrize("cut", [0, 1, 20, 400])
def test_it_goes_on(tmp_path, whole, after, cut):
    """Also where a line, or a batch, was written in part."""
    path = tmp_path / "results.jsonl"
    m, _ = stopping(model(), after)
    with pytest.raises(Interrupted):
        run(path, m)
    text = path.read_bytes()
    head = text.index(b"\n") + 1
    path.write_bytes(text[: max(head, len(text) - cut)])
    m, calls = stopping(model(), math.inf)
    assert run(path, m) == whole[0]
    batches = 3 * 2 * 3  # modes, tasks, batches of 5 examples
    assert batches - after <= len(calls) <= batches - after + (2 if cut else 0)
    rows, want = ([json.loads(line) for line in p.read_text().splitlines()] for p in (path, whole[1]))
    assert rows[0] == want[0] and rows[-1] == {"complete": True}
    one, other = (
        {(r["mode"], r["example"]): {k: v for k, v in r.items() if k != "seconds"} for r in x[1:-1]}
        for x in (rows, want)
    )
    assert one == other and len(one) == 30


def test_what_is_complete_is_read(tmp_path, whole):
    m, calls = stopping(model(), 0)
    assert run(whole[1], m) == whole[0] and not calls


def unfinished(path):
    m, _ = stopping(model(), 3)
    with pytest.raises(Interrupted):
        run(path, m)


def other_weights():
    m = model()
    with torch.no_grad():
        m.model.layers[1].mlp.up_proj.weight.mul_(1.01)
    return {"m": m}


def other_routers():
    m = model()
    with torch.no_grad():
        flux_ext.get_routers(m).layers[0].classifier[-1].bias.add_(0.1)
    return {"m": m}


@pytest.mark.parametrize(
    "change",
    [
        other_weights,
        other_routers,
        lambda: {"m": model(align=2)},
        lambda: {"examples": [replace(EXAMPLES[0], answer="z"), *EXAMPLES[1:]]},
        lambda: {"modes": ["dense", "routed"]},
        lambda: {"likelihood": False},
    ],
    ids=["weights", "routers", "pattern", "examples", "modes", "options"],
)
def test_unfinished_results_of_something_else_are_not_lost(tmp_path, change):
    path = tmp_path / "results.jsonl"
    unfinished(path)
    before = path.read_bytes()
    with pytest.raises(
        ValueError, match="results.jsonl holds unfinished results of another model, other data or options"
    ):
        run(path, **change())
    assert path.read_bytes() == before


def test_complete_results_of_something_else_are_replaced(tmp_path):
    path = tmp_path / "results.jsonl"
    run(path, modes=["dense"])
    assert len(run(path, modes=["sparse"])) == 2
    assert len(path.read_text().splitlines()) == 12 and "dense" not in path.read_text()


@pytest.mark.parametrize("text", ["no JSON\n", "[]\n", "{}\n", '{"digest": "x"}\n{"mode": "dense"}\n', "3\n"])
def test_another_file_is_left_alone(tmp_path, text):
    path = tmp_path / "notes.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match="notes.txt exists and is not a file of results"):
        run(path)
    assert path.read_text() == text


def test_an_empty_file_is_begun(tmp_path):
    path = tmp_path / "results.jsonl"
    path.touch()
    assert ResultsFile(path, "abc").results == [] and json.loads(path.read_text()) == {"digest": "abc"}
    assert list(tmp_path.iterdir()) == [path]


def test_the_digest_is_of_the_tokens_too():
    class Other(Bytes):
        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [*super().__call__(text, add_special_tokens)["input_ids"], 3]}

    m = model()
    assert digest(m, Bytes(), EXAMPLES, {}) == digest(model(), Bytes(), EXAMPLES, {})
    assert digest(m, Bytes(), EXAMPLES, {}) != digest(m, Other(), EXAMPLES, {})


def test_progress_shows_figures(capsys, tmp_path):
    evaluate(model(), Bytes(), EXAMPLES, ["sparse"], batch_size=5)
    shown = capsys.readouterr().err
    assert "evaluating sparse on q" in shown and "accuracy 0.000, bits/byte" in shown and "sparsity 1.00" in shown


# Reports


MODES = "dense", "sparse", "routed"
SCORES = [
    Score(task, mode, 4, accuracy, bits, sparsity, 1024.0, (0.0, 1.0 - sparsity), 2.0)
    for task, accuracy, bits in (("single", 0.5, math.nan), ("prose", math.nan, 1.25))
    for mode, sparsity in zip(MODES, (0.0, 1.0, 0.75), strict=True)
]


def test_a_report_is_json_csv_and_two_pictures(tmp_path):
    report.write_report(SCORES, tmp_path / "scores.json")
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {"scores.json", "scores.csv", "scores.png", "scores-routes.png"}
    rows = json.loads((tmp_path / "scores.json").read_text())
    assert rows[0]["accuracy"] == 0.5 and rows[0]["bits_per_byte"] is None and rows[5]["full_share"] == [0.0, 0.25]
    table = list(csv.DictReader((tmp_path / "scores.csv").open()))
    assert [r["mode"] for r in table] == [*MODES] * 2
    assert table[0]["accuracy"] == "0.5" and table[0]["bits_per_byte"] == "" and table[5]["sparsity"] == "0.75"
    for name in ("scores.png", "scores-routes.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_the_picture_has_a_side_per_measure():
    figure = report.frontier(SCORES)
    left, right = figure.axes
    assert left.get_ylabel().startswith("accuracy") and right.get_ylabel().startswith("bits per byte")
    assert [list(line.get_xdata()) for line in left.lines[:1]] == [[0.0, 0.75, 1.0]]
    assert {tuple(map(float, line.get_xydata()[0])) for line in right.lines[1:]} == {(0, 1.25), (1, 1.25), (0.75, 1.25)}
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["single", "prose", *MODES]
    assert len(report.frontier(SCORES[:3]).axes) == 1


def test_the_line_goes_through_dense_before_the_full_mode():
    """Whichever is better: both have no sparsity, and what is routed follows from the latter."""
    for accuracy in (0.4, 0.6):
        full = replace(SCORES[0], mode="full", accuracy=accuracy)
        [axes] = report.frontier([SCORES[2], full, SCORES[0]]).axes
        assert axes.lines[0].get_ydata().tolist() == [0.5, accuracy, 0.5]


def test_without_routers_no_heat_map(tmp_path):
    report.write_report(SCORES[:2], tmp_path / "s.json")
    assert not (tmp_path / "s-routes.png").exists()
