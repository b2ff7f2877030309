"""Device: where a kernel runs, and which other devices are its kin."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from elsa_tune.errors import BadDevice

RUNGS = ("exact", "versions", "model", "arch", "family")
GPUS = ("cuda", "hip")
_SPELLING = re.compile(r"([a-z]+):([a-z0-9_]+)-([a-z0-9_]+)-c(\d{1,7})(?:-g(\d{1,7}))?(?:\+([a-z0-9._]+))?", re.ASCII)
ISA_ORDER = ("avx512", "avx2", "neon", "portable")
_ISA_FEATURES = {"avx512": {"avx512f", "avx512vl", "avx512dq", "avx512bw", "fma"}, "avx2": {"avx2", "fma"}}


@dataclass(frozen=True, slots=True)
class Device:
    """A processor: identity (spelled, compared) and facts about it (not compared).

    ``model`` is the maker's own numbering (``amd_f25m17``: family 25, model 17), which virtual machines pass on even
    where they hide features, or a GPU's name, with its MIG slice; ``arch`` is archspec's microarchitecture, ``sm_90`` or
    ``gfx942``, or ``shuffle8`` for OpenCL work-items that shuffle among 8 (0: not at all); ``cores`` are a GPU's
    multiprocessors or compute units. A GPU's identity includes its memory in GiB and the
    versions of driver and toolkit. ``memory`` and ``caches`` are in bytes; ``index`` is torch's number of the GPU, or counts
    OpenCL devices; ``is_host`` says of one that it is this machine's own CPU.
    """

    kind: str
    model: str
    arch: str
    cores: int
    gib: int = 0
    versions: str = ""
    name: str = field(default="", compare=False)
    memory: int = field(default=0, compare=False)
    caches: tuple[int, ...] = field(default=(), compare=False)
    index: int = field(default=0, compare=False)
    is_host: bool = field(default=False, compare=False)

    def __str__(self) -> str:
        memory, versions = f"-g{self.gib}" if self.gib else "", f"+{self.versions}" if self.versions else ""
        return f"{self.kind}:{self.model}-{self.arch}-c{self.cores}{memory}{versions}"

    @classmethod
    def parse(cls, text: str) -> Device:
        """Read ``cpu:amd_f25m17-zen4-c2`` or ``cuda:nvidia_h200-sm_90-c132-g140+d580.82_t12.8``. Raises BadDevice."""
        found = _SPELLING.fullmatch(text.strip())
        if not found:
            raise BadDevice(f"device {text[:100]!r} is misspelled; write it like cpu:amd_f25m17-zen4-c2, or use auto")
        return cls(found[1], found[2], found[3], int(found[4]), int(found[5] or 0), found[6] or "")

    @property
    def names(self) -> tuple[str, str, str]:
        """What it goes by where devices are named: its kind, its architecture, its full spelling."""
        return self.kind, self.arch, str(self)

    @property
    def is_gpu(self) -> bool:
        """Whether kernels are launched on it rather than called."""
        return self.kind in GPUS

    @property
    def torch(self) -> str:
        """What torch calls it."""
        return f"cuda:{self.index}" if self.is_gpu else "cpu"

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
        if (self.model, self.arch, self.cores, self.gib) == (other.model, other.arch, other.cores, other.gib):
            return "versions"
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


def cpu_target(name: str) -> bool:
    """Whether archspec knows a microarchitecture of that name."""
    import archspec.cpu

    return name in archspec.cpu.TARGETS


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
    if sys.platform == "linux":
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return Device(
        kind="cpu",
        model=_cpu_model(cpuinfo),
        arch=archspec.cpu.host().name,
        cores=cores,
        name=name[1] if name else platform.processor(),
        memory=int(memory[1]) << 10 if memory else 0,
        caches=_caches(),
    )


@cache
def gpus() -> tuple[Device, ...]:
    """The GPUs that torch can use here, equal ones once; none where torch, the driver or the GPU is missing or broken."""
    try:
        return tuple(dict.fromkeys(find_gpus()))
    except Exception:  # whatever a broken driver raises: doctor says more
        return ()


def find_gpus() -> Iterator[Device]:
    """Each GPU that torch can use. Raises whatever a broken driver makes torch raise."""
    import torch

    if not torch.cuda.is_available():
        return
    kind = "hip" if torch.version.hip else "cuda"
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        arch = facts.gcnArchName.partition(":")[0] if kind == "hip" else f"sm_{facts.major}{facts.minor}"
        toolkit = torch.version.hip if kind == "hip" else torch.version.cuda
        yield Device(
            kind=kind,
            model=re.sub(r"[^a-z0-9]+", "_", facts.name.lower()).strip("_"),
            arch=arch,
            cores=facts.multi_processor_count,
            gib=round(facts.total_memory / 2**30),
            versions=f"d{_driver()}_t{(toolkit or '').partition('-')[0]}",
            name=facts.name,
            memory=facts.total_memory,
            caches=(getattr(facts, "L2_cache_size", 0) or 32 << 20,),
            index=index,
        )


def tf32_allowed() -> bool:
    """Whether torch's own setting lets float32 matrix products on a GPU use TF32. Read, never written."""
    import torch

    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # torch refuses to say where its older and newer settings were mixed
        return False


@cache
def opencl_devices() -> tuple[Device, ...]:
    """The OpenCL devices here, equal ones once; none where pyopencl, a platform or a driver is missing or broken."""
    try:
        return tuple(dict.fromkeys(find_opencl_devices()))
    except Exception:  # whatever a broken installation raises: doctor says more
        return ()


def find_opencl_devices() -> Iterator[Device]:
    """Each OpenCL device, ``index`` counting over all platforms. Raises whatever a broken installation makes pyopencl raise."""
    import pyopencl

    found = [device for platform in pyopencl.get_platforms() for device in platform.get_devices()]
    for index, facts in enumerate(found):
        shuffles = "cl_khr_subgroup_shuffle" in facts.extensions
        yield Device(
            kind="opencl",
            model=re.sub(r"[^a-z0-9]+", "_", facts.name.lower()).strip("_"),
            arch=f"shuffle{facts.preferred_work_group_size_multiple if shuffles else 0}",
            cores=facts.max_compute_units,
            gib=round(facts.global_mem_size / 2**30),
            versions=re.sub(r"[^a-z0-9.]+", "_", facts.driver_version.lower()).strip("_"),
            name=facts.name,
            memory=facts.global_mem_size,
            caches=(facts.global_mem_cache_size or 32 << 20,),
            index=index,
            is_host=bool(facts.type & pyopencl.device_type.CPU),
        )


@cache
def _driver() -> str:
    """The GPU driver's version."""
    for place, pattern in (
        ("/proc/driver/nvidia/version", r"(\d+\.[\d.]+)"),
        ("/sys/module/amdgpu/version", r"([\d.]+)"),
    ):
        if found := re.search(pattern, _read(place)):
            return found[1]
    return "unknown"


def detect(text: str = "auto") -> list[Device]:
    """The devices that ``text`` means: ``auto`` for all on this machine (its CPU once), a kind (``cpu``, ``cuda``, ``hip``, ``opencl``), a
    full spelling, or a target such as ``sm_80``.

    Raises BadDevice when a spelled device is not here: kernels can only be timed on the device they are for.
    """
    here = [host_cpu(), *gpus(), *opencl_devices()]
    if text == "auto":
        return [found for found in here if not found.is_host]  # the CPU itself is served better by C++
    chosen = [d for d in here if text in d.names]
    if not chosen:
        raise BadDevice(f"device {text!r} is not on this machine, which has {', '.join(map(str, here))}; use auto")
    return chosen


def among(text: str, recorded: Iterable[str]) -> list[str]:
    """Those of some spelled devices that ``text`` means as in ``detect``, whether they are here or not. Raises BadDevice, which says
    what they are."""
    spelled = sorted(recorded)
    here = {str(device) for device in detect()} if text == "auto" else set()
    found = [one for one in spelled if one in here or text in _names(one)]
    if not found:
        raise BadDevice(f"nothing is recorded of device {text!r}; recorded are {', '.join(spelled) or 'none yet'}")
    return found


def _names(spelled: str) -> tuple[str, ...]:
    try:
        return Device.parse(spelled).names
    except BadDevice:  # recorded by another version
        return (spelled,)


def named(text: str) -> Device:
    """The device that ``text`` means, which need not be here: ``sm_62``, ``gfx942``, a CPU microarchitecture as archspec names it
    (``cortex_a72``, ``aarch64``, ``zen4``), ``opencl`` for any OpenCL device, a full spelling, or one that is here. Raises BadDevice."""
    if re.fullmatch(r"sm_\d{2,3}", text):
        return Device("cuda", "any", text, 1)
    if re.fullmatch(r"gfx[0-9a-f]{3,4}", text):
        return Device("hip", "any", text, 1)
    if text == "opencl":
        return Device("opencl", "any", "shuffle0", 1)
    if ":" in text:
        return Device.parse(text)
    if cpu_target(text):
        return Device("cpu", "any", text, 4)
    try:
        return detect(text)[0]
    except BadDevice:
        raise BadDevice(
            f"device {text!r} is not known; name a target such as sm_62, gfx942, cortex_a72 or opencl, or a full spelling"
        ) from None


def of_tensor(kind: str, index: int | None) -> Device | None:
    """The device a tensor lies on (torch's device type and index), or None for one that is not known."""
    if kind == "cpu":
        return host_cpu()
    found = [gpu for gpu in gpus() if gpu.index == index] or list(gpus()[:1])  # equal GPUs are listed once
    return found[0] if kind == "cuda" and found else None
