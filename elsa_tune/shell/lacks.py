"""Packages that are missing or too old, and files that stand in a package's place: found once something did not work."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib import metadata
from pathlib import Path

_REQUIREMENT = re.compile(r"^([A-Za-z0-9_.-]+)\s*(?:>=\s*([0-9.]+))?")


def found(error: BaseException) -> str:
    """Why an import, or what asks of a package what it does not have, failed: in a sentence; empty if it is for another reason."""
    if not isinstance(error, ImportError | AttributeError | TypeError | SyntaxError):
        return ""
    return _shadow() or _old() or (_missing(error.name or "") if isinstance(error, ModuleNotFoundError) else "")


def _missing(module: str) -> str:
    """Of a module that was not found, and is none of ours."""
    name = module.split(".")[0]
    package = next((package for package, _ in _requirements() if _module(package) == name), name)
    return f"{package} is not installed; {_install(package)}" if name not in ("", "elsa_tune") else ""


def _install(requirement: str) -> str:
    return f"{sys.executable} -m pip install '{requirement}' brings it"


def _requirements() -> Iterator[tuple[str, str]]:
    """(package, least version or nothing) of what is needed everywhere, as this package's own metadata says."""
    with suppress(metadata.PackageNotFoundError):
        for text in metadata.requires("elsa-tune") or []:
            match = _REQUIREMENT.match(text)
            if match and ";" not in text:
                yield match[1], match[2] or ""


def _module(package: str) -> str:
    return package.replace("-", "_")


def _old() -> str:
    """The first package that is not there, or is older than it may be: what was imported counts, then what is installed."""
    for package, least in _requirements():
        name = _module(package)
        loaded = sys.modules.get(name)
        version = str(getattr(loaded, "__version__", "") or _installed(package))
        if not version and loaded is None and not _is_there(name):
            return f"{package} is not installed; {_install(package + (f'>={least}' if least else ''))}"
        if least and version and _numbers(version) < _numbers(least):
            where = getattr(loaded, "__file__", None)
            return f"{package} {version} is too old{f' ({where})' if where else ''}; {_install(f'{package}>={least}')}"
    return ""


def _installed(package: str) -> str:
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return ""


def _is_there(name: str) -> bool:
    with suppress(ImportError, ValueError, AttributeError):
        return importlib.util.find_spec(name) is not None
    return False


def _numbers(version: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", version.split("+")[0])[:3]]


def _shadow() -> str:
    """A file of the folder that Python looks into first, in place of a module of Python's own or of a package needed here."""
    first = Path(sys.path[0] or ".") if sys.path else Path(".")
    ours = {*sys.stdlib_module_names, *(_module(package) for package, _ in _requirements())}
    if (first / "elsa_tune" / "shell").is_dir() or "site-packages" in first.parts:  # where all this lies itself
        return ""
    with suppress(OSError):
        for path in sorted(first.iterdir()):
            if path.suffix == ".py" and path.stem in ours:
                return f"{path} stands in the place of the module {path.stem}; rename it, or start elsa-tune in another folder"
    return ""
