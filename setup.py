"""Builds vittle_kernels._native with CMake and ninja under ordinary build isolation; torch is not needed for it.

VITTLE_CUDA=0 leaves the CUDA kernels out, VITTLE_CUDA=1 insists on them; by default they are built where nvcc is.
VITTLE_CUDA_ARCHITECTURES lists what to build for ("80;90;100"; the newest also as PTX).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def say(message: str) -> None:
    print(f"vittle-kernels: {message}", flush=True)


def cxx_compiler() -> str | None:
    named = os.environ.get("CXX")
    names = [named.split()[0]] if named else ["c++", "g++", "clang++"]
    return next(filter(None, map(shutil.which, names)), None)


def cuda_compiler() -> str | None:
    setting = os.environ.get("VITTLE_CUDA", "auto")
    if setting not in ("0", "1", "auto"):
        sys.exit(f"VITTLE_CUDA is {setting!r}; must be 0, 1 or auto")
    if setting == "0":
        return None
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    candidates = [os.environ.get("CUDACXX"), "nvcc", *(f"{home}/bin/nvcc" for home in homes if home)]
    nvcc = next(filter(None, (shutil.which(name) for name in candidates if name)), None)
    if nvcc is None and setting == "1":
        sys.exit("VITTLE_CUDA=1, but there is no nvcc: put it on PATH or set CUDA_HOME")
    return nvcc


class CMakeBuild(build_ext):
    """Configures and builds the one extension module."""

    def build_extension(self, ext: Extension) -> None:
        nvcc = cuda_compiler()
        say(f"building the CPU kernels, and the CUDA kernels with {nvcc}" if nvcc else "no nvcc: CPU kernels only")

        import pybind11

        build = Path(self.build_temp).resolve() / "cmake"
        definitions = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": Path(self.get_ext_fullpath(ext.name)).resolve().parent,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "VITTLE_CUDA": "ON" if nvcc else "OFF",
        }
        if nvcc:
            definitions["CMAKE_CUDA_COMPILER"] = nvcc
        if architectures := os.environ.get("VITTLE_CUDA_ARCHITECTURES"):
            definitions["VITTLE_CUDA_ARCHITECTURES"] = architectures.replace(",", ";")
        arguments = [f"-D{name}={value}" for name, value in definitions.items()]
        subprocess.run(["cmake", "--fresh", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", *arguments], check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)


extensions = [Extension("vittle_kernels._native", sources=[])]
if cxx_compiler() is None:
    say("no C++ compiler: installing without the CPU and CUDA kernels (the backends eager and triton remain)")
    extensions = []

setup(ext_modules=extensions, cmdclass={"build_ext": CMakeBuild})
