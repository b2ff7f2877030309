"""A folder that tunes where nothing is installed: kernels, a runner, a Makefile for the device's own compiler."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import elsa_tune
from elsa_tune import workload as workloads
from elsa_tune.device import Device
from elsa_tune.errors import BadDevice, BuildFailed, CompilerMissing, FolderTaken, KernelMissing
from elsa_tune.generate import backends, cpp, cuda
from elsa_tune.generate.cuda import rtc as _rtc
from elsa_tune.generate.render import write
from elsa_tune.problem import Problem
from elsa_tune.ship import archs, export
from elsa_tune.ship.export import LANGUAGES, Header
from elsa_tune.variant import Variant

SHORTLIST = 5
"""Kernels for each family."""

ALLOWED = {"strict": 2.0**-18, "fp32": 2.0**-18, "fp16": 2.0**-10, "bf16": 2.0**-7, "approx": 2.0**-7}
"""Error of a kernel on normal inputs, relative to max|v|, that the runner lets pass, by precision class."""

NEEDS = {
    "cuda": "nvcc 10.2 or later",
    "opencl": "a C++ compiler, OpenCL's headers and library",
    "cpp": "a C++ compiler",
}


def make(
    device: str, folder: Path, problems: Sequence[Problem | str] | None = None, workload: str = "default"
) -> list[Header]:
    """Write the kit for a device that need not be here, and return its kernels.

    ``problems`` are Problems or their spellings; without them the workload's. Raises BadDevice, BadProblem, BadWorkload,
    KernelMissing, FolderTaken.
    """
    goal = archs.device(device)
    if goal.kind not in LANGUAGES:
        raise BadDevice(f"kits are written for CUDA, OpenCL and CPUs, not for {goal}")
    if folder.exists() and any(folder.iterdir()) and not (folder / "kernels").is_dir():
        raise FolderTaken(f"folder {folder} is not empty and no kit; name another with -o")
    given = [Problem.parse(p) if isinstance(p, str) else p for p in problems or workloads.read(workload, goal)]
    wanted = [p for p in dict.fromkeys(given) if _serves(p, goal)]
    headers = [header for p in {p.family: p for p in wanted}.values() for header in _shortlist(p, goal)]
    served = {header.problem.family for header in headers}
    wanted = [p for p in wanted if p.family in served]
    if not wanted:
        raise KernelMissing(f"no kernel serves these problems on {goal}; give --problem one of float32 or float16")
    language = LANGUAGES[goal.kind]
    context = {
        "target": device, "arch": goal.arch, "language": language, "needs": NEEDS[language], "problems": wanted, "allowed": ALLOWED,
        "version": elsa_tune.__version__, "flags": " ".join(export.compile_flags(headers[0].variant)) if language == "cpp" else "",
        "kernels": [
            {"name": h.name, "variant": h.variant, "family": h.problem.family, "digest": _digest(h)} for h in headers
        ],
    }  # fmt: skip
    (folder / "kernels").mkdir(parents=True, exist_ok=True)
    for header in headers:
        (folder / "kernels" / f"{header.name}.h").write_text(header.text)
    runner = "runner.cu" if language == "cuda" else "runner.cpp"
    (folder / runner).write_text(write("kit/runner.cpp.j2", context))
    (folder / "Makefile").write_text(write("kit/Makefile.j2", context))
    (folder / "README.md").write_text(write("kit/README.md.j2", context))
    return headers


def _serves(problem: Problem, device: Device) -> bool:
    backend = cpp if device.kind == "cpu" else cuda
    untold = export.refusal(problem, LANGUAGES[device.kind])
    return untold is None and backend.refusal(problem, device) is None


def _shortlist(problem: Problem, device: Device) -> list[Header]:
    """A few kernels for a family that the compiler, where it is here, keeps in registers."""
    found: list[Header] = []
    for variant in export.best(problem, device):
        if len(found) < SHORTLIST and not _spills(variant, problem, device):
            family = "".join(c if c.isalnum() else "_" for c in problem.family)
            found.append(export.header(variant, problem, f"attention_{family}_{len(found) + 1}", str(device)))
    return found


def _spills(variant: Variant, problem: Problem, device: Device) -> bool:
    """Whether the compiler says so; not, where it is not here."""
    if device.kind != "cuda":
        return False
    try:
        _rtc.find(device)
        built = cuda.build(variant, problem, device)
    except CompilerMissing:
        return False
    except BuildFailed:
        return True
    return bool(built.flaw or built.resources.get("spills"))


def _digest(header: Header) -> str:
    """The digest of the kernel's source: what it was compiled with is the device's own affair."""
    made = backends.get(header.variant.backend).source(header.variant, header.problem)
    return made.digest if made else ""
