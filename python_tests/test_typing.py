"""The types that users' checkers see: ``typed_use.py`` says what they are, mypy whether that is so."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import flux_ext

ROOT = Path(__file__).parent.parent


def test_the_package_says_that_it_is_typed() -> None:
    folder = Path(flux_ext.__file__).parent
    assert (folder / "py.typed").is_file() and (folder / "_C.pyi").is_file()


@pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="mypy is not installed (extra `dev`)")
@pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="pyproject.toml is not beside the tests")
def test_mypy_agrees() -> None:
    """``make lint`` does the same: the checkout and ``typed_use.py`` under the settings of ``pyproject.toml``."""
    run = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
