"""NVRTC and hiprtc: the GPU makers' compilers as libraries, several versions side by side."""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib.util
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from elsa_tune.device import Device
from elsa_tune.errors import BuildFailed, CompilerMissing
from elsa_tune.generate.cuda import rocm as _rocm
from elsa_tune.generate.gpu import machine_code as _machine_code

REMEDY = "pip install 'elsa-tune[cuda]' brings NVRTC 12.9 (sm_50 to sm_121); hiprtc comes with ROCm's torch"


@dataclass(frozen=True)
class Rtc:
    """One library: how its functions begin, its version, and the architectures it compiles for, oldest first (empty: any)."""

    prefix: str
    version: str
    archs: tuple[str, ...]
    library: ctypes.CDLL

    def call(self, name: str, *arguments: object) -> int:
        """One of its functions, by the name behind the prefix: what it answers, 0 where all went well."""
        return int(getattr(self.library, self.prefix + name)(*arguments))

    def __str__(self) -> str:
        return f"{self.version} from {self.archs[0]}" if self.archs else self.version

    def compile(self, text: str, options: list[str], what: str) -> tuple[bytes, str]:
        """The machine code and the compiler's log. Raises BuildFailed with the compiler's words."""
        program, size = ctypes.c_void_p(), ctypes.c_size_t()
        kind = "CUBIN" if self.prefix == "nvrtc" else "Code"
        self.call("CreateProgram", ctypes.byref(program), text.encode(), b"kernel.cu", 0, None, None)
        try:
            given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
            failed = self.call("CompileProgram", program, len(options), given)
            self.call("GetProgramLogSize", program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            self.call("GetProgramLog", program, log)
            words = log.value.decode(errors="replace")
            if failed:
                raise BuildFailed(f"{what}: {self.version} failed: {words.strip()[:600]}; see `elsa-tune doctor`")
            self.call(f"Get{kind}Size", program, ctypes.byref(size))
            code = ctypes.create_string_buffer(size.value)
            self.call(f"Get{kind}", program, code)
            return code.raw, words
        finally:
            self.call("DestroyProgram", ctypes.byref(program))


def _packaged(*parts: str) -> Iterator[Path]:
    """Libraries in the folders that NVIDIA's wheels share."""
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations or []) if spec else []:
        yield from sorted(Path(root).glob("/".join(parts)))


@cache
def nvrtcs() -> tuple[Rtc, ...]:
    """Every NVRTC found, newest first: in NVIDIA's wheels, then the system's."""
    files = [*map(str, _packaged("c*", "lib", "libnvrtc.so.*"))]
    files += [*map(str, sorted(Path("/usr/local").glob("cuda*/lib64/libnvrtc.so.*")))]
    if system := ctypes.util.find_library("nvrtc"):
        files.append(system)
    found: dict[str, Rtc] = {}
    for file in files:
        if "builtins" in file or ".alt." in file:
            continue
        try:
            library, major, minor, count = ctypes.CDLL(file), ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
            library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
            library.nvrtcGetNumSupportedArchs(ctypes.byref(count))
            capabilities = (ctypes.c_int * count.value)()
            library.nvrtcGetSupportedArchs(capabilities)
        except (OSError, AttributeError):
            continue
        name = f"nvrtc {major.value}.{minor.value}"
        found.setdefault(name, Rtc("nvrtc", name, tuple(f"sm_{n}" for n in sorted(capabilities)), library))
    return tuple(
        sorted(found.values(), key=lambda rtc: [int(n) for n in re.findall(r"\d+", rtc.version)], reverse=True)
    )


@cache
def hiprtc() -> Rtc | None:
    """ROCm's compiler; until ROCm 6 it could be part of the runtime's library. Asked for AMD's GPUs only: a process that holds
    PoCL as well may end, where both bring an LLVM that the system shares."""
    for library in _rocm.libraries("hiprtc", "amdhip64"):
        try:
            major, minor = ctypes.c_int(), ctypes.c_int()
            library.hiprtcVersion(ctypes.byref(major), ctypes.byref(minor))
            return Rtc("hiprtc", f"hiprtc {major.value}.{minor.value}", _rocm.archs(), library)
        except AttributeError:
            continue
    return None


def find(device: Device) -> Rtc:
    """The newest compiler that still serves the device. Raises CompilerMissing."""
    candidates = nvrtcs() if device.kind == "cuda" else ()
    if device.kind == "hip":  # it brings an LLVM that ends a process where PoCL's is: not loaded without need
        candidates = tuple(filter(None, [hiprtc()]))
    for rtc in candidates:
        if not rtc.archs or device.arch in rtc.archs:
            return rtc
    there = ", ".join(map(str, candidates)) or "none"
    raise CompilerMissing(f"no compiler for {device.arch} was found ({there}); {REMEDY}")


def versions() -> dict[str, str]:
    """The newest of NVIDIA's compilers."""
    return {rtc.prefix: rtc.version for rtc in nvrtcs()[:1]}


def options(device: Device, registers: int) -> list[str]:
    """A compiler's options for a device; ``registers`` caps a thread's with NVRTC, 0 does not."""
    if device.kind == "hip":
        return [f"--offload-arch={device.arch}", "-std=c++14", "-O3"]
    found = [f"--gpu-architecture=sm_{device.capability}", "--std=c++14", "--ptxas-options=-v"]
    return [*found, *([f"--maxrregcount={registers}"] if registers else [])]


def compile_for(device: Device, text: str, registers: int, what: str) -> tuple[bytes, dict[str, int]]:
    """Machine code for a device that need not be here, and what the compiler says of its kernels.

    Raises BuildFailed, CompilerMissing.
    """
    rtc = find(device)
    if device.kind == "hip":
        code, _ = rtc.compile(text, options(device, registers), what)
        return code, _rocm.report(code)
    code, log = rtc.compile(text, options(device, registers), what)
    return code, {**of_log(log), **_loops(code)}


def of_log(log: str) -> dict[str, int]:
    """Registers, stack and spills as ptxas reports them: the most of any kernel; spills summed, four bytes each."""
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", log)]
    stack = [int(n) for n in re.findall(r"(\d+) bytes stack frame", log)]
    stores = [int(n) for n in re.findall(r"(\d+) bytes spill stores", log)]
    loads = [int(n) for n in re.findall(r"(\d+) bytes spill loads", log)]
    return {
        "registers": max(registers, default=0),
        "stack": max(stack, default=0),
        "spills": (sum(stores) + sum(loads)) // 4,
    }


def _loops(code: bytes) -> dict[str, int]:
    """Counts of instructions, where a disassembler that reads this code is installed; nothing elsewhere."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        return _machine_code.of_kernels(Path(file.name))
