"""The files in examples/ run as they stand."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import flux_ext

ALL = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))
# Their tests are test_lm_eval.py and test_serving_http.py, which run beside what they need.
ELSEWHERE = ("lm_eval_harness", "serve_vllm")
EXAMPLES = [path for path in ALL if path.stem not in ELSEWHERE]


def test_there_are_four():
    assert [path.stem for path in ALL] == ["attention", "lm_eval_harness", "patch_and_train", "serve_vllm"]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_it_runs(path, tmp_path):
    package = str(Path(flux_ext.__file__).parent.parent)  # the one under test, whether installed or a checkout
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([package, *os.environ.get("PYTHONPATH", "").split(os.pathsep)])}
    run = subprocess.run([sys.executable, path], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.splitlines()) >= 4
    assert not [*tmp_path.iterdir()], "an example leaves files where it was started"
    assert len(path.read_text().splitlines()) < 80
