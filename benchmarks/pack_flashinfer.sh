#!/bin/sh
# FlashInfer's decode, compiled here, for a machine with a GPU but without a network: OUT/flashinfer.tgz (8 MB), to be
# unpacked into a folder in PYTHONPATH there. Needs nvcc, a C++ compiler, ninja and a Python with torch, but no GPU.
#
#     benchmarks/pack_flashinfer.sh OUT [VERSION]        # VERSION of the Python there, 3.12
#
# PYTHON and FLASHINFER_CUDA_ARCH_LIST (9.0a) may be set. It takes some ten minutes on two cores.
set -eu
out=$1 version=${2:-3.12} python=${PYTHON:-python}
mkdir -p "$out"
out=$(cd "$out" && pwd) work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
get() { "$python" -m pip download -q --no-deps --only-binary :all: "$@"; }

get -d "$work" flashinfer-python==0.6.18.post1
get -d "$work" --python-version "$version" --platform manylinux_2_28_x86_64 --platform manylinux_2_24_x86_64 \
    apache-tvm-ffi==0.1.15.post2
"$python" -m pip install -q --no-deps --target "$work/here" \
    apache-tvm-ffi==0.1.15.post2 einops tabulate click requests nvidia-ml-py
for part in flashinfer_python apache_tvm_ffi; do
    "$python" -m zipfile -e "$work/$part"-*.whl "$work/$part"
done

# Without a driver there is no libcuda to link to; the one that is there will be found.
mkdir "$work/stub"
echo "" | cc -shared -x c - -Wl,-soname,libcuda.so.1 -o "$work/stub/libcuda.so"
export FLASHINFER_EXTRA_LDFLAGS="-L$work/stub" FLASHINFER_CUDA_ARCH_LIST="${FLASHINFER_CUDA_ARCH_LIST:-9.0a}"
export FLASHINFER_WORKSPACE_BASE="$work"

pack=$work/pack
PYTHONPATH="$work/flashinfer_python:$work/here" "$python" - "$work/aot" <<'BUILD'
import pathlib, shutil, sys, torch
from flashinfer.jit.attention import modules

half, index = torch.bfloat16, torch.int32
how = (128, 128, 0, False, False)  # head_dim of queries and values, no positions, no window, no soft-capping
for spec in (
    modules.gen_single_decode_module(half, half, half, *how),
    modules.gen_batch_decode_module(half, half, half, index, *how),
    modules.gen_batch_prefill_module("fa2", half, half, half, index, *how, False),  # decode with tensor cores
):
    spec.build(verbose=False)
    folder = pathlib.Path(sys.argv[1], spec.name)
    folder.mkdir(parents=True)
    shutil.copy(spec.jit_library_path, folder)
BUILD

# What was compiled is looked for in data/aot first. Of the sources it still reads those of its attention.
mkdir -p "$pack"
mv "$work/flashinfer_python/flashinfer" "$work/apache_tvm_ffi/tvm_ffi" "$pack"
mkdir "$work/csrc"
mv "$pack"/flashinfer/data/csrc/batch_decode* "$pack"/flashinfer/data/csrc/batch_prefill* \
    "$pack"/flashinfer/data/csrc/single_decode* "$work/csrc"
for part in "$pack"/flashinfer/data/*/; do rm -r "$part"; done
mv "$work/csrc" "$work/aot" "$pack/flashinfer/data"
rm -r "$pack"/tvm_ffi/3rdparty "$pack"/tvm_ffi/include "$pack"/tvm_ffi/src
find "$pack" -name __pycache__ -prune -exec rm -r {} +
find "$pack" -name "*.so" -exec strip {} +
tar czf "$out/flashinfer.tgz" -C "$pack" .
ls -l "$out/flashinfer.tgz"
