"""Drives CMake. Environment:

FLUX_CUDA             AUTO (default: where nvcc is found), ON or OFF
FLUX_CUDA_ARCHS       GPU architectures, default "80;90a"
FLUX_TORCH_INCLUDE    torch headers, where they cannot be found
FLUX_CUTLASS_INCLUDE  CUTLASS headers, where they cannot be found
MAX_JOBS              parallel compile jobs (default: one per core)
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT / "tools"))
import flux_build  # noqa: E402


class CMakeExtension(Extension):
    """Stands for everything CMake builds."""

    def __init__(self) -> None:
        super().__init__("flux_ext._cmake", sources=[])


class CMakeBuild(build_ext):
    """Configures, builds and installs with CMake."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        torch = flux_build.torch_include()
        if torch is None:
            raise SystemExit("torch's headers were not found; install torch or set FLUX_TORCH_INCLUDE")
        nvcc = flux_build.nvcc()
        if nvcc is None and flux_build.cuda_mode() == "ON":
            raise SystemExit("FLUX_CUDA=ON, but no nvcc was found")
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "FLUX_TORCH_INCLUDE": torch,
            "FLUX_CUDA": "ON" if nvcc else "OFF",
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
        }
        if nvcc:
            options["CMAKE_CUDA_COMPILER"] = nvcc
            options["FLUX_CUTLASS_INCLUDE"] = flux_build.cutlass_include() or ""
            if archs := os.environ.get("FLUX_CUDA_ARCHS"):
                options["FLUX_CUDA_ARCHS"] = archs.replace(",", ";")
        build = Path(self.build_temp).resolve() / "cmake"
        prefix = Path(self.build_lib).resolve()
        for old in (prefix / "flux_ext").glob("*.so"):  # nothing left over may end up in the package
            old.unlink()
        generator = ["-G", "Ninja"]
        (build / "CMakeCache.txt").unlink(missing_ok=True)  # no setting of an earlier build survives
        # Tools that pip installed beside this interpreter serve where the caller's PATH has none.
        env = {**os.environ, "PATH": os.pathsep.join([os.environ.get("PATH", ""), sysconfig.get_path("scripts")])}
        subprocess.run(
            ["cmake", "-S", ROOT, "-B", build, *generator, *(f"-D{k}={v}" for k, v in options.items())],
            check=True,
            env=env,
        )
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count()))
        subprocess.run(["cmake", "--build", build, "-j", jobs], check=True, env=env)
        subprocess.run(["cmake", "--install", build, "--prefix", prefix, "--strip"], check=True, env=env)

    def get_outputs(self) -> list[str]:
        return []  # the placeholder extension itself is never made

    def copy_extensions_to_source(self) -> None:  # `--inplace` and editable installs
        for old in (ROOT / "flux_ext").glob("*.so"):
            old.unlink()
        for new in (Path(self.build_lib).resolve() / "flux_ext").glob("*.so"):
            shutil.copy2(new, ROOT / "flux_ext" / new.name)


setup(ext_modules=[CMakeExtension()], cmdclass={"build_ext": CMakeBuild})
