"""What a GPU compiler says of a kernel: registers, spills, shared memory, and which instructions its hottest loop issues."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

MATRIX = re.compile(r"^(H|I|D|B|Q|O)?(G?MMA|GMMA)\b|^(H|I|D|B|Q|O|F8)?G?MMA\.|^U?TC\w*MMA|^v_(s?mfma|smfmac|wmma|swmmac)")
"""Matrix instructions: mma and wgmma as SASS spells them, mfma and wmma as AMD does."""

_KINDS = {
    "matrix": MATRIX,
    "fma": re.compile(r"^FFMA|^v_(pk_)?fma[ck]?_f32|^v_fmac_f32|^v_dual_fmac"),
    "exp": re.compile(r"^MUFU|^v_(exp|log|rcp)_f32"),
    "shared": re.compile(r"^(LDS|STS|LDSM)|^ds_"),
    "memory": re.compile(r"^(LDG|STG|LDGSTS|UBLKCP|UTMALDG)|^(global|buffer|flat)_(load|store)"),
    "local": re.compile(r"^(LDL|STL)|^scratch_"),
}


def count(instructions: list[str]) -> dict[str, int]:
    """How many instructions of each kind, and in all."""
    found = {kind: sum(bool(pattern.match(i)) for i in instructions) for kind, pattern in _KINDS.items()}
    return {**found, "all": len(instructions)}


def _loops(lines: list[tuple[str, str]]) -> Iterator[list[str]]:
    """Bodies of backward branches, as mnemonics. ``lines`` are (label, "") or ("", instruction)."""
    at = {label: i for i, (label, _) in enumerate(lines) if label}
    for i, (_, instruction) in enumerate(lines):
        target = re.search(r"(?:BRA\S*|s_c?branch\S*)\s+.*?`?\(?(\.L\w+|\.LBB\w+)", instruction)
        if target and at.get(target[1], i) < i:
            yield [text.split()[0] for _, text in lines[at[target[1]] : i] if text]


def hottest_loop(lines: list[tuple[str, str]]) -> dict[str, int]:
    """Instruction counts of the innermost loop with most arithmetic, or of everything where nothing loops."""
    bodies = [count(body) for body in _loops(lines)]
    inner = [b for b in bodies if b["fma"] + b["matrix"]] or [count([t.split()[0] for _, t in lines if t])]
    densest = max(inner, key=lambda b: (b["fma"] + 8 * b["matrix"]) / b["all"])
    return {f"loop_{kind}": n for kind, n in densest.items()}


def of_sass(sass: str) -> dict[str, int]:
    """Counts from nvdisasm's text."""
    lines = []
    for line in sass.splitlines():
        label = re.match(r"\s*(\.L\w+):", line)
        instruction = re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([^;]+);", line)
        if label:
            lines.append((label[1], ""))
        elif instruction:
            lines.append(("", instruction[1].strip()))
    everything = count([text.split()[0] for _, text in lines if text])
    return {"matrix": everything["matrix"], "local": everything["local"], **hottest_loop(lines)}


def of_cubin(cubin: bytes, tools: Path) -> dict[str, int]:
    """Registers, stack, shared memory and instruction counts of a cubin, by NVIDIA's own tools in folder ``tools``."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def run(*command: str) -> str:
            return subprocess.run([str(tools / command[0]), *command[1:], file.name], capture_output=True, text=True, check=True).stdout

        usage = dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", run("cuobjdump", "-res-usage")))
        sass = run("nvdisasm", "-c")
    used = {"registers": int(usage["REG"]), "stack": int(usage["STACK"]) + int(usage["LOCAL"]), "shared": int(usage["SHARED"])}
    return {**used, **of_sass(sass)}


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
    everything = count([text.split()[0] for _, text in lines if text])
    return {
        "registers": note("vgpr_count") + note("agpr_count"),
        "stack": note("private_segment_fixed_size"),
        "spills": note("vgpr_spill_count") + note("sgpr_spill_count"),
        "shared": note("group_segment_fixed_size"),
        "matrix": everything["matrix"],
        "local": everything["local"],
        **hottest_loop(lines),
    }  # fmt: skip


def flaw(resources: Mapping[str, int], precision: str) -> str:
    """Why a kernel with these resources must not be used, or nothing."""
    if precision == "strict" and resources.get("matrix"):
        return f"strict means plain multiply-adds, and the assembly has {resources['matrix']} matrix instructions"
    spilled = resources.get("spills") or resources.get("local")
    if spilled:
        return f"{spilled} spills of {resources['registers']} registers, {resources['stack']} bytes of stack"
    return ""
