"""Where things are, and how the tables among them are read: the visible folders of a checkout or a wheel, the user's own folder."""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import platformdirs

from elsa_tune.errors import NoRoom

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PACKAGE = Path(__file__).resolve().parent


@cache
def data(folder: str) -> Path:
    """The folder ``templates``, ``search_spaces`` or ``cache``, beside the package in a checkout, inside it in a wheel."""
    beside = PACKAGE.parent / folder
    return beside if (PACKAGE.parent / "pyproject.toml").is_file() and beside.is_dir() else PACKAGE / "data" / folder


def read_toml(path: Path) -> dict[str, Any]:
    """One TOML file. Raises OSError, ValueError."""
    with path.open("rb") as file:
        content: dict[str, Any] = tomllib.load(file)
        return content


def home() -> Path:
    """The user's folder for the database and built kernels; ELSA_TUNE_HOME overrides it. Not created here."""
    return Path(os.environ.get("ELSA_TUNE_HOME") or platformdirs.user_cache_path("elsa-tune"))


def database() -> Path:
    """The user's own measurement database."""
    return home() / "measurements.db"


def kernels() -> Path:
    """The user's folder of built kernels."""
    return home() / "kernels"


def ready_kernels() -> list[Path]:
    """Folders of kernels built elsewhere for devices like this one, as ``elsa-tune compile`` writes them: ELSA_TUNE_KERNELS,
    separated as paths are. They are only read, and only if nobody else can change them."""
    return [Path(one).expanduser() for one in os.environ.get("ELSA_TUNE_KERNELS", "").split(os.pathsep) if one]


def layers() -> Path:
    """The user's copies of the databases that a team shares."""
    return home() / "layers"


def settings() -> Path:
    """The user's settings, a TOML file that need not exist."""
    override = os.environ.get("ELSA_TUNE_HOME")
    return (Path(override) if override else platformdirs.user_config_path("elsa-tune")) / "config.toml"


OF_PROCESSES = errno.EMFILE, errno.ENFILE, errno.ENOMEM
"""What a system refuses because of who asks, and not of what is at a path."""


@contextmanager
def written(path: Path, remedy: str = "name another with -o") -> Iterator[None]:
    """Inside, what a system refuses of reading and writing what is at a path is NoRoom, which says so."""
    try:
        yield
    except OSError as error:
        if (
            isinstance(error, NoRoom | TimeoutError) or error.errno in OF_PROCESSES
        ):  # TimeoutError: of a lock that others hold
            raise
        raise NoRoom(f"{path}: {error.strerror or error}; free some space and make it writable, or {remedy}") from error


def replace(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, but where what is there is none that could be replaced, as a device. Raises OSError."""
    if path.exists() and not path.is_file():
        path.write_bytes(content)
        return
    work = Path(f"{path}.{os.getpid()}.part")
    try:
        work.write_bytes(content)
        work.replace(path)
    finally:
        work.unlink(missing_ok=True)


def unsafe(path: Path) -> str:
    """Why a file or folder is not to be trusted: a link, another user's (the administrator's is fine), or writable by others;
    empty if it may be."""
    found = path.lstat()
    if stat.S_ISLNK(found.st_mode):
        return f"{path} is a link; put the thing itself there"
    if sys.platform == "win32":
        return ""
    if found.st_uid not in (0, os.getuid()):
        return f"{path} belongs to another user; remove it and tune again"
    return f"{path} may be changed by others; chmod go-w it" if found.st_mode & 0o022 else ""
