"""The database as who only reads sees it: measurements, and the winners among them. sqlite3 alone, because dispatch waits for it."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial, wraps
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar, cast

from elsa_tune.errors import DatabaseUnusable, ElsaTuneError
from elsa_tune.measurement import Evidence, Measurement
from elsa_tune.remember import earlier, evidence, schema
from elsa_tune.traffic import FIELDS as TRAFFIC_FIELDS

UNREADABLE = (sqlite3.DatabaseError, *schema.UNREADABLE)
"""What reading a row that nobody recorded may raise."""

MEND = "elsa-tune db verify mends one's own"

Question = TypeVar("Question", bound=Callable[..., Any])


def _remembered(question: Question) -> Question:
    """A question that cannot be answered because of the file raises DatabaseUnusable, and the reader remembers why."""

    @wraps(question)
    def asked(reader: Reader, *arguments: Any, **options: Any) -> Any:
        try:
            return question(reader, *arguments, **options)
        except sqlite3.DatabaseError as error:
            reader._failure = f"{reader.name}: {error}; {MEND}"
            raise DatabaseUnusable(reader._failure) from error

    return cast(Question, asked)


class Reader:
    """Measurements, and the view of winners over them."""

    def __init__(self, connection: sqlite3.Connection, name: str, version: int = schema.FORMAT) -> None:
        self.name = name
        self._connection = connection
        connection.text_factory = partial(str, encoding="utf-8", errors="replace")  # a flipped bit is no reason to stop
        self._version = version
        self._numbers: dict[str, int] = {}  # of texts
        self._texts: dict[int, str | bytes] = {}
        self._unsound: set[int] = set()  # rows that were read and are not what was recorded
        self._failure = ""

    @classmethod
    def for_reading(cls, path: Path) -> Reader:
        """Open without ever writing or waiting long. Raises DatabaseUnusable."""
        if not path.is_file():
            raise DatabaseUnusable(f"there is no database at {path}; run elsa-tune, or name a file that is there")
        for options in ("mode=ro", "mode=ro&immutable=1"):
            address = f"{path.resolve().as_uri()}?{options}"
            try:
                connection = sqlite3.connect(address, uri=True, timeout=0.2, check_same_thread=False)
                return Reader(connection, str(path), _readable(connection, path))
            except sqlite3.DatabaseError as error:
                failure = error
                is_elsewhere = "locked" in str(error) or "no such table" in str(error)
                if is_elsewhere or not isinstance(error, sqlite3.OperationalError):
                    break
        remedy = "close what locks it" if "locked" in str(failure) else MEND
        raise DatabaseUnusable(f"{path}: {failure}; {remedy}") from failure

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def trouble(self) -> str:
        """What reading came upon so far that is not what was recorded, in a sentence; empty where all was well."""
        if self._failure or not self._unsound:
            return self._failure
        return f"{self.name}: {len(self._unsound)} of the measurements in it are damaged and left out; {MEND}"

    # Facts beside the measurements.

    @property
    def installation(self) -> str:
        """This database's random name, which its measurements carry; it says nothing of user or host."""
        return self.about("installation")

    def about(self, name: str) -> str:
        """A fact this database keeps beside its measurements; empty if it keeps none of that name."""
        found = self._connection.execute("SELECT value FROM about WHERE name = ?", [name]).fetchone()
        return str(found[0]) if found else ""

    # Measurements.

    @_remembered
    def measurements(self, local: bool | None = None, **equal: str) -> list[Measurement]:
        """Measurements whose columns equal the given values, oldest first; ``local``: this machine's own, or only others'. A
        row that is not what was recorded is none. Raises DatabaseUnusable, as every question below."""
        rows = self._rows(*self._select(*self._where(local, equal)))
        return sorted(filter(None, map(self._sound, rows)), key=lambda m: (m.created, m.id))

    def __iter__(self) -> Iterator[Measurement]:
        """Every measurement, in no order that means anything. Raises DatabaseUnusable."""
        try:
            self._texts.update(self._connection.execute("SELECT number, content FROM texts"))
            yield from map(self._measurement, self._rows(*self._select([], [])))
        except UNREADABLE as error:
            raise DatabaseUnusable(f"{self.name}: {error}; {MEND}") from error

    def __len__(self) -> int:
        return int(self._connection.execute("SELECT COUNT(*) FROM recorded").fetchone()[0])

    @_remembered
    def counts(self, local: bool | None = None) -> dict[tuple[str, str], int]:
        """(device, status) -> measurements."""
        where, values = self._where(local, {})
        rows = self._connection.execute(
            f"SELECT device, status, COUNT(*) FROM recorded {_condition(where)} GROUP BY device, status", values
        ).fetchall()
        return {(str(self._text(device)), str(status)): int(count) for device, status, count in rows}

    @_remembered
    def damaged(self) -> list[int]:
        """Row numbers whose content is not what was recorded: each row's name is the digest of its content."""
        return [row["number"] for row in self._rows(*self._select([], [])) if self._sound(row) is None]

    @_remembered
    def traffic(self) -> list[dict[str, Any]]:
        """What programs asked: rows of the fields of elsa_tune.traffic.Traffic, as somebody wrote them, oldest first."""
        if not self._connection.execute(
            "SELECT 1 FROM sqlite_master WHERE name = 'traffic' AND type = 'table'"
        ).fetchone():
            return []  # an earlier version's, or somebody's view
        return list(self._rows(f"SELECT {', '.join(TRAFFIC_FIELDS)} FROM traffic ORDER BY number", []))

    # Evidence.

    @_remembered
    def winners(
        self,
        local: bool | None = None,
        devices: Collection[str] = (),
        families: Collection[str] = (),
        understood: Callable[[str], bool] = lambda variant: True,
        **equal: str,
    ) -> list[Evidence]:
        """What wins each device and problem, of those devices and families (all, if none is named) whose columns equal the
        given values. A row that is not what was recorded never counts, nor a variant that is not ``understood``."""
        where, values = self._where(local, equal)
        for column, names in (("device", devices), ("family", families)):
            if names:
                where.append(f"{column} IN ({', '.join('?' * len(names))})")
                values += [self._number(name) for name in names]
        return self._pooled(evidence.WINNERS, where, values, understood)

    @_remembered
    def evidence(self, local: bool | None = None, **equal: str) -> list[Evidence]:
        """What all finals of each device, problem and variant say together."""
        return self._pooled(evidence.EVERY, *self._where(local, equal))

    @_remembered
    def finals_of(self) -> list[tuple[str, str]]:
        """(device, family) pairs that a final was measured for."""
        pairs = self._connection.execute(
            "SELECT DISTINCT device, family FROM recorded WHERE status = 'ok' AND stage = 'final'"
        ).fetchall()
        return [(str(self._text(device)), str(self._text(family))) for device, family in pairs]

    @_remembered
    def slower(self, device: str) -> set[tuple[str, str]]:
        """(problem, variant) pairs whose finals on this device, together, are slower than torch's SDPA."""
        rows = self._connection.execute(
            f"SELECT problem, variant FROM ({evidence.EVERY.format(where='AND device = ?')}) WHERE ratio < 1",
            [self._number(device)],
        ).fetchall()
        return {(str(self._text(problem)), str(self._text(variant))) for problem, variant in rows}

    def _pooled(
        self, select: str, where: list[str], values: list[Any], understood: Callable[[str], bool] = lambda variant: True
    ) -> list[Evidence]:
        damaged: list[int] = []
        strange: list[int] = []
        while True:
            without = [
                f"{name} NOT IN ({', '.join('?' * len(x))})"
                for name, x in (("number", damaged), ("variant", strange))
                if x
            ]
            condition = "".join(f" AND {one}" for one in [*where, *without])
            found = list(self._rows(select.format(where=condition), [*values, *damaged, *strange]))
            members = {int(number) for row in found for number in str(row["members"]).split(",")}
            read = list(self._numbered(members))
            bad = [number for number, _, m in read if m is None]
            odd = sorted({row["variant"] for row in found if not understood(row["spelling"])})
            if not bad and not odd:
                sound = {name: m for _, name, m in read if m}
                pools = [
                    Evidence(sound[row["id"]], row["ratio"], row["ratio_low"], row["ratio_high"], row["finals"])
                    for row in found
                ]
                return sorted(pools, key=lambda pool: (pool.measurement.created, pool.measurement.id))
            damaged += bad
            strange += odd

    def _numbered(self, numbers: Iterable[int]) -> Iterator[tuple[int, bytes, Measurement | None]]:
        """Number, name and measurement of some rows; None for one that is not what was recorded."""
        each = iter(sorted(numbers))
        while portion := list(islice(each, 500)):
            for row in self._rows(*self._select([f"number IN ({', '.join(map(str, portion))})"], [])):
                yield row["number"], row["id"], self._sound(row)

    # Rows.

    def _where(self, local: bool | None, equal: Mapping[str, str]) -> tuple[list[str], list[Any]]:
        unknown = set(equal) - set(schema.COLUMNS)
        if unknown:
            columns = ", ".join(schema.COLUMNS)
            raise ElsaTuneError(f"measurements have no column {sorted(unknown)[0]!r}; they have {columns}")
        where = [f"{column} = ?" for column in equal]
        values = [self._number(text) if column in schema.TEXTS else text for column, text in equal.items()]
        if local is not None:
            where.append(f"local = {int(local)}")
        return where, values

    def _select(self, where: list[str], values: list[Any]) -> tuple[str, list[Any]]:
        return f"SELECT {', '.join(('number', *schema.COLUMNS))} FROM recorded {_condition(where)}", values

    def _rows(self, select: str, values: list[Any]) -> Iterator[dict[str, Any]]:
        rows = self._connection.execute(select, values)
        names = [column[0] for column in rows.description]
        return (dict(zip(names, row, strict=True)) for row in rows)

    def _measurement(self, row: dict[str, Any]) -> Measurement:
        texts = {name: self._text(row[name]) for name in schema.TEXTS}
        return schema.measurement({**row, **texts})

    def _sound(self, row: dict[str, Any]) -> Measurement | None:
        try:
            found = self._measurement(row)
            said = found if self._version == schema.FORMAT else earlier.unsaid(found)
            if said.id == row["id"].hex():
                return found
        except UNREADABLE:
            pass
        self._unsound.add(row["number"])
        return None

    def _text(self, number: int | str | bytes | None) -> str | bytes | None:
        """The text of a number; a short one may stand in its row itself."""
        if not isinstance(number, int):
            return number
        if number not in self._texts:
            found = self._connection.execute("SELECT content FROM texts WHERE number = ?", [number]).fetchone()
            if found is None:
                raise sqlite3.DatabaseError(f"text {number} is missing")
            self._texts[number] = found[0]
        return self._texts[number]

    def _number(self, text: str) -> int | None:
        """The number of a text that is there, or None."""
        if text not in self._numbers:
            found = self._connection.execute("SELECT number FROM texts WHERE key = ?", [schema.key(text)]).fetchone()
            if found is None:
                return None
            self._numbers[text] = int(found[0])
        return self._numbers[text]


def _readable(connection: sqlite3.Connection, path: Path) -> int:
    """The format of a database, made readable where it is an earlier one. Raises DatabaseUnusable, sqlite3.DatabaseError."""
    connection.execute("PRAGMA trusted_schema = OFF")
    connection.execute("PRAGMA temp_store = MEMORY")
    version = int(connection.execute("PRAGMA user_version").fetchone()[0])
    if version > schema.FORMAT:
        raise DatabaseUnusable(f"{path} is of format {version}, this version reads {schema.FORMAT}; upgrade elsa-tune")
    if version == 1:
        raise DatabaseUnusable(f"{path} is of format 1; the next elsa-tune, or elsa-tune db verify, rewrites it")
    tables = ("records", "words") if version == 2 else ("recorded", "texts")
    try:
        kinds = connection.execute("SELECT type FROM sqlite_master WHERE name IN (?, ?)", tables).fetchall()
    except UnicodeDecodeError as error:  # a name of the schema was damaged
        raise sqlite3.DatabaseError(str(error)) from error
    if kinds != [("table",)] * 2:  # somebody's else; a view could make reading last for ever
        raise DatabaseUnusable(f"{path} is no database of measurements; name another")
    if version == 2:
        earlier.overlay(connection)
    return version


def _condition(where: list[str]) -> str:
    return f"WHERE {' AND '.join(where)}" if where else ""
