"""Loads the operator libraries that stand beside this file.

``libflux_ext_cpu.so`` has the schemas and the CPU kernels, ``libflux_ext_cuda.so`` the CUDA kernels (built where
nvcc was found). Both use the LibTorch stable ABI: one build serves every torch from 2.10 on. The environment variable
FLUX_EXT_LIBRARIES names another folder to take both from (to compare two builds).
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

LIBRARY_VARIABLE = "FLUX_EXT_LIBRARIES"
FOLDER = Path(os.environ.get(LIBRARY_VARIABLE) or Path(__file__).parent)


def load(name: str) -> bool:
    """Registers the operators of one library; False where it was not built."""
    path = FOLDER / f"lib{name}.so"
    if not path.exists():
        return False
    torch.ops.load_library(path)
    return True


if not load("flux_ext_cpu"):
    raise ImportError(
        f"{FOLDER / 'libflux_ext_cpu.so'} is missing: "
        + (
            f"{LIBRARY_VARIABLE} names that folder"
            if os.environ.get(LIBRARY_VARIABLE)
            else "build the package with `pip install .` (in a checkout: `pip install -e . --no-build-isolation`)"
        )
    )

has_cuda_library: bool = load("flux_ext_cuda")
