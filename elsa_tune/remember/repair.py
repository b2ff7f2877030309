"""Whether a database is what was recorded, and what is done where it is not."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from elsa_tune import places
from elsa_tune.remember import salvage
from elsa_tune.remember.database import Database


@dataclass(frozen=True, slots=True)
class Health:
    """What verifying a database came to: measurements that are what was recorded; whether the file held together, and those
    that were not what was recorded; files set aside, now or before."""

    sound: int
    whole: bool
    damaged: int
    aside: list[Path] = field(default_factory=list)


def verify(path: Path | None = None) -> Health:
    """Compare every measurement with its digest, and indexes with what they index; where anything differs, a new database
    takes over what is sound, and the file as it was is set aside. Raises DatabaseUnusable."""
    path = path or places.database()
    with Database.for_writing(path) as database:
        whole = database.is_whole()
        damaged = len(database.damaged()) if whole else 0
    if damaged or not whole:
        aside = salvage.set_aside(path)
        with Database.for_writing(path) as database:
            database.take_over(salvage.measurements(aside))
    with Database.for_writing(path) as database:
        return Health(len(database), whole, damaged, sorted(path.parent.glob(f"{path.name}.corrupt-*[0-9]")))
