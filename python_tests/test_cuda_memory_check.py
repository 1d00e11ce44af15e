"""No kernel reads or writes beside its tensors: ``one_call_each.py`` under compute-sanitizer's memcheck.

``benchmarks/sanitize.sh`` runs the other checkers, kernel by kernel.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import one_call_each
import pytest
import torch

import flux_ext

TOOL = "compute-sanitizer"
SUMMARY = re.compile(r"^========= ERROR SUMMARY: (\d+) errors?", re.MULTILINE)
HEADLINE = re.compile(r"^========= (?!COMPUTE-SANITIZER|ERROR SUMMARY)(\S.*)$", re.MULTILINE)
"""The first line of a report; what belongs to it is indented further."""


def find_tool() -> str | None:
    """compute-sanitizer on PATH, or in the folders of a CUDA toolkit."""
    roots = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [str(Path(root) / part) for root in roots if root for part in ("bin", "compute-sanitizer")]
    return shutil.which(TOOL) or shutil.which(TOOL, path=os.pathsep.join(folders))


def reported(output: str) -> list[str]:
    """The headlines of the errors that compute-sanitizer counted.

    Raises:
        ValueError: there is no count: the tool was stopped, or did not run.
    """
    counts = [int(n) for n in SUMMARY.findall(output)]  # one for each process
    if not counts:
        raise ValueError(f"{TOOL} wrote no summary: {output[-2000:]!r}")
    if not sum(counts):
        return []
    return HEADLINE.findall(output) or [f"{sum(counts)} errors without a report"]


@pytest.mark.parametrize("call", one_call_each.CALLS.values(), ids=one_call_each.CALLS)
def test_the_calls_on_the_cpu(call) -> None:
    """They can be made, and their twins agree."""
    call("cpu")


CLEAN = """\
========= COMPUTE-SANITIZER
called: decode
========= ERROR SUMMARY: 0 errors
"""
FOUND = """\
========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 16 bytes
=========     at void flux::cuda::attend_kernel<...>(flux::cuda::AttendParams)+0xec0
=========     by thread (0,0,0) in block (3,0,0)
=========     Access to 0x74505bcccca0 is out of bounds
=========     and is 161 bytes after the nearest allocation at 0x74505bccc800 of size 1,024 bytes
=========
========= Program hit cudaErrorLaunchFailure (error 719) due to "unspecified launch failure" on CUDA API call.
=========     Saved host backtrace up to driver entry point at error
=========
Traceback (most recent call last):
RuntimeError: CUDA error
========= Target application returned an error
========= ERROR SUMMARY: 2 errors
"""


def test_reports_are_read() -> None:
    assert reported(CLEAN) == []
    assert reported(FOUND) == [
        "Invalid __global__ read of size 16 bytes",
        'Program hit cudaErrorLaunchFailure (error 719) due to "unspecified launch failure" on CUDA API call.',
        "Target application returned an error",
    ]
    assert reported("========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 1 error\n") == ["1 errors without a report"]
    assert reported(CLEAN + FOUND) == reported(FOUND)  # two processes
    with pytest.raises(ValueError, match="no summary"):
        reported("========= COMPUTE-SANITIZER\ncalled: prefill\n")


@pytest.mark.skipif(find_tool() is None, reason=f"needs {TOOL}, of the CUDA toolkit")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_no_access_beside_a_tensor() -> None:
    # Every tensor is an allocation of its own, with a gap behind it: else one that runs too far lands in the next.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(flux_ext.__file__).parents[1]), *sys.path])
    options = ["--tool", "memcheck", "--kernel-name", "kernel_substring=flux", "--padding", "512"]
    run = subprocess.run(
        [str(find_tool()), *options, "--show-backtrace", "no", sys.executable, one_call_each.__file__, "cuda"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=180,
    )
    assert reported(run.stdout) == [], run.stdout
    assert run.returncode == 0, run.stdout
    for name in one_call_each.CALLS:
        assert f"called: {name}" in run.stdout, run.stdout
