"""The C++ compiler of this machine: found, named, and asked what its code does with registers."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

from elsa_tune.errors import BuildFailed, CompilerMissing

REMEDY = (
    "install g++ or clang++ (Debian: apt-get install g++), or a compiler from PyPI: pip install 'elsa-tune[compiler]'"
)
BUILD_SECONDS = 120

ZIG_COMPILE, ZIG_LINK = ("-fno-sanitize=all", "-g0"), ("-nostdlib++",)
"""zig checks for undefined behaviour unless told not to, and would first spend minutes on a C++ library nobody needs."""


@dataclass(frozen=True, slots=True)
class Compiler:
    """A working C++17 compiler: its command, what linking adds, and its version line."""

    command: tuple[str, ...]
    link: tuple[str, ...]
    version: str

    def run(self, arguments: list[str], what: str) -> None:
        """Run it. Raises BuildFailed with the first lines of its complaint."""
        try:
            done = subprocess.run(
                [*self.command, *arguments], capture_output=True, text=True, timeout=BUILD_SECONDS, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise BuildFailed(f"{what}: {error}; try another compiler with CXX=...") from error
        if done.returncode:
            raise BuildFailed(f"{what}: {self.command[0]} failed: {done.stderr.strip()[:600]}; see `elsa-tune doctor`")


def _candidates() -> list[tuple[str, ...]]:
    named = [tuple(shlex.split(os.environ["CXX"]))] if os.environ.get("CXX") else []
    zig = [(sys.executable, "-m", "ziglang", "c++")] if find_spec("ziglang") else []
    return named + [(name,) for name in ("g++", "clang++", "c++")] + zig


@cache
def find() -> Compiler:
    """The first compiler that answers: $CXX, g++, clang++, c++, then zig from PyPI. Raises CompilerMissing."""
    for command in _candidates():
        if shutil.which(command[0]) is None:
            continue
        try:
            answer = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=30, check=False)
        except (OSError, subprocess.TimeoutExpired):
            continue
        if answer.returncode == 0 and answer.stdout:
            first = answer.stdout.splitlines()[0]
            if "ziglang" in command:
                return Compiler((*command, *ZIG_COMPILE), ZIG_LINK, first)
            return Compiler(command, (), first)
    raise CompilerMissing(f"no C++ compiler was found, so torch's own SDPA serves; {REMEDY}")


_LABEL = re.compile(r"(\.?L\w+):")
_JUMP = re.compile(r"\s+(?:j\w+|b\.?\w*|cbn?z\s+\w+,)\s+(\.?L\w+)")
_FMA = re.compile(r"\s(vfn?m(add|sub)\w*ps|fml[as])\s")
_STACK_STORE = re.compile(r"\sv?mov[au]p\w\s+%[xyz]mm\d+, -?\d*\(%r[sb]p\)|\sst[rp]\s+q\d+.*\[sp(, ?#?\d+)?\]")


def hot_loops(assembly: str) -> dict[str, int]:
    """Multiply-adds in innermost loops, and vector stores to fixed stack slots there: accumulators left in memory."""
    lines = assembly.splitlines()
    labels = {m[1]: i for i, line in enumerate(lines) if (m := _LABEL.match(line))}
    targets = {labels[m[1]] for line in lines if (m := _JUMP.match(line)) and m[1] in labels}
    counts = {"hot_fmas": 0, "hot_spills": 0}
    for end, line in enumerate(lines):
        jump = _JUMP.match(line)
        start = labels.get(jump[1], end) if jump else end
        body = lines[start + 1 : end]
        if start < end and targets.isdisjoint(range(start + 1, end)):
            fmas = sum(bool(_FMA.search(inner)) for inner in body)
            if fmas:
                counts["hot_fmas"] += fmas
                counts["hot_spills"] += sum(bool(_STACK_STORE.search(inner)) for inner in body)
    return counts
