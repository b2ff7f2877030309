"""Whether a database is what was recorded, and what is done where it is not."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from elsa_tune import places
from elsa_tune.remember import salvage
from elsa_tune.remember.database import Database
from elsa_tune.remember.pages import Pages


@dataclass(frozen=True, slots=True)
class Health:
    """What verifying a database came to: measurements that are what was recorded; what of the file did not hold together (tables and
    indexes with their pages, or SQLite's words); measurements that were read and are not what was recorded; files set aside, now
    and ever."""

    sound: int
    flaws: list[str]
    damaged: int
    aside: list[Path] = field(default_factory=list)

    @property
    def whole(self) -> bool:
        """Whether the file held together."""
        return not self.flaws


def verify(path: Path | None = None) -> Health:
    """Compare every measurement with its digest, and indexes with what they index; where anything differs, a new database
    takes over what is sound, and the file as it was is set aside. Raises DatabaseUnusable."""
    path = path or places.database()
    before = _aside(path)
    with Database.for_writing(path) as database:  # sets a file aside that SQLite cannot open
        said = database.flaws()
        damaged = len(database.damaged()) if not said else 0
    if damaged or said:
        aside = salvage.set_aside(path)
        with Database.for_writing(path) as database:
            database.take_over(salvage.measurements(aside))
    after = _aside(path)
    torn = [flaw for one in after if one not in before for flaw in Pages(one).damage()]
    if len(after) > len(before) and not damaged:
        said = torn or said or ["SQLite cannot open it"]
    with Database.for_writing(path) as database:
        return Health(len(database), said, damaged, after)


def _aside(path: Path) -> list[Path]:
    return sorted(path.parent.glob(f"{path.name}.corrupt-*[0-9]"))
