"""The extras of the package, as pyproject.toml has them."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT = Path(__file__).resolve().parent.parent.parent / "pyproject.toml"


def extras() -> str:
    """A table: what is typed, what it is for, what it brings. Raises ValueError where an extra has no comment that says why it is there."""
    text = PROJECT.read_text()
    section = text.partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
    found: dict[str, list[str]] = tomllib.loads(text)["project"]["optional-dependencies"]
    lines = ["| extra | for | brings |", "| --- | --- | --- |"]
    for name, requirements in found.items():
        reason = re.search(rf"^{name} = \[[^#\n]*# *(.+)$", section, re.M)
        if reason is None:
            raise ValueError(
                f"the extra {name} has no comment in {PROJECT.name} on its first line that says what it is for"
            )
        lines.append(f"| `elsa-tune[{name}]` | {reason[1]} | {', '.join(map(_brought, requirements))} |")
    return "\n".join(lines)


def _brought(requirement: str) -> str:
    """A package and its versions, without where it applies."""
    return f"`{requirement.partition(';')[0].strip()}`"


def python_versions() -> str:
    """The versions of Python that the package takes."""
    project: dict[str, Any] = tomllib.loads(PROJECT.read_text())["project"]
    return str(project["requires-python"]).removeprefix(">=") + " or later"
