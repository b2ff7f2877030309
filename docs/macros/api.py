"""What programs import: names of the package with their docstrings, and the errors."""

from __future__ import annotations

import inspect

import elsa_tune
from elsa_tune import errors

from ._markdown import code, said, table


def api_reference(kind: str) -> str:
    """A section for each public name that is a ``function``, a ``class`` or a ``module``."""
    names = (name for name in elsa_tune.__all__ if not name.startswith("_"))
    options = "\n    options: {members: [parse]}" if kind == "class" else ""
    return "\n\n".join(f"::: elsa_tune.{name}{options}" for name in names if _kind(getattr(elsa_tune, name)) == kind)


def error_table() -> str:
    """Every error that is raised on purpose, and when."""
    found = [one for one in vars(errors).values() if inspect.isclass(one) and issubclass(one, errors.ElsaTuneError)]
    rows = ([code(one.__name__), code(*_builtin(one)), said(one.__doc__, one.__name__)] for one in found)
    return table(["class", "also a", "when"], rows)


def _kind(value: object) -> str:
    return "module" if inspect.ismodule(value) else "class" if inspect.isclass(value) else "function"


def _builtin(error: type) -> list[str]:
    return [base.__name__ for base in error.__bases__ if base.__module__ == "builtins"]
