"""What a kernel's machine code says of its speed: registers, spills, and what its hot loop executes."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

PIPES = {
    "integer": ("IMAD",),
    "logic": (
        *("LOP3", "PLOP3", "IADD3", "VIADD", "SHF", "SHL", "SHR", "PRMT", "LEA", "ISETP", "SEL", "IMNMX", "VIMNMX"),
        *("FSETP", "FSEL", "FMNMX", "FMNMX3", "I2FP", "F2FP", "MOV", "VOTE", "P2R", "R2P"),
    ),
    "special": ("MUFU", "I2F", "F2I", "F2F"),
    "float": ("FFMA", "FMUL", "FADD", "FFMA2", "FMUL2", "FADD2"),
}
"""Opcodes by the unit that executes them; "issue" is all of them."""

_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)([.\w]*)\s*(.*?)\s*;")
_LABEL = re.compile(r"^(\.L_\w+):")
_REGISTER = re.compile(r"\bR(\d+)")


@dataclass(frozen=True)
class Instruction:
    opcode: str
    modifiers: str
    operands: str

    @property
    def width(self) -> int:
        """Bytes of a global access."""
        sizes = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
        return next((sizes[part] for part in self.modifiers.split(".") if part in sizes), 4)


@dataclass(frozen=True)
class Cost:
    """A kernel's resources, and its hot loop: the innermost one with the most special functions.

    Every instruction between the loop's head and its branch back counts, both sides of any branch included, NOPs
    left out; what comes before and after, and the masked last turn, do not. ``elements`` is what a thread does in
    one turn.
    """

    registers: int
    local_bytes: int
    elements: int
    loop: tuple[Instruction, ...]

    @property
    def instructions(self) -> float:
        """Executed an element."""
        return len(self.loop) / self.elements

    @property
    def bytes(self) -> float:
        """Read and written in global memory an element."""
        return sum(access.width for access in self.accesses) / self.elements

    @property
    def accesses(self) -> list[Instruction]:
        return [each for each in self.loop if each.opcode in ("LDG", "STG")]

    @property
    def widths(self) -> list[int]:
        """Of the loop's global accesses, in bytes, each width once."""
        return sorted({access.width for access in self.accesses})

    @property
    def local_accesses(self) -> int:
        return sum(each.opcode in ("LDL", "STL") for each in self.loop)

    @property
    def loads_in_flight(self) -> int:
        """Global loads issued before the first instruction that reads what one of them brings."""
        loads, arriving = 0, set[int]()
        for each in self.loop:
            registers = [int(number) for number in _REGISTER.findall(each.operands)]
            if each.opcode == "LDG":
                loads += 1
                arriving.update(range(registers[0], registers[0] + max(1, each.width // 4)))
            elif arriving.intersection(registers[1:] if each.operands.startswith("R") else registers):
                break
        return loads

    def pipe(self, name: str) -> float:
        """Instructions an element on one of ``PIPES``."""
        counts = Counter(each.opcode for each in self.loop)
        return sum(counts[opcode] for opcode in PIPES[name]) / self.elements


def read_costs(cubin: Path, elements: int) -> dict[str, Cost]:
    """The costs of a cubin's kernels that have a loop with special functions, by their demangled names."""
    registers = dict(
        re.findall(r"Function ([^:\s]+):\n\s+(REG:.*)", _run("cuobjdump", "-res-usage", str(cubin)), re.MULTILINE)
    )
    costs = {}
    for name, lines in _functions(_run("nvdisasm", "-c", str(cubin))).items():
        usage = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", registers[name])}
        if loop := _hot_loop(lines):
            costs[_demangle(name)] = Cost(usage["REG"], usage["STACK"] + usage["LOCAL"], elements, loop)
    return costs


def _functions(listing: str) -> dict[str, list[str]]:
    functions: dict[str, list[str]] = {}
    current: list[str] = []
    for line in listing.splitlines():
        if section := re.match(r"^\.text\.(\S+):", line):
            current = functions.setdefault(section[1], [])
        else:
            current.append(line)
    return functions


def _hot_loop(lines: list[str]) -> tuple[Instruction, ...]:
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in lines:
        if label := _LABEL.match(line):
            labels[label[1]] = len(code)
        elif (found := _INSTRUCTION.match(line)) and found[1] != "NOP":
            code.append(Instruction(*found.groups()))
    loops = []
    for end, each in enumerate(code):
        target = re.search(r"`\((\.L_\w+)\)", each.operands)
        if each.opcode == "BRA" and "DIV" not in each.modifiers and target and labels.get(target[1], end) < end:
            loops.append(range(labels[target[1]], end + 1))
    # What stands out of line behind the kernel's EXIT jumps back too.
    loops = [each for each in loops if not any(code[i].opcode == "EXIT" for i in each)]
    innermost = [each for each in loops if not any(set(other) < set(each) for other in loops)]

    def special(body: range) -> int:
        return sum(code[i].opcode == "MUFU" for i in body)

    hot = max(innermost, key=special, default=range(0))
    return tuple(code[i] for i in hot) if special(hot) else ()


def _demangle(name: str) -> str:
    if shutil.which("c++filt") is None:
        raise SystemExit("static costs need c++filt, which binutils has")
    return subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout.strip()


def _run(tool: str, *arguments: str) -> str:
    """NVIDIA's disassemblers come with triton."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    command = [str(path) if path.exists() else tool, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
