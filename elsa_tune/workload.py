"""Workloads: named sets of problems in TOML."""

from __future__ import annotations

from pathlib import Path

from elsa_tune import places
from elsa_tune.device import Device
from elsa_tune.errors import BadProblem, BadWorkload
from elsa_tune.problem import Problem
from elsa_tune.space import read_toml


def names() -> list[str]:
    """The workloads that ship: files of ``search_spaces/workloads``."""
    return sorted(path.stem for path in (places.data("search_spaces") / "workloads").glob("*.toml"))


def read(name: str, device: Device) -> list[Problem]:
    """The problems of a shipped workload, or of a TOML file of the same form. Raises BadWorkload.

    ``default`` is the workload of that name on a CPU and ``gpu`` on a GPU.
    """
    name = "gpu" if name == "default" and device.is_gpu else name
    path = places.data("search_spaces") / "workloads" / f"{name}.toml" if name in names() else Path(name)
    if not path.is_file():
        raise BadWorkload(
            f"workload {name!r} is neither a file nor one of {', '.join(names())}; give --workload one of them"
        )
    try:
        sections = read_toml(path).values()
        problems = [Problem.parse(text) for section in sections for text in section["problems"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, BadProblem):
            raise
        raise BadWorkload(
            f"workload {path} is malformed ({error}); each section needs problems = [...], as in {names()[0]}.toml"
        ) from error
    if not problems:
        raise BadWorkload(f"workload {path} has no problems; give each section problems = [...]")
    return list(dict.fromkeys(problems))
