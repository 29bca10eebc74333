"""Builds the CUDA kernels as host code: csrc as it is, but for launches and PTX, over tests/shim/include."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from sysconfig import get_path
from types import ModuleType

import pytest
import torch
from support import Case

from vittle_kernels.backends import native

SHIM = Path(__file__).parent
ROOT = SHIM.parents[1]
OBJECTS = ROOT / "build" / "shim"

COMPILER = os.environ.get("CXX", "g++")
FLAGS = (
    "-std=c++20 -O1 -g1 -fPIC -pthread -fvisibility=hidden -Wall -Wextra -Wno-unknown-pragmas -Iinclude -Icsrc "
    '-DVITTLE_INSTRUCTION_SET=baseline -DVITTLE_CUDA -DVITTLE_CUDA_ARCHITECTURES="host" -DVITTLE_CUDA_VERSION="0"'
).split()
KERNELS = (
    *("csrc/cuda/forward.cu", "csrc/cuda/backward.cu", "csrc/cuda/probes.cu"),
    *("csrc/cpu/kernels.cpp", "csrc/cpu/dispatch.cpp", "csrc/cpu/pages.cpp", "csrc/cpu/parallel.cpp"),
)

LAUNCH = re.compile(r"(\w+(?:<[^;{}]*?>)?)(\s*)<<<(.+?)>>>\((.+?)\);", re.DOTALL)
PTX = re.compile(r'asm\("([\w.]+) [^"]*" : "=f"\((.+?)\) : (.+?)\);')

Edit = tuple[str, str, str]  # path, what is there, what to put there


def translate(source: str) -> str:
    """``kernel<<<grid, threads, shared, stream>>>(args)`` and ``asm`` become calls; all else stays, on its line."""

    def call(match: re.Match[str]) -> str:
        instruction, result, operands = match.groups()
        return f"{result} = shim::ptx::{instruction.replace('.', '_')}({operands});".replace('"f"', "")

    source = re.sub(r'asm volatile\(""[^;]*;', "", source)  # keeps a register, and is of PTX
    return PTX.sub(call, LAUNCH.sub(r"shim::launch(\3,\2 [&] { \1(\4); });", source))


class Tree:
    """A translated copy of csrc and the shim, with mistakes planted by ``edits``."""

    def __init__(self, path: Path, edits: Sequence[Edit] = ()) -> None:
        if sys.platform != "linux" or shutil.which(COMPILER) is None:
            pytest.skip(f"needs Linux and {COMPILER}")
        self.path = path
        shutil.copytree(SHIM / "include", path / "include")
        shutil.copytree(ROOT / "csrc", path / "csrc")
        for name in ("driver.cpp", "block_sum.cu"):
            shutil.copy(SHIM / name, path)
        for name, old, new in edits:
            text = (path / name).read_text()
            assert old in text
            (path / name).write_text(text.replace(old, new))
        for file in (path / "block_sum.cu", *(path / "csrc").rglob("*.*")):
            file.write_text(translate(file.read_text()))

    def link(self, output: str, sources: Sequence[str], flags: Sequence[str] = (), shared: bool = False) -> Path:
        """Compiles what is not in build/shim yet and links it."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(lambda source: self._object(source, flags), sources))
        self._compile(*flags, *(["-shared"] if shared else []), *map(str, objects), "-ldl", "-o", output)
        return self.path / output

    def _object(self, source: str, flags: Sequence[str]) -> Path:
        headers = sorted(self.path.rglob("*.*h"))
        digest = hashlib.sha256(repr((COMPILER, FLAGS, flags)).encode())
        for file in (*headers, self.path / source):
            digest.update(file.read_bytes())
        target = OBJECTS / f"{Path(source).name}-{digest.hexdigest()[:16]}.o"
        if not target.exists():
            OBJECTS.mkdir(parents=True, exist_ok=True)
            part = target.with_suffix(f".{os.getpid()}")
            self._compile(*flags, "-x", "c++", "-c", source, "-o", str(part))
            part.replace(target)
        return target

    def _compile(self, *arguments: str) -> None:
        result = subprocess.run([COMPILER, *FLAGS, *arguments], cwd=self.path, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr


@pytest.fixture(scope="session")
def cuda_on_host(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The module that csrc/bindings.cpp makes, whose CUDA devices are this machine's processor."""
    pybind11 = pytest.importorskip("pybind11")
    tree = Tree(tmp_path_factory.mktemp("shim") / "tree")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CPLUS_INCLUDE_PATH", os.pathsep.join((pybind11.get_include(), get_path("include"))))
        library = tree.link("_native.so", (*KERNELS, "csrc/bindings.cpp"), shared=True)
    spec = spec_from_file_location("cuda_on_host._native", library)
    assert spec is not None and isinstance(spec.loader, ExtensionFileLoader)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def case(cuda_on_host: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Case:
    """The backend for CPU tensors, with the CUDA kernels behind it; fresh memory holds NaN."""
    monkeypatch.setattr(native, "_native", cuda_on_host)
    monkeypatch.setattr(native, "target", lambda device: cuda_on_host.Target(0, 0, 1))
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: torch.full(*shape, torch.nan, **options))
    return Case("cpu")


@pytest.fixture
def driver(tmp_path: Path) -> Callable[..., Path]:
    """Builds the kernels with driver.cpp, or another program, with a sanitizer and planted mistakes."""

    def build(sanitizer: str = "", *edits: Edit, sources: Sequence[str] = (*KERNELS, "driver.cpp")) -> Path:
        flags = ("-O0", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all") if sanitizer else ()
        return Tree(tmp_path / "tree", edits).link("driver", sources, flags)

    return build
