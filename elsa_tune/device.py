"""Device: where a kernel runs, and which other devices are its kin."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from elsa_tune.errors import BadDevice

RUNGS = ("exact", "model", "arch", "family")
ISA_ORDER = ("avx512", "avx2", "neon", "portable")
_ISA_FEATURES = {"avx512": {"avx512f", "avx512vl", "avx512dq", "avx512bw", "fma"}, "avx2": {"avx2", "fma"}}


@dataclass(frozen=True, slots=True)
class Device:
    """A processor: identity (spelled, compared) and facts about it (not compared).

    ``model`` is the maker's own numbering (``amd_f25m17``: family 25, model 17), which virtual machines pass on even
    where they hide features; ``arch`` is archspec's microarchitecture. ``memory`` and ``caches`` are in bytes.
    """

    kind: str
    model: str
    arch: str
    cores: int
    name: str = field(default="", compare=False)
    memory: int = field(default=0, compare=False)
    caches: tuple[int, ...] = field(default=(), compare=False)

    def __str__(self) -> str:
        return f"{self.kind}:{self.model}-{self.arch}-c{self.cores}"

    @classmethod
    def parse(cls, text: str) -> Device:
        """Read ``cpu:amd_f25m17-zen4-c2``. Raises BadDevice."""
        found = re.fullmatch(r"([a-z]+):([a-z0-9_]+)-([a-z0-9_]+)-c(\d+)", text.strip())
        if not found:
            raise BadDevice(f"device {text!r} is misspelled; write it like cpu:amd_f25m17-zen4-c2, or use auto")
        return cls(found[1], found[2], found[3], int(found[4]))

    @property
    def capability(self) -> int:
        """An NVIDIA GPU's compute capability as Triton counts it, 90 for sm_90; 0 for other devices."""
        found = re.match(r"sm_(\d+)", self.arch)
        return int(found[1]) if found else 0

    @property
    def warp(self) -> int:
        """Threads that a GPU runs in lockstep: a warp's 32, or a wavefront's 64 before RDNA."""
        return 64 if self.arch.startswith("gfx9") else 32

    @property
    def isas(self) -> tuple[str, ...]:
        """Instruction sets that generated code may use here, best first."""
        return _isas(self.arch)

    def kinship(self, other: Device) -> str | None:
        """The closest rung on which ``other`` stands to this device, or None for another kind of device."""
        if self == other:
            return "exact"
        if self.kind != other.kind:
            return None
        if self.model == other.model:
            return "model"
        same = self.isas[0] == other.isas[0] if self.kind == "cpu" else self.arch == other.arch
        return "arch" if same else "family"

    @property
    def last_cache(self) -> int:
        """Bytes of the last-level cache; 32 MiB where the system does not say."""
        return self.caches[-1] if self.caches else 32 << 20


@cache
def _isas(arch: str) -> tuple[str, ...]:
    import archspec.cpu

    target = archspec.cpu.TARGETS.get(arch)
    if target is None:
        return ("portable",)
    if target.family.name == "aarch64":
        return ("neon", "portable")
    return (
        *tuple(isa for isa in ISA_ORDER if all(f in target for f in _ISA_FEATURES.get(isa, {"impossible"}))),
        "portable",
    )


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _caches() -> tuple[int, ...]:
    sizes: dict[int, int] = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        if _read(f"{index}/type").strip() != "Instruction":
            size = re.match(r"(\d+)([KM])", _read(f"{index}/size"))
            if size:
                sizes[int(_read(f"{index}/level"))] = int(size[1]) << (10 if size[2] == "K" else 20)
    return tuple(sizes[level] for level in sorted(sizes))


def _cpu_model(cpuinfo: str) -> str:
    def entry(key: str) -> str:
        found = re.search(rf"^{key}\s*:\s*(.+)$", cpuinfo, re.M)
        return found[1].strip() if found else ""

    if entry("vendor_id"):
        vendor = {"AuthenticAMD": "amd", "GenuineIntel": "intel"}.get(entry("vendor_id"), "x86")
        return f"{vendor}_f{entry('cpu family')}m{entry('model')}"
    if entry("CPU implementer"):
        return f"arm_{entry('CPU implementer')}_{entry('CPU part')}".lower()
    return re.sub(r"[^a-z0-9]+", "_", (platform.processor() or platform.machine()).lower())


@cache
def host_cpu() -> Device:
    """This machine's CPU. ``cores`` are the ones this process may use."""
    import archspec.cpu

    cpuinfo = _read("/proc/cpuinfo")
    name = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.M)
    memory = re.search(r"^MemTotal:\s*(\d+)", _read("/proc/meminfo"), re.M)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Device(
        kind="cpu",
        model=_cpu_model(cpuinfo),
        arch=archspec.cpu.host().name,
        cores=cores,
        name=name[1] if name else platform.processor(),
        memory=int(memory[1]) << 10 if memory else 0,
        caches=_caches(),
    )


def detect(text: str = "auto") -> list[Device]:
    """The devices that ``text`` means: ``auto`` for all on this machine, ``cpu``, or a full spelling.

    Raises BadDevice when a spelled device is not here: kernels can only be timed on the device they are for.
    """
    here = [host_cpu()]
    if text == "auto":
        return here
    chosen = [d for d in here if text in (d.kind, str(d))]
    if not chosen:
        raise BadDevice(f"device {text!r} is not on this machine, which has {', '.join(map(str, here))}; use auto")
    return chosen
