"""Built kernels on disk, by digest, in a folder only this user can write."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path

from elsa_tune import places
from elsa_tune.errors import KernelCacheUnsafe

RECENT = 3600.0
"""Seconds for which a kernel stays, whatever names it: somebody may be about to time it."""

ELSEWHERE = "set ELSA_TUNE_HOME to another folder"
"""What can be done where kernels cannot be written."""

CHECKED = "checked"
"""The file beside a built kernel that names devices on which it was found right."""


def _private(path: Path) -> None:
    """Refuse what another user could have put or changed there."""
    if reason := places.unsafe(path):
        raise KernelCacheUnsafe(reason)


def find(digest: str, library: str) -> tuple[Path, Mapping[str, int]] | None:
    """The built library of ``digest`` and its resources, or None. Raises KernelCacheUnsafe."""
    if not re.fullmatch(r"[a-z0-9-]+", digest):
        return None
    for root in (places.kernels(), *places.ready_kernels()):
        folder = root / digest
        paths = (root, folder, folder / library, folder / "resources.json")
        if all(path.exists() for path in paths):
            for path in paths:
                _private(path)
            return folder / library, json.loads((folder / "resources.json").read_text())
    return None


def add(digest: str, library: str, fill: Callable[[Path], Mapping[str, int]]) -> tuple[Path, Mapping[str, int]]:
    """Let ``fill`` write into a new folder and return resources; the folder appears under ``digest`` whole or not at all.

    Raises KernelCacheUnsafe, NoRoom, and what ``fill`` raises.
    """
    with places.written(places.kernels(), ELSEWHERE):
        return _added(digest, library, fill)


def _added(digest: str, library: str, fill: Callable[[Path], Mapping[str, int]]) -> tuple[Path, Mapping[str, int]]:
    places.kernels().mkdir(mode=0o700, parents=True, exist_ok=True)
    _private(places.kernels())
    work = Path(tempfile.mkdtemp(dir=places.kernels(), prefix=".building-"))
    try:
        resources = fill(work)
        (work / "resources.json").write_text(json.dumps(dict(resources)))
        for path in work.iterdir():
            path.chmod(path.stat().st_mode & 0o755)
        target = places.kernels() / digest
        try:
            work.rename(target)
        except OSError:
            if find(digest, library) is None:  # something unusable stands there: make room and try once more
                shutil.rmtree(target, ignore_errors=True)
                work.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return places.kernels() / digest / library, resources


def checked(digest: str, device: str) -> bool:
    """Whether the built kernel of ``digest`` was found right on this device."""
    path = places.kernels() / digest / CHECKED
    if not path.is_file():
        return False
    _private(path)
    return device in path.read_text().splitlines()


def note_checked(digest: str, device: str) -> None:
    """Remember that it was; not where nothing can be written, and then it is checked again."""
    folder = places.kernels() / digest
    with suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with (folder / CHECKED).open("a") as file:
            file.write(f"{device}\n")


def remove_all_but(digests: Collection[str]) -> int:
    """Remove built kernels of other digests that are not RECENT; how many."""
    removed = 0
    for folder in places.kernels().iterdir() if places.kernels().is_dir() else ():
        if folder.name not in digests and time.time() - folder.lstat().st_mtime > RECENT:
            shutil.rmtree(folder, ignore_errors=True)
            removed += 1
    return removed
