"""The rooms of the house: dependencies run one way, and only csrc/torch knows torch."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import flux_ext

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
# What each room of the Python package (a folder, or a file of its own at the top) may import of the package.
MAY_IMPORT: dict[str, set[str]] = {
    "_library": set(),
    "strict_json": set(),
    "transformers_seam": set(),
    "sequence_parallel": set(),
    "forward_context": {"sequence_parallel", "transformers_seam"},
    "examples": set(),
    "operators": {"_library"},
    "config": {"operators"},
    "pictures": {"operators", "_C"},
    "routers": {"operators", "config"},
    "caches": {"operators", "config", "forward_context", "transformers_seam"},
    "models": {"operators", "config", "forward_context", "sequence_parallel", "transformers_seam", "caches", "routers"},
}
MAY_IMPORT["serving"] = {"operators", "config", "routers"}  # and vLLM, in one of its files
MAY_IMPORT["evaluation"] = {"examples", "pictures", "strict_json", "transformers_seam", "models"}
MAY_IMPORT["training"] = {
    "examples", "sequence_parallel", "strict_json", "transformers_seam", "operators", "models", "routers"
}  # fmt: skip
MAY_IMPORT["cli"] = {"__init__", *MAY_IMPORT, "_C"} - {"serving"}  # the public names too, as a user has them
MAY_IMPORT["__init__"] = {"config", "operators", "routers", "caches", "models", "evaluation"}
MAY_IMPORT["__main__"] = {"cli"}


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
    """The rooms of flux_ext that a file imports; "__init__" for a public name."""
    found = set()
    package = path.relative_to(ROOT / "flux_ext").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - (node.level - 1)]
            module = base + tuple((node.module or "").split(".") if node.module else ())
            names = [module[0]] if module else [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "flux_ext":
            names = node.module.split(".")[1:2] or [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            modules = [alias.name.split(".") for alias in node.names]
            names = [[*module, "__init__"][1] for module in modules if module[0] == "flux_ext"]
        else:
            continue
        found |= {name if name in MAY_IMPORT or name == "_C" else "__init__" for name in names if name != "__version__"}
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "flux_ext").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports(path: Path) -> None:
    room = path.relative_to(ROOT / "flux_ext").with_suffix("").parts[0]
    imports = package_imports(path) - {room}
    assert imports <= MAY_IMPORT[room], f"{room} must not import {sorted(imports - MAY_IMPORT[room])}"


LIGHT = ("flux_ext", "flux_ext.operators.testing", "flux_ext.routers", "flux_ext.examples", "flux_ext.pictures")


@pytest.mark.parametrize("module", LIGHT)
def test_light_imports(module: str) -> None:
    """They need torch and NumPy alone: the operators' tests run beside versions of torch without anything else."""
    heavy = ("transformers", "huggingface_hub", "safetensors", "accelerate", "matplotlib")
    code = f"import sys; sys.modules.update(dict.fromkeys({heavy})); import {module}"  # None there: no such module
    folder = Path(flux_ext.__file__).parent.parent  # in a checkout another package may lie in the working directory
    subprocess.run([sys.executable, "-c", code], check=True, cwd=folder)


def test_one_file_knows_vllm() -> None:
    for path in (ROOT / "flux_ext").rglob("*.py"):
        known = re.search(r"^\s*(from|import) vllm", path.read_text(), re.MULTILINE)
        assert not known or path.name == "vllm_seam.py", path


def test_every_room_is_there() -> None:
    rooms = {p.relative_to(ROOT / "flux_ext").with_suffix("").parts[0] for p in (ROOT / "flux_ext").rglob("*.py")}
    assert rooms == set(MAY_IMPORT)
    seen: set[str] = set()
    for room, below in MAY_IMPORT.items():  # top to bottom: what a room imports stands before it
        assert below - {"_C", "__init__"} <= seen or room == "__init__", room
        seen.add(room)
