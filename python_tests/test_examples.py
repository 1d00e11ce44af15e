"""The files in examples/ run as they stand."""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib
import pytest

import flux_ext

ALL = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))
# Their tests are test_lm_eval.py and test_serving_http.py, which run beside what they need.
ELSEWHERE = ("lm_eval_harness", "serve_vllm")


def test_there_are_five():
    names = ["attention", "lm_eval_harness", "patch_and_train", "serve_vllm", "without_training"]
    assert [path.stem for path in ALL] == names


def output_of(name, folder, *args):
    """The lines that an example prints, started in a folder, where it must leave nothing."""
    package = str(Path(flux_ext.__file__).parent.parent)  # the one under test, whether installed or a checkout
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([package, *os.environ.get("PYTHONPATH", "").split(os.pathsep)])}
    path = next(path for path in ALL if path.stem == name)
    command = [sys.executable, path, *map(str, args)]
    run = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert not [*folder.iterdir()], "an example leaves files where it was started"
    return run.stdout.splitlines()


@pytest.mark.parametrize("name", ["attention", "patch_and_train"])
def test_it_runs(name, tmp_path):
    assert len(output_of(name, tmp_path)) >= 4


@pytest.mark.parametrize("path", [path for path in ALL if path.stem not in ELSEWHERE], ids=lambda p: p.stem)
def test_it_is_short(path):
    assert len(path.read_text().splitlines()) < 80


def test_layers_and_heads_that_are_made_sparse_without_training(tmp_path):
    """The bundled model needs layer 3, and only it, to answer questions about what is far back. Of a layer, one of
    whose two KV heads is sparse, half of what it would give back is given back."""

    def measured(*options):
        found = {}
        for line in output_of("without_training", tmp_path, *options)[1:]:
            name, cost, kept = re.fullmatch(r"(.+) sparse: .*retrieval ([+-][\d.]+); ([\d.]+) MB .*", line).groups()
            found[name] = float(cost), float(kept)
        return found

    found = measured()
    cost, kept = ({name: pair[i] for name, pair in found.items()} for i in range(2))
    alone = [cost[f"layer {layer} alone"] for layer in range(8)]
    assert alone[3] > 1 and max(alone[:3] + alone[4:]) < 0.1
    assert cost["layers [0, 1, 2, 3, 4, 5, 6, 7]"] > 1
    layer = (kept["layer 0 alone"] - kept["layers [0, 1, 2, 3, 4, 5, 6, 7]"]) / 7
    assert layer > 1
    assert measured("--sparse", 1, "2:0")["1 2:0"][1] == pytest.approx(kept["layer 0 alone"] - layer / 2, abs=0.15)


NOTEBOOK = Path(__file__).parent.parent / "examples" / "first_hour.ipynb"


def test_the_notebook_runs(tmp_path, monkeypatch, capsys):
    """Its cells in order, as plain Python: it has neither magics nor commands of the shell."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    matplotlib.use("agg")
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    names = {}
    for i, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{NOTEBOOK.name}, cell {i}", "exec"), names)
    assert max(range(8), key=names["costs"]["retrieval"].__getitem__) == 3
    assert {(s.task, s.mode) for s in names["scores"]} == {
        (task, mode) for task in ("retrieval", "continuation") for mode in ("dense", "sparse", "routed")
    }
    assert "1 sequence, " in capsys.readouterr().out  # the last cell's summary


def test_the_notebook_has_no_outputs():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells if "outputs" in cell)
