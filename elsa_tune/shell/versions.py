"""The versions of what matters here, as the doctor and ``elsa-tune --version`` tell them."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

from elsa_tune.errors import CompilerMissing

PACKAGES = ("elsa-tune", "torch", "optuna", "sqlite-utils", "pydantic", "jinja2", "numpy")


def installed() -> Iterator[tuple[str, str]]:
    """Packages and their versions, and Python's."""
    for name in PACKAGES:
        yield name, _version(name)
    yield "Python", f"{platform.python_version()} ({platform.system()} {platform.machine()})"


def known() -> Iterator[tuple[str, str]]:
    """The same, and what builds kernels here: a line for each backend that is ours."""
    from elsa_tune.generate import backends

    yield from installed()
    for name in backends.candidates():
        try:
            found = backends.get(name).toolchain()
            told = (which if which.startswith(what) else f"{what} {which}" for what, which in found.items())
            yield f"backend {name}:", ", ".join(told)
        except CompilerMissing as missing:
            yield f"backend {name}:", f"none; {missing}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(not installed as a package)"
