"""The C++ compiler of this machine: found, named, and what it is told."""

from __future__ import annotations

import errno
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from elsa_tune import places
from elsa_tune.errors import BuildFailed, CompilerMissing, NoRoom

REMEDY = (
    "install g++ or clang++ (Debian: apt-get install g++), or a compiler from PyPI: pip install 'elsa-tune[compiler]'"
)
BUILD_SECONDS = 120

WINDOWS = ("-Daligned_alloc(alignment,size)=_aligned_malloc(size,alignment)", "-Dfree=_aligned_free")
"""Its C library calls them so; its code is movable as it is, and compilers refuse to be told."""


def flags(system: str) -> tuple[str, ...]:
    """What compilers of a system, as sys.platform calls it, are told."""
    of_system = WINDOWS if system == "win32" else ("-fPIC",)
    exact = ("-fno-math-errno", "-fno-trapping-math", "-fno-exceptions")
    return ("-std=c++17", "-O3", *of_system, *exact, "-fvisibility=hidden")


FLAGS = flags(sys.platform)
WARNINGS = ("-Wall", "-Wextra", "-Wno-psabi")

ZIG_COMPILE, ZIG_LINK = ("-fno-sanitize=all", "-g0"), ("-nostdlib++",)
"""zig checks for undefined behaviour unless told not to, and would first spend minutes on a C++ library nobody needs."""


@dataclass(frozen=True, slots=True)
class Compiler:
    """A working C++17 compiler: its command, what linking adds, and its version line."""

    command: tuple[str, ...]
    link: tuple[str, ...]
    version: str

    def run(
        self, arguments: list[str], what: str, seconds: float = BUILD_SECONDS, folder: Path = Path()
    ) -> None:  # fmt: skip
        """Run it in a folder with arguments that end with its output, for so long at most. Raises BuildFailed with the first lines of its
        complaint, NoRoom where the disk is full."""
        try:
            done = subprocess.run(
                [*self.command, *arguments],
                capture_output=True,
                text=True,
                errors="replace",
                timeout=seconds,
                check=False,
                cwd=folder,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise BuildFailed(f"{what}: {error}; try another compiler with CXX=...") from error
        if done.returncode and os.strerror(errno.ENOSPC) in done.stderr:
            raise NoRoom(
                f"{self.command[0]}: {os.strerror(errno.ENOSPC)}; free some space, set ELSA_TUNE_HOME to another folder,"
                " and TMPDIR, where it keeps temporary files"
            )
        if done.returncode:
            raise BuildFailed(f"{what}: {self.command[0]} failed: {done.stderr.strip()[:600]}; see `elsa-tune doctor`")
        if not (folder / arguments[-1]).is_file():
            raise BuildFailed(
                f"{what}: {self.command[0]} wrote no {os.path.basename(arguments[-1])}; try another compiler with CXX=..."
            )


def _candidates() -> list[tuple[str, ...]]:
    """Commands that may be a compiler, those asked for first."""
    named = [_named()] if os.environ.get("CXX") else []
    zig = [(sys.executable, "-m", "ziglang", "c++")] if find_spec("ziglang") else []
    if zig and not os.access(os.path.expanduser("~"), os.W_OK):  # without a place for what it built it does nothing
        os.environ.setdefault("ZIG_GLOBAL_CACHE_DIR", str(places.home() / "zig"))
    return named + [(name,) for name in ("g++", "clang++", "c++")] + zig


def _named() -> tuple[str, ...]:
    """The command of CXX, which means the same in any folder."""
    program, *arguments = shlex.split(os.environ["CXX"], posix=os.name == "posix") or [""]
    return (os.path.abspath(program) if os.path.dirname(program) else program, *arguments)


def passed_over(found: Compiler) -> str:
    """CXX where it is not the compiler that was found; empty where it is, or where none is named."""
    return os.environ["CXX"] if os.environ.get("CXX") and _named() != found.command else ""


@cache
def find() -> Compiler:
    """The first compiler that answers: $CXX, g++, clang++, c++, then zig from PyPI. Raises CompilerMissing."""
    for command in _candidates():
        if shutil.which(command[0]) is None:
            continue
        try:
            answer = subprocess.run(
                [*command, "--version"], capture_output=True, text=True, errors="replace", timeout=30, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            continue
        if answer.returncode == 0 and answer.stdout:
            first = answer.stdout.splitlines()[0]
            if "ziglang" in command:
                return Compiler((*command, *ZIG_COMPILE), ZIG_LINK, first)
            return Compiler(command, (), first)
    raise CompilerMissing(f"no C++ compiler was found, so torch's own SDPA serves; {REMEDY}")
