"""PEP 517 backend: setuptools, plus build requirements worked out on the spot.

Only headers of torch are needed, and any torch >= 2.10 has them. Where the environment that the package is being
installed into already holds torch, an isolated build reads the headers there instead of downloading a second torch:
pip hides that environment from sys.path during an isolated build, but runs the backend with its interpreter, so
sysconfig still names its site-packages.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path

from setuptools import build_meta as _setuptools
from setuptools.build_meta import *  # noqa: F403  (the hooks not overridden below)

TORCH = "torch>=2.10"
CUTLASS = "nvidia-cutlass==4.2.0.0"


def find_in_site(relative: str, package: str) -> Path | None:
    """`relative` inside a package of this environment or of the outer one."""
    spec = importlib.util.find_spec(package)  # finds, does not import
    roots = [Path(p).parent for p in (spec.submodule_search_locations or [])] if spec else []
    roots += [Path(sysconfig.get_path("purelib")), Path(sysconfig.get_path("platlib"))]
    return next((root / relative for root in roots if (root / relative).is_dir()), None)


def torch_include() -> Path | None:
    """Folder of torch's headers: FLUX_TORCH_INCLUDE, or what is installed."""
    named = os.environ.get("FLUX_TORCH_INCLUDE")
    return Path(named) if named else find_in_site("torch/include", "torch")


def cutlass_include() -> Path | None:
    """Folder of the CUTLASS headers: FLUX_CUTLASS_INCLUDE, or what is installed."""
    named = os.environ.get("FLUX_CUTLASS_INCLUDE")
    return Path(named) if named else find_in_site("cutlass_library/source/include", "cutlass_library")


def cuda_mode() -> str:
    """FLUX_CUDA: AUTO (default), ON or OFF."""
    mode = os.environ.get("FLUX_CUDA", "AUTO").upper()
    if mode not in ("AUTO", "ON", "OFF"):
        raise SystemExit(f"FLUX_CUDA must be AUTO, ON or OFF, got {mode!r}")
    return mode


def nvcc() -> str | None:
    """The CUDA compiler to use, or None for a CPU-only build."""
    if cuda_mode() == "OFF":
        return None
    named = os.environ.get("CUDACXX")
    if not named:
        home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
        named = f"{home}/bin/nvcc" if home else "nvcc"
    return shutil.which(named) or (shutil.which("/usr/local/cuda/bin/nvcc") if named == "nvcc" else None)


def _has(tool: str) -> bool:
    """Whether a program is there that also runs inside an isolated build, as pip's own wrapper scripts do not."""
    path = shutil.which(tool)
    return path is not None and Path(path).read_bytes()[:2] != b"#!"


def _extra_requires() -> list[str]:
    need = ["pybind11>=2.13", *(tool for tool in ("cmake", "ninja") if not _has(tool))]
    if torch_include() is None:
        need.append(TORCH)
    if nvcc() and cutlass_include() is None:
        need.append(CUTLASS)
    return need


def get_requires_for_build_wheel(config_settings=None):
    return _setuptools.get_requires_for_build_wheel(config_settings) + _extra_requires()


def get_requires_for_build_editable(config_settings=None):
    return _setuptools.get_requires_for_build_editable(config_settings) + _extra_requires()
