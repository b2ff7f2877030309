"""A folder that tunes where nothing is installed: kernels, a runner, a Makefile for the device's own compiler."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import elsa_tune
from elsa_tune import device as devices
from elsa_tune import places
from elsa_tune import workload as workloads
from elsa_tune.device import Device
from elsa_tune.errors import BadDevice, FolderTaken, KernelMissing
from elsa_tune.generate import backends
from elsa_tune.generate.laws import family_has_text
from elsa_tune.generate.render import write
from elsa_tune.parts import element as elements
from elsa_tune.parts import mask as masks
from elsa_tune.problem import Problem
from elsa_tune.ship import export
from elsa_tune.ship.export import Header

SHORTLIST = 5
"""Kernels for each family."""


def make(
    device: str, folder: Path, problems: Sequence[Problem | str] | None = None, workload: str = "default"
) -> list[Header]:
    """Write the kit for a device that need not be here, and return its kernels.

    ``problems`` are Problems or their spellings; without them the workload's. Raises BadDevice, BadProblem, BadWorkload,
    KernelMissing, FolderTaken, NoRoom.
    """
    goal = devices.named(device)
    if not export.speakers(goal):
        raise BadDevice(f"kits are written in {', '.join(export.languages())}, not for {goal}; name another target")
    with places.written(folder):
        taken = folder.exists() and any(folder.iterdir()) and not (folder / "kernels").is_dir()
    if taken:
        raise FolderTaken(f"folder {folder} is not empty and no kit; name another with -o")
    given = [p if isinstance(p, Problem) else Problem.parse(p) for p in problems or workloads.read(workload, goal)]
    refused = {p: reason for p in given if (reason := refusal(p, goal))}
    wanted = [p for p in dict.fromkeys(given) if p not in refused]
    headers = [header for p in {p.family: p for p in wanted}.values() for header in _shortlist(p, goal)]
    served = {header.problem.family for header in headers}
    wanted = [p for p in wanted if p.family in served]
    if not wanted:
        told = next(iter(refused.values()), "the laws refuse every variant")
        raise KernelMissing(f"no kernel serves these problems on {goal}: {told}; give --problem another")
    first = headers[0].kernel
    context = {
        "target": device, "arch": goal.arch, "language": first.language, "problems": wanted, "allowed": {p.precision: _allowed(p) for p in wanted},
        "version": elsa_tune.__version__, "flags": " ".join(first.flags), "elements": sorted({p.dtype for p in wanted}),
        "masks": {p.mask: masks.get(p.mask) for p in wanted}, "operator": wanted[0].operator,
        "kernels": [
            {"name": h.name, "variant": h.variant, "family": h.problem.family, "digest": h.kernel.source.digest}
            for h in headers
        ],
    }  # fmt: skip
    with places.written(folder):
        (folder / "kernels").mkdir(parents=True, exist_ok=True)
        for header in headers:
            (folder / "kernels" / f"{header.name}.h").write_text(header.text)
        (folder / f"runner.{first.program}").write_text(write("kit/runner.cpp.j2", context))
        (folder / "Makefile").write_text(write("kit/Makefile.j2", context))
        (folder / "README.md").write_text(write("kit/README.md.j2", context))
    return headers


def _allowed(problem: Problem) -> float:
    """Error of a kernel on normal inputs, relative to max|v|, that the runner lets pass."""
    precision = elements.precision(problem.precision)
    return max(64 * elements.UNIT, (8 if precision.rounds_sums else 2) * precision.unit)


def refusal(problem: Problem, device: Device) -> str | None:
    """Why a kit for the device has no place for the problem, or None."""
    return family_has_text("kit", problem) or export.refusal(problem, device)


def _shortlist(problem: Problem, device: Device) -> list[Header]:
    """A few kernels for a family that the compiler, where it is here, keeps in registers."""
    found: list[Header] = []
    for variant in export.best(problem, device):
        if len(found) < SHORTLIST and not backends.get(variant.backend).spills(variant, problem, device):
            family = "".join(c if c.isalnum() else "_" for c in problem.family)
            found.append(export.header(variant, problem, f"attention_{family}_{len(found) + 1}", str(device)))
    return found
