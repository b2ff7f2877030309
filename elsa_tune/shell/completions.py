"""What a shell completes: devices, targets, workloads, problems and variants that are known here. Nothing of it waits for torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain

import click

from elsa_tune import device, places, workload
from elsa_tune import space as spaces
from elsa_tune.measurement import Evidence
from elsa_tune.remember.reading import Reader

KINDS = ("auto", "cpu", "cuda", "hip", "opencl")


def devices() -> list[str]:
    """Words for devices, this machine's CPU, and those that somebody's measurements here are of."""
    recorded: list[str] = []
    if places.database().is_file():
        with Reader.for_reading(places.database()) as reader:
            recorded = sorted(one for one, _ in reader.counts())
    return [*dict.fromkeys([*KINDS, str(device.host_cpu()), *recorded])]


def targets() -> list[str]:
    """GPUs that need not be here."""
    return sorted(places.read_toml(places.data("search_spaces") / "targets.toml"))


def workloads() -> list[str]:
    """Workloads that ship."""
    return workload.names()


def problems() -> list[str]:
    """Problems that have a winner here, then those of the default workload."""
    default = map(str, workload.read("default", device.host_cpu()))
    return [*dict.fromkeys([*sorted(str(one.problem) for one in _winners()), *default])]


def families() -> list[str]:
    """The families of those."""
    return [*dict.fromkeys(one.partition("@")[0] for one in problems())]


def variants() -> list[str]:
    """Variants that won here, then those that searches begin with."""
    starts = [start for name in spaces.names() for start in spaces.Space.read(name).start]
    return [*dict.fromkeys([*sorted(str(one.variant) for one in _winners()), *starts])]


def _winners() -> list[Evidence]:
    if not places.database().is_file():
        return []
    with Reader.for_reading(places.database()) as reader:
        return reader.winners()


def _completing(*values: Callable[[], Iterable[str]]) -> Callable[[click.Context, click.Parameter, str], list[str]]:
    """What completes an option: those values that begin as typed. Where asking fails, nothing is completed: a shell has no place for why."""

    def complete(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
        try:
            return [one for one in chain.from_iterable(ask() for ask in values) if one.startswith(incomplete)]
        except Exception:
            return []

    return complete


DEVICES, TARGETS, BOTH = _completing(devices), _completing(targets), _completing(devices, targets)
PROBLEMS, FAMILIES, VARIANTS, WORKLOADS = map(_completing, (problems, families, variants, workloads))
