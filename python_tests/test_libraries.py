"""The built libraries: what they need from torch, and that both register their operators."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import flux_ext
import flux_ext._library as library
from flux_ext import _C

# Every C function of the stable ABI that the libraries of torch 2.10.0 export (nm -D, torch_* and aoti_torch_*).
STABLE_2_10 = Path(__file__).parent / "stable_abi_2_10.txt"
LIBRARIES = sorted(library.FOLDER.glob("libflux_ext_*.so"))


@pytest.mark.parametrize("path", LIBRARIES, ids=lambda p: p.name)
def test_needs_only_what_torch_2_10_has(path: Path) -> None:
    symbols = subprocess.run(["nm", "-D", "--undefined-only", path], capture_output=True, text=True, check=True).stdout
    names = {line.split()[-1].split("@")[0] for line in symbols.splitlines()}
    from_torch = {n for n in names if re.match(r"(aoti_)?torch_|_ZN?K?(2at|3c10|5torch)", n)}
    assert from_torch, "the library uses torch"
    unknown = from_torch - set(STABLE_2_10.read_text().split())
    assert not unknown, f"not exported by torch 2.10: {sorted(unknown)}"
    assert not [n for n in names if n.startswith("Py")], "an operator library must not depend on a Python version"


def test_cpu_operators_are_registered() -> None:
    for op in ("attend", "explain", "attend_backward", "mix", "mix_backward", "route", "append"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"flux_ext::{op}", "CPU")


@pytest.mark.skipif(not library.has_cuda_library, reason="built without nvcc")
def test_cuda_operators_are_registered_even_without_a_gpu() -> None:
    for op in ("attend", "explain", "route", "append"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"flux_ext::{op}", "CUDA")


@pytest.mark.parametrize(("q_len", "decode"), [(100, False), (1, True), (0, None)])
def test_explain_names_the_kernel_of_a_cpu_call(q_len: int, decode: bool | None) -> None:
    q, kv, full = torch.randn(2, q_len, 6, 72), torch.randn(2, 100, 2, 72), [0, 1 << 30, 0, 1, 0]
    numbers = torch.ops.flux_ext.explain(q, kv, kv, None, full + full, *[None] * 4, 0.1, *[None] * 5)
    assert numbers.dtype == torch.int64 and numbers.device.type == "cpu"
    family, processor, few_rows, tile_rows, q_tokens, kv_block, head_dim, workers, own_plan, memory, copies = (
        numbers.tolist()
    )
    if decode is None:  # no query, nothing to do
        assert not numbers.any()
        return
    assert (family, own_plan, copies) == (0, 0, 0)
    assert ["portable", "avx2", "avx512", "avx512_bf16", "amx_bf16"][processor] == _C.isa()
    assert few_rows == decode
    assert (tile_rows, q_tokens, kv_block, head_dim) == (96, 32, 64, 96)  # 32 queries of 3 heads; 72 in steps of 32
    assert workers == torch.get_num_threads()
    assert memory > workers * tile_rows * head_dim * 4


@pytest.mark.parametrize(
    "isa, message", [("portable", None), ("sse2", r"FLUX_EXT_ISA must be one of .*portable, got sse2")]
)
def test_only_instruction_sets_that_exist_can_be_asked_for(isa: str, message: str | None) -> None:
    code = "import torch, flux_ext; x = torch.randn(1, 8, 2, 16); flux_ext.attention(x, x, x)"
    package = Path(flux_ext.__file__).parent.parent  # not the checkout, where tests may be started
    env = {**os.environ, "FLUX_EXT_ISA": isa, "PYTHONPATH": str(package)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=package)
    if message is None:
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode == 1 and re.search("ValueError: .*" + message, done.stderr), done.stderr
