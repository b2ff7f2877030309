"""What a database and its kernels take, and giving back what nothing needs."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass

from elsa_tune import places
from elsa_tune.remember.database import Database
from elsa_tune.remember.layers import layers

RECENT = 3600.0
"""Seconds for which a kernel stays, whatever names it: somebody may be about to time it."""


@dataclass(frozen=True, slots=True)
class Collected:
    """Kernels removed, and bytes of the database before and after."""

    kernels: int
    before: int
    after: int


def collect() -> Collected:
    """Remove built kernels that neither a final nor a candidate names, and pack the database. No measurement is removed.

    Raises DatabaseUnusable.
    """
    path = places.database()
    with Database.for_writing() as database:
        before = path.stat().st_size
        kept = {m.digest for m in database if m.stage == "final" or m.status == "candidate"}
        database.pack()
    removed = 0
    for folder in places.kernels().iterdir() if places.kernels().is_dir() else ():
        if folder.name not in kept and time.time() - folder.lstat().st_mtime > RECENT:
            shutil.rmtree(folder, ignore_errors=True)
            removed += 1
    return Collected(removed, before, path.stat().st_size)


def inventory() -> Iterator[str]:
    """One line for each layer and each device in it."""
    for layer in layers():
        if layer.database is None:
            yield f"{layer.name}: {layer.place}: {layer.problem}"
            continue
        counts = layer.database.counts(layer.local)
        yield f"{layer.name}: {layer.place}: {sum(counts.values())} measurements"
        for device in sorted({device for device, _ in counts}):
            of_status = ", ".join(f"{n} {status}" for (one, status), n in sorted(counts.items()) if one == device)
            yield f"  {device}: {of_status}; {len(layer.winners([device]))} winners"
