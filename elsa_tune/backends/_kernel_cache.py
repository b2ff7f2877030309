"""Built kernels on disk, by digest, in a folder only this user can write."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from elsa_tune import places
from elsa_tune.errors import KernelCacheUnsafe


def _private(path: Path) -> None:
    """Refuse what another user could have put or changed there."""
    found = path.lstat()
    mine = not hasattr(os, "getuid") or found.st_uid == os.getuid()
    if stat.S_ISLNK(found.st_mode) or not mine or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise KernelCacheUnsafe(f"{path} is a link, another user's, or writable by others; remove it and tune again")


def find(digest: str, library: str) -> tuple[Path, Mapping[str, int]] | None:
    """The built library of ``digest`` and its resources, or None. Raises KernelCacheUnsafe."""
    folder = places.kernels() / digest
    if not re.fullmatch(r"[a-z0-9-]+", digest) or not folder.is_dir():
        return None
    for path in (places.kernels(), folder, folder / library, folder / "resources.json"):
        if not path.exists():
            return None
        _private(path)
    return folder / library, json.loads((folder / "resources.json").read_text())


def add(digest: str, library: str, fill: Callable[[Path], Mapping[str, int]]) -> tuple[Path, Mapping[str, int]]:
    """Let ``fill`` write into a new folder and return resources; the folder appears under ``digest`` whole or not at all."""
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
