"""The rooms of the house: dependencies run one way, and only csrc/torch knows torch."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh"))

# What each folder of csrc may include, besides itself and the standard library.
MAY_INCLUDE = {
    "core": set(),
    "cpu": {"core"},
    "cuda": {"core"},
    "torch": {"core", "cpu", "cuda"},
    "python": {"core", "cpu"},
}
# What each part of the Python package may import of the package.
TOP = {"training", "evaluation", "cli", "demo"}


@pytest.mark.skipif(not SOURCES, reason="the sources are not beside the tests")
@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_includes(path: Path) -> None:
    room = path.relative_to(ROOT / "csrc").parts[0]
    text = path.read_text()
    for name in re.findall(r'#include "([^"]+)"', text):
        assert name.split("/")[0] in MAY_INCLUDE[room] | {room}, f"{room} must not include {name}"
    angled = re.findall(r"#include <([^>]+)>", text)
    if room != "torch":
        assert not [n for n in angled if re.match(r"(torch|ATen|c10)/", n)], "torch headers outside csrc/torch"
    if room not in ("cuda", "torch"):
        assert not [n for n in angled if re.match(r"(cuda|cute|cutlass)", n)], f"CUDA headers in {room}"
    if room == "torch":
        assert not [n for n in angled if re.match(r"(torch/extension|ATen|c10)", n)], "only the stable ABI"


def package_imports(path: Path) -> set[str]:
    """First-level modules of flux_ext that a file imports."""
    found = set()
    package = path.relative_to(ROOT / "flux_ext").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - (node.level - 1)]
            names = [node.module] if node.module else [a.name for a in node.names]
            found |= {(base + tuple(n.split(".")))[0] for n in names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flux_ext."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("flux_ext.")}
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "flux_ext").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports(path: Path) -> None:
    room = path.relative_to(ROOT / "flux_ext").with_suffix("").parts[0]
    if room in TOP or room in ("__main__", "__init__"):
        return
    assert not package_imports(path) & TOP, f"{room} must not import training, evaluation or the command line"
