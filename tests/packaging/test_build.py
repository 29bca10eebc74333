"""What ``pip install .`` builds, with and without a C++ compiler and nvcc, and what it takes along."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import tomllib
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
EXTENSION = re.compile(r"vittle_kernels/_native\.[^/]*\.so")


class Wheel(NamedTuple):
    path: Path
    log: str

    @property
    def files(self) -> dict[str, bytes]:
        with zipfile.ZipFile(self.path) as archive:
            return {name: archive.read(name) for name in archive.namelist()}

    def extract_library(self, folder: Path) -> Path:
        with zipfile.ZipFile(self.path) as archive:
            return Path(archive.extract(next(filter(EXTENSION.fullmatch, archive.namelist())), folder))


def run(*command: str | Path, cwd: Path | None = None, **variables: str) -> str:
    """What a command prints; it sees neither this environment's Python path nor our own settings."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("VITTLE_", "PYTHON", "CXX"))}
    result = subprocess.run(
        command, cwd=cwd, env=kept | variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


def build(source: Path, folder: Path, **variables: str) -> Wheel:
    """A wheel under ordinary build isolation; its temporary files are beside the source tree."""
    begin = time.perf_counter()
    command = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--verbose", "--wheel-dir", folder, source)
    log = run(*command, cwd=None, TMPDIR=str(source.parent), **variables)
    print(f"built with {variables} in {time.perf_counter() - begin:.0f} s")
    return Wheel(next(folder.glob("*.whl")), log)


def install(wheel: Wheel, folder: Path) -> Path:
    """The interpreter of a fresh environment with the wheel in it and this one's torch in sight."""
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", wheel.path)
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    Path(site, "torch.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    return python


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source tree as a fresh checkout has it. One for all builds: none may trip over what another one left."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    tree = tmp_path_factory.mktemp("packaging") / "source"
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).exists():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)
    return tree


@pytest.fixture(scope="module")
def cpu_wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Wheel:
    return build(source, tmp_path_factory.mktemp("cpu"), VITTLE_CUDA="0")


@pytest.fixture(scope="module")
def cuda_wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Wheel:
    if NVCC is None:
        pytest.skip("no nvcc")
    return build(source, tmp_path_factory.mktemp("cuda"), CUDACXX=NVCC)


@pytest.fixture(params=["cpu_wheel", "cuda_wheel"])
def wheel(request: pytest.FixtureRequest) -> Wheel:
    built: Wheel = request.getfixturevalue(request.param)
    return built


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment that has what a build requires."""
    folder = tmp_path_factory.mktemp("tools")
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    required = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    run(sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install", *required)
    return folder / "bin"


def test_wheel_holds_both_packages_and_the_library(wheel: Wheel) -> None:
    names = wheel.files.keys()
    for package, folder in (("vittle_kernels", ROOT), ("vittle", ROOT / "python")):
        modules = {str(path.relative_to(folder)) for path in (folder / package).rglob("*.py")}
        assert modules | {f"{package}/py.typed"} <= names
    assert sum(map(bool, map(EXTENSION.fullmatch, names))) == 1
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"vittle_kernels", "vittle"}


def test_wheel_names_no_folder_of_the_machine_that_built_it(wheel: Wheel, source: Path) -> None:
    folders = {source.parent, ROOT, Path.home(), Path(sys.prefix)} - {Path("/")}
    for name, content in wheel.files.items():
        for folder in folders:
            assert f"{folder}/".encode() not in content, f"{name} names {folder}"


def test_building_needs_no_torch(wheel: Wheel) -> None:
    isolated = re.findall(r"Successfully installed (.*)", wheel.log)
    assert isolated and "torch" not in " ".join(isolated)


def test_library_links_neither_torch_nor_cuda(wheel: Wheel, tmp_path: Path) -> None:
    needed = re.findall(r"NEEDED.*\[(.*)\]", run("readelf", "--dynamic", wheel.extract_library(tmp_path)))
    assert needed
    assert not [name for name in needed if re.search("torch|c10|cuda|python|omp", name)]


def test_wheel_works_in_a_fresh_environment(cpu_wheel: Wheel, tmp_path: Path) -> None:
    python = install(cpu_wheel, tmp_path / "venv")
    diagnosis = run(python, "-m", "vittle_kernels", cwd=tmp_path)
    assert "cpu     available" in diagnosis
    assert "cuda    not available: built without CUDA (no nvcc, or VITTLE_CUDA=0)" in diagnosis
    code = "import torch, vittle_kernels as v; v.fused_ib(torch.ones(2, 8), torch.ones(2, 16), 0.5, backend='cpu')"
    location = run(python, "-c", f"{code}; print(v.__file__)", cwd=tmp_path)
    assert Path(location.strip()).is_relative_to(tmp_path)


def test_same_tree_builds_the_same_library_again(cpu_wheel: Wheel, source: Path, tmp_path: Path) -> None:
    again = build(source, tmp_path / "again", VITTLE_CUDA="0")
    assert again.extract_library(tmp_path / "a").read_bytes() == cpu_wheel.extract_library(tmp_path / "b").read_bytes()


def cuda_code(library: Path) -> tuple[set[str], set[str]]:
    """The architectures that a library has machine code and PTX for."""
    triton = importlib.util.find_spec("triton")
    bundled = triton and triton.origin and Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"
    program = shutil.which("cuobjdump") or (bundled and shutil.which(bundled))
    if not program:
        pytest.skip("no cuobjdump")
    elf, ptx = (run(program, option, library) for option in ("--list-elf", "--list-ptx"))
    return set(re.findall(r"sm_\d+(?=\.cubin)", elf)), set(re.findall(r"sm_\d+(?=\.ptx)", ptx))


def test_cuda_architectures(cuda_wheel: Wheel, tmp_path: Path) -> None:
    assert cuda_code(cuda_wheel.extract_library(tmp_path)) == ({"sm_80", "sm_90", "sm_100"}, {"sm_100"})


def test_cuda_library_loads_without_a_device_and_says_what_it_is_for(cuda_wheel: Wheel, tmp_path: Path) -> None:
    python = install(cuda_wheel, tmp_path / "venv")
    code = "from vittle_kernels import available_backends as a; print(a()['cpu'], a()['cuda'], sep='\\n')"
    cpu, cuda = run(python, "-c", code, cwd=tmp_path, CUDA_VISIBLE_DEVICES="").splitlines()
    assert cpu == "None"
    assert cuda.startswith("built for sm_80, sm_90, sm_100 and PTX of sm_100 with CUDA ")


@pytest.mark.skipif(NVCC is None, reason="no nvcc")
def test_cuda_architectures_can_be_chosen(source: Path, tmp_path: Path) -> None:
    chosen = build(source, tmp_path, VITTLE_CUDA="1", VITTLE_CUDA_ARCHITECTURES="90", CUDACXX=str(NVCC))
    assert cuda_code(chosen.extract_library(tmp_path)) == ({"sm_90"}, {"sm_90"})


def test_installs_without_a_compiler_and_says_so(source: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    built = build(source, tmp_path, PATH=str(tmp_path / "empty"))
    assert "no C++ compiler: installing without the CPU and CUDA kernels" in built.log
    assert not any(name.endswith(".so") for name in built.files)

    python = install(built, tmp_path / "venv")
    diagnosis = run(python, "-m", "vittle_kernels", cwd=tmp_path)
    for line in ("eager   available", "cpu     not available", "cuda    not available"):
        assert line in diagnosis
    assert diagnosis.count("install a C++17 compiler") == 2
    code = "import torch, vittle_kernels as v; v.fused_ib(torch.ones(2, 8), torch.ones(2, 16), 0.5)"
    run(python, "-c", code, cwd=tmp_path)


@pytest.mark.parametrize(("processor", "has_avx"), [("x86_64", True), ("aarch64", False)])
def test_instruction_sets_follow_the_processor(
    source: Path, tools: Path, tmp_path: Path, processor: str, has_avx: bool
) -> None:
    definitions = {
        "CMAKE_SYSTEM_NAME": "Linux",
        "CMAKE_SYSTEM_PROCESSOR": processor,
        "CMAKE_EXPORT_COMPILE_COMMANDS": "ON",
        "CMAKE_MAKE_PROGRAM": tools / "ninja",
        "Python_EXECUTABLE": tools / "python",
        "pybind11_DIR": run(tools / "python", "-m", "pybind11", "--cmakedir").strip(),
    }
    arguments = (f"-D{name}={value}" for name, value in definitions.items())
    run(tools / "cmake", "-S", source, "-B", tmp_path, "-G", "Ninja", *arguments)
    commands = [entry["command"] for entry in json.loads((tmp_path / "compile_commands.json").read_text())]
    kernels = [command for command in commands if "cpu/kernels.cpp" in command]
    assert len(kernels) == (3 if has_avx else 1)
    assert any("-mavx" in command for command in commands) == has_avx
    assert any("VITTLE_X86" in command for command in commands) == has_avx


def test_source_distribution_is_complete(source: Path, tools: Path, tmp_path: Path) -> None:
    code = f"import setuptools.build_meta as backend; print(backend.build_sdist({str(tmp_path)!r}))"
    name = run(tools / "python", "-c", code, cwd=source).splitlines()[-1]
    with tarfile.open(tmp_path / name) as archive:
        packed = {member.partition("/")[2] for member in archive.getnames()}
    needed = [path for path in (source / "csrc").rglob("*") if path.is_file()]
    assert {"CMakeLists.txt", "setup.py", "LICENSE"} | {str(path.relative_to(source)) for path in needed} <= packed


def test_kernels_include_no_torch_header() -> None:
    for path in filter(Path.is_file, (ROOT / "csrc").rglob("*")):
        assert not re.search(r"#include\s*[<\"](torch|ATen|c10)/", path.read_text()), path
