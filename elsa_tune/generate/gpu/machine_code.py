"""What a GPU compiler says of a kernel: registers, spills, shared memory, and which instructions its hottest loop issues."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

MATRIX = re.compile(r"^[A-Z]{0,2}G?MMA\b|^U?TC\w*MMA|^v_(s?mfma|smfmac|wmma|swmmac)|^(mma|wmma|wgmma)\.|^tcgen05\.mma")
"""Matrix instructions as SASS, PTX and AMD assembly spell them."""

LARGEST_STACK = 512
"""Bytes of a thread's stack above which too much was spilled."""

SPILL_SHARE = 0.02
"""Share of the hottest loop that may be spills."""

_KINDS = {
    "matrix": MATRIX,
    "fma": re.compile(r"^(FFMA|HFMA2)|^fma\.rn|^v_(pk_)?fma[ck]?_f32|^v_fmac_f32|^v_dual_fmac"),
    "exp": re.compile(r"^MUFU|^ex2|^v_(exp|log|rcp)_f32"),
    "shared": re.compile(r"^(LDS|STS|LDSM)|^ds_|^(ld|st)\.shared"),
    "memory": re.compile(
        r"^(LDG|STG|LDGSTS|UBLKCP|UTMALDG)|^(global|buffer|flat)_(load|store)|^(ld|st)\.global|^cp\.async"
    ),
    "local": re.compile(r"^(LDL|STL)|^scratch_|^(ld|st)\.local"),
}


def count(instructions: list[str]) -> dict[str, int]:
    """How many instructions of each kind, and in all."""
    found = {kind: sum(bool(pattern.match(i)) for i in instructions) for kind, pattern in _KINDS.items()}
    return {**found, "all": len(instructions)}


def _loops(lines: list[tuple[str, str]]) -> Iterator[tuple[int, int]]:
    """Where loops begin and end. ``lines`` are (label, "") or ("", instruction).

    A backward branch makes a loop, unless the kernel ends in between: what lies beyond its end (waiting for a barrier, say) was put
    out of the way, and jumps back to where it was left.
    """
    at = {label: i for i, (label, _) in enumerate(lines) if label}
    end = -1  # the last place so far where the kernel ends
    for i, (_, instruction) in enumerate(lines):
        if instruction in ("EXIT", "s_endpgm", "ret"):
            end = i
        target = re.search(r"(?:BRA\S*|s_c?branch\S*)\s+.*?`?\(?(\.L\w+|\.LBB\w+)", instruction)
        if target and end < at.get(target[1], i) < i:
            yield at[target[1]], i


def hottest_loop(lines: list[tuple[str, str]]) -> dict[str, int]:
    """Instruction counts of the innermost loop with most arithmetic, the shorter of two alike; of everything where nothing
    loops. A loop with less than a 64th of the arithmetic around it is part of what is around it."""

    def counted(first: int, last: int) -> dict[str, int]:
        return count([text.split()[0] for _, text in lines[first : last + 1] if text])

    def arithmetic(found: dict[str, int]) -> int:
        return found["fma"] + found["matrix"]

    loops = {place: counted(*place) for place in _loops(lines)}
    busy = {place: found for place, found in loops.items() if arithmetic(found)}
    innermost = [
        found
        for (first, last), found in busy.items()
        if not any(
            first <= a and b <= last and (a, b) != (first, last) and 64 * arithmetic(inner) > arithmetic(found)
            for (a, b), inner in busy.items()
        )
    ]
    hottest = max(
        innermost or [counted(0, len(lines))], key=lambda found: (found["matrix"], found["fma"], -found["all"])
    )
    return {f"loop_{kind}": n for kind, n in hottest.items()}


def of_sass(sass: str) -> dict[str, int]:
    """Counts from nvdisasm's text."""
    lines = []
    for line in sass.splitlines():
        label = re.match(r"\s*(\.L\w+):", line)
        instruction = re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:\{\s*)?(@!?U?P\w+\s+)?([^;}]+)[;}]", line)
        if label:
            lines.append((label[1], ""))
        elif instruction:
            perhaps = instruction[1] and instruction[2].strip() == "EXIT"
            lines.append(("", "EXIT.PERHAPS" if perhaps else instruction[2].strip()))
    return _of_lines(lines)


def of_ptx(ptx: str) -> dict[str, int]:
    """Counts from PTX, for targets whose machine code NVIDIA's current tools no longer read."""
    lines = []
    for line in ptx.splitlines():
        label, instruction = re.match(r"\$?(L\w+):", line), re.match(r"\s+(?:@!?%p\d+\s+)?([a-z][^;]*);", line)
        if label:
            lines.append((f".{label[1]}", ""))
        elif instruction:
            lines.append(("", re.sub(r"^bra\S*\s+\$?", "BRA .", instruction[1])))
    return _of_lines(lines)


def of_cubin(cubin: bytes, ptx: str, tools: Path) -> dict[str, int]:
    """Registers, stack, shared memory and instruction counts of a cubin, by NVIDIA's own tools in folder ``tools``."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def run(*command: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [str(tools / command[0]), *command[1:], file.name], capture_output=True, text=True, check=False
            )

        usage = dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", run("cuobjdump", "-res-usage").stdout))
        sass = run("nvdisasm", "-c")
    counts = of_ptx(ptx) if sass.returncode else of_sass(sass.stdout)
    used = {
        "registers": int(usage.get("REG", 0)),
        "stack": int(usage.get("STACK", 0)) + int(usage.get("LOCAL", 0)),
        "shared": int(usage.get("SHARED", 0)),
    }
    return {**used, **counts}


@cache
def disassemblers() -> tuple[str, ...]:
    """NVIDIA's disassemblers that are here: an old one for sm_50 to sm_72 (`make` puts it there), the system's, Triton's."""
    triton = importlib.util.find_spec("triton")
    bundled = (
        [Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "nvdisasm"] if triton and triton.origin else []
    )
    places = [
        Path(sys.prefix) / "share" / "nvdisasm-12.8" / "nvdisasm",
        Path(shutil.which("nvdisasm") or "-"),
        *bundled,
    ]
    return tuple(str(place) for place in places if place.is_file())


def of_kernels(cubin: Path) -> dict[str, int]:
    """Instruction counts of a cubin by the first disassembler that reads it; nothing where none does."""
    for tool in disassemblers():
        sass = subprocess.run([tool, "-c", str(cubin)], capture_output=True, text=True, check=False)
        if not sass.returncode:
            return of_sass(sass.stdout)
    return {}


NOTES = {
    "registers": "vgpr_count",  # AGPRs included
    "stack": "private_segment_fixed_size",
    "spills": "vgpr_spill_count",  # a scalar register is spilled into a lane of a vector one: no memory
    "shared": "group_segment_fixed_size",
}
"""Resources as AMD's compiler notes them."""


def of_amdgcn(assembly: str) -> dict[str, int]:
    """Registers, stack, shared memory and instruction counts from AMD assembly and its notes."""

    def note(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", assembly)
        return int(found[1]) if found else 0

    lines = []
    for line in assembly.splitlines():
        label, instruction = re.match(r"(\.LBB\w+):", line), re.match(r"\s+([vsdgbf]\w*_\w+.*)", line)
        if label:
            lines.append((label[1], ""))
        elif instruction:
            lines.append(("", instruction[1].strip()))
    return {**{resource: note(name) for resource, name in NOTES.items()}, **_of_lines(lines)}


def of_code_object(disassembly: str, notes: list[dict[str, int]]) -> dict[str, int]:
    """The same of a code object, from its disassembly and the notes of its kernels: the most of any."""
    lines, start, name = list[tuple[str, str]](), 0, ""
    for line in disassembly.splitlines():
        if function := re.match(r"(\w+):", line):
            name, start = function[1], 0
        elif found := re.match(r"\s+(\S.*?)\s+// ([0-9A-F]+):", line):
            address = int(found[2], 16)
            start = start or address
            branch = re.search(r"<\w+\+0x([0-9A-Fa-f]+)>", line)
            to = f" .LBB{name}{int(branch[1], 16)}" if branch else ""
            lines += [(f".LBB{name}{address - start}", ""), ("", found[1].split()[0] + to if branch else found[1])]
    most = {resource: max(kernel[note] for kernel in notes) for resource, note in NOTES.items()}
    return {**most, **_of_lines(lines)}


def _of_lines(lines: list[tuple[str, str]]) -> dict[str, int]:
    """Counts over everything and of the hottest loop."""
    everything = count([text.split()[0] for _, text in lines if text])
    return {"matrix": everything["matrix"], "local": everything["local"], **hottest_loop(lines)}


def spills(resources: Mapping[str, int]) -> int:
    """How often the kernel goes to memory for want of registers; its bytes of stack where that is all a tool says."""
    return resources.get("spills") or resources.get("local") or resources.get("stack") or 0


def flaw(resources: Mapping[str, int]) -> str:
    """Why a kernel with these resources must not be timed, or nothing. A few spills outside the hottest loop are left to
    the clock."""
    if resources.get("strict") and resources.get("matrix"):
        return f"strict means plain multiply-adds, and the assembly has {resources['matrix']} matrix instructions"
    in_loop, stack = resources.get("loop_local", 0), resources.get("stack", 0)
    if stack > LARGEST_STACK or in_loop > SPILL_SHARE * resources.get("loop_all", 0):
        return f"{spills(resources)} spills beside {resources['registers']} registers, {in_loop} of them in the hottest loop"
    return ""
