"""The database on sqlite-utils: whole transactions, views for anyone, earlier formats, roles, and what is read of the rest."""

from __future__ import annotations

import json
import os
import random
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import formats
import pytest
from click.testing import CliRunner
from sqlite_utils import cli as sqlite_utils
from victim import DEVICE, made

from elsa_tune import places
from elsa_tune.errors import DatabaseUnusable
from elsa_tune.generate import backends
from elsa_tune.measurement import Measurement
from elsa_tune.problem import Problem
from elsa_tune.remember import foreign, layers, lines, pages, repair, salvage, schema
from elsa_tune.remember.database import Database
from elsa_tune.remember.reading import Reader
from elsa_tune.shell import cli
from elsa_tune.space import Space

PROBLEM = made(0).problem
RIVAL = replace(made(0), variant="sdpa.flash", role="rival", ratio=1.0, ratio_low=1.0, ratio_high=1.0, created=0.5)
HINT = replace(made(1), incumbent="plain", incumbent_role="yardstick", ratio=90.0, ratio_low=80.0, ratio_high=99.0)
MANY = tuple(1e-3 + n * 1e-7 for n in range(40))


def mixed() -> list[tuple[Measurement, bool]]:
    """What a home may hold: finals, a trial, a failure, torch's own, a kit's line, long samples, what others measured."""
    failed = replace(
        made(2),
        status="failed",
        stage="trial",
        reason="é\n'",
        ratio=None,
        samples=(),
        incumbent="",
        incumbent_samples=(),
    )
    long = replace(
        made(3), samples=MANY, incumbent_samples=MANY[::-1], resources={"hot_spills": 1}, error=None, constant=0.5
    )
    return [(made(0), True), (RIVAL, True), (HINT, False), (failed, True), (long, True), (made(4), False), (made(5, "trial"), True)]  # fmt: skip


def content(database: Iterable[Measurement]) -> dict[str, Measurement]:
    return {m.id: m for m in database}


def outcome(database: Reader) -> list[tuple[str, str, float, int]]:
    return [(w.problem, w.variant, w.ratio, w.finals) for w in database.winners(True)]


# Transactions.


def test_sqlite_utils_never_ends_our_transaction(home: Path) -> None:
    """A change that fails after thousands of rows and texts leaves nothing, and nobody saw any of it."""
    with Database.for_writing() as database:
        database.record(made(0))
        with pytest.raises(RuntimeError, match="planted"), database._transaction():
            database._insert((made(n), True) for n in range(1, 3000))
            database._tables.view("winners", "SELECT 1 AS one")
            with Database.for_reading(places.database()) as other:
                assert len(other) == 1
            assert len(database) == 3000
            raise RuntimeError("planted")
        assert len(database) == 1 and not database._connection.in_transaction
        database.add(map(made, range(1, 10)))
    with closing(sqlite3.connect(places.database())) as connection:
        assert "finals" in [column[1] for column in connection.execute("PRAGMA table_info(winners)")]
        used = {row[0] for row in connection.execute("SELECT problem FROM recorded")}
        spelled = "SELECT number FROM texts WHERE content LIKE 'fp32.d64@%'"
        assert {row[0] for row in connection.execute(spelled)} == used, "texts of what was rolled back are gone too"


def test_plugins_of_sqlite_utils_stay_out(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What somebody installed for the command of that name does not run in a tuner."""
    from sqlite_utils import db

    monkeypatch.setattr(db, "ensure_plugins_loaded", lambda: pytest.fail("plugins were loaded"))
    with Database.for_writing() as database:
        database.record(made(0))


def test_texts_whose_keys_collide_are_damage_not_a_crash(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Database.for_writing() as database:
        key = schema.key
        monkeypatch.setattr(schema, "key", lambda text: 7 if text.startswith("fp32.d64@b1.h8.q") else key(text))
        database.add([made(0), made(1)])
        assert len(database) == 2 and len(database.damaged()) == 1


# Views.


def run(*arguments: object) -> list[dict[str, object]]:
    done = CliRunner().invoke(sqlite_utils.cli, [*map(str, arguments)])
    assert done.exit_code == 0, done.output
    found: list[dict[str, object]] = json.loads(done.output)
    return found


def test_views_open_with_sqlite_utils(home: Path) -> None:
    """The command line that anyone has reads what is recorded, samples as numbers, and winners with how many finals say so."""
    long = replace(made(3), samples=MANY, incumbent_samples=MANY[::-1], provenance={"torch": "2", "number": 3})
    again = replace(long, created=99.0)
    with Database.for_writing() as database:
        for m in (long, again, replace(RIVAL, problem=long.problem), HINT):
            database.record(m)
        (won,) = database.winners()
    (row,) = run("rows", places.database(), "winners", "--json-cols")
    assert (row["variant"], row["problem"], row["finals"]) == (long.variant, long.problem, 2)
    assert row["ratio"] == won.ratio and row["id"] == again.id
    assert tuple(row["samples"]) == again.samples and tuple(row["incumbent_samples"]) == again.incumbent_samples  # type: ignore[arg-type]
    assert row["provenance"] == dict(long.provenance) and row["role"] == "candidate"
    rows = run("rows", places.database(), "measurements", "--json-cols")
    assert {row["id"] for row in rows} == {m.id for m in (long, again, HINT, replace(RIVAL, problem=long.problem))}
    assert {row["role"] for row in rows} == {"candidate", "rival"}
    assert {row["incumbent_role"] for row in rows} == {"rival", "yardstick"}
    short = next(row for row in rows if row["id"] == HINT.id)
    assert tuple(short["incumbent_samples"]) == HINT.incumbent_samples  # type: ignore[arg-type]
    sql = "SELECT json_array_length(samples) AS n FROM measurements WHERE role = 'candidate' ORDER BY n"
    assert run("query", places.database(), sql) == [{"n": 5}, {"n": 40}, {"n": 40}]


def test_views_say_what_the_program_says(home: Path) -> None:
    with Database.for_writing() as database:
        database.take_over(mixed())
        rows = {str(row["id"]): row for row in run("rows", places.database(), "measurements", "--json-cols")}
        for m in database:
            row = rows.pop(m.id)
            said = {name: value for name, value in row.items() if name not in ("id", "local") and value is not None}
            assert Measurement(**{k: v for k, v in said.items() if k != "family"}).line == m.line  # type: ignore[arg-type]
        assert not rows


# Earlier formats.


def test_a_database_of_format_1_is_rewritten(home: Path) -> None:
    """What the first version wrote, kits' lines and torch's own among it."""
    home.mkdir()
    rows = [m for m, _ in mixed()]
    formats.first(places.database(), rows)
    with pytest.raises(DatabaseUnusable, match="format 1"):
        Database.for_reading(places.database())
    before = dump(places.database())
    with Database.for_writing() as database:
        assert content(database) == content(rows) and not database.damaged()
        assert [m.incumbent for m in database.measurements(local=False)] == ["plain"]
        assert database.installation
    (kept,) = home.glob("measurements.db.format-1-*")
    assert dump(kept) == before


def second(path: Path) -> None:
    formats.second(path, mixed(), {"installation": "0123456789abcdef", f"era of {PROBLEM} on {DEVICE}": "3"})


def dump(path: Path) -> list[str]:
    with closing(sqlite3.connect(path)) as connection:
        return [*connection.iterdump(), str(connection.execute("PRAGMA user_version").fetchone())]


def test_a_database_of_format_2_serves_as_it_is(home: Path) -> None:
    """Who only reads, an image that nobody writes to, finds in it what a rewritten one says."""
    home.mkdir()
    second(places.database())
    before = dump(places.database())
    rows = [m for m, _ in mixed()]
    with Database.for_reading(places.database()) as database:
        assert content(database) == content(rows) and not database.damaged()
        assert database.about(f"era of {PROBLEM} on {DEVICE}") == "3"
        told = outcome(database), database.counts(True), sorted(database.finals_of()), database.slower(DEVICE)
        assert database.measurements(problem=PROBLEM) == [RIVAL, made(0)]
    own, imported, *_ = layers.layers()
    assert (own.name, len(own.winners()), imported.name, len(imported.winners())) == ("own", 2, "imported", 1)
    assert dump(places.database()) == before
    with Database.for_writing() as database:
        assert told == (outcome(database), database.counts(True), sorted(database.finals_of()), database.slower(DEVICE))
    refused: Counter[str] = Counter()
    second(home / "theirs.db")
    assert content(foreign.read(home / "theirs.db", refused)) == content(rows) and not refused, "as others' too"


def test_a_database_of_format_2_is_rewritten(home: Path) -> None:
    home.mkdir()
    second(places.database())
    before = dump(places.database())
    with Database.for_writing() as database:
        for local in (True, False):
            assert content(database.measurements(local)) == content(m for m, own in mixed() if own == local)
        assert database.installation == "0123456789abcdef" and database.about(f"era of {PROBLEM} on {DEVICE}") == "3"
        assert not database.damaged() and not database.flaws()
        database.record(made(9))
    with closing(sqlite3.connect(places.database())) as connection:
        names = {row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE name NOT LIKE 'sqlite_%'")}
        assert names == {
            "texts",
            "recorded",
            "about",
            "traffic",
            "recorded_by_problem",
            "recorded_finals",
            "measurements",
            "winners",
        }
        assert connection.execute("PRAGMA freelist_count").fetchone() == (0,)
    (kept,) = home.glob("measurements.db.format-2-*")
    assert dump(kept) == before, "the old one is beside it, as it was"
    with Database.for_writing():
        pass
    assert len(list(home.glob("measurements.db.format-2-*"))) == 1, "once"


def test_what_was_damaged_is_not_believed_because_it_is_rewritten(home: Path) -> None:
    home.mkdir()
    second(places.database())
    with closing(sqlite3.connect(places.database())) as connection, connection:
        connection.execute("UPDATE records SET ratio = 9.0 WHERE created = ?", [made(0).created])
    with Database.for_writing() as database:
        assert content(database) == content(m for m, _ in mixed() if m != made(0))


@pytest.mark.parametrize("at", ["the copy", "a row", "the version"])
def test_a_rewriting_that_fails_changes_nothing(home: Path, at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    home.mkdir()
    second(places.database())
    before = dump(places.database())

    def fail(*arguments: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patch:
        if at == "the copy":
            patch.setattr("elsa_tune.remember.earlier.copied", fail)
        elif at == "a row":
            patch.setattr("elsa_tune.remember.schema.row", fail)
        else:
            patch.setattr("elsa_tune.remember.earlier.LEFT", {2: ("TABLE records", "TABLE nowhere")})
        with pytest.raises(DatabaseUnusable, match="free some space|no such table"):
            Database.for_writing()
    assert dump(places.database()) == before
    with Database.for_writing() as database:
        assert len(database) == len(mixed())


KILLED = """
import os, random, shutil, signal, sys, time
from pathlib import Path
import sqlite_utils
from elsa_tune.remember.database import Database
path, rng, killed = Path(sys.argv[1]), random.Random(5), 0
old = path.read_bytes()
Database.in_memory([], "warm")
for turn in range(40):
    child = os.fork()
    if not child:
        Database.for_writing(path)
        os._exit(0)
    time.sleep(rng.uniform(0.001, 0.15))
    os.kill(child, signal.SIGKILL)
    killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
    with Database.for_reading(path) as database:
        assert len(list(database)) == len({m.id for m in database}) == 600 and not database.damaged()
        done = database._version == 3
    if done:
        for left in path.parent.glob("measurements.db*"):
            left.unlink()
        path.write_bytes(old)
for _ in range(2):
    if not os.fork():
        Database.for_writing(path)
        os._exit(0)
print(killed, os.wait()[1], os.wait()[1])
"""


def test_a_rewriting_that_is_killed_loses_nothing(home: Path) -> None:
    """kill -9 anywhere in it, again and again, and then two at once."""
    home.mkdir()
    rows = [(made(n), True) for n in range(600)]
    formats.second(places.database(), rows, {"installation": "0123456789abcdef"})
    told = subprocess.run([sys.executable, "-c", KILLED, str(places.database())], capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    killed, *codes = map(int, told.stdout.split())
    assert killed > 5 and codes == [0, 0]
    with Database.for_reading(places.database()) as database:
        assert content(database) == content(m for m, _ in rows) and database.installation == "0123456789abcdef"


def test_an_older_program_that_still_runs_is_refused_not_ignored(home: Path) -> None:
    """Its rows would be lost if its statements still meant something."""
    home.mkdir()
    second(places.database())
    older = sqlite3.connect(places.database(), isolation_level=None)
    assert older.execute("SELECT COUNT(*) FROM records").fetchone() == (len(mixed()),)
    with Database.for_writing():
        pass
    for statement in ("INSERT OR IGNORE INTO words (key, content) VALUES (1, 'x')", "SELECT * FROM records"):
        with pytest.raises(sqlite3.OperationalError, match="no such table"):
            older.execute(statement)
    older.close()


# Roles.


def test_lines_of_earlier_versions_get_their_roles() -> None:
    for m, _ in mixed():
        said = {k: v for k, v in json.loads(m.line).items() if k not in ("role", "incumbent_role")}
        assert foreign.sound(json.dumps(said)) == m == foreign.sound(m.line)


@pytest.mark.parametrize(
    ("m", "claim", "reason"),
    [
        (made(0), {"role": "rival"}, "role: not that of cpp"),  # a rival need not be faster to win
        (RIVAL, {"role": "candidate"}, "role: not that of sdpa.flash"),
        (HINT, {"incumbent_role": "rival"}, "incumbent_role: not that of plain"),  # and its ratio would count
        (made(0), {"role": "king"}, "role"),
    ],
)
def test_a_line_claims_no_other_role(m: Measurement, claim: dict[str, str], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        foreign.sound(json.dumps({**json.loads(m.line), **claim}))


def test_the_stored_role_decides_not_the_name() -> None:
    """A rival of any name wins where nothing is faster beyond its interval; a candidate that bears torch's name does not."""
    named = replace(made(0), variant="sdpa.like", ratio=1.1, ratio_low=0.9, ratio_high=1.3)
    rival = replace(RIVAL, variant="other.kernel")
    for rows, variant in (([named], None), ([named, rival], "other.kernel")):
        winners = Database.in_memory(rows, "test").winners()
        assert [w.variant for w in winners] == ([variant] if variant else [])
    against = replace(HINT, incumbent="sdpa.flash")
    assert not Database.in_memory([against], "test").winners(), "a yardstick is no torch, whatever its name"
    assert backends.role("sdpa.flash") == "rival" and backends.role("mojo.serial") == "candidate"
    for name in backends.names():
        rendered = backends.get(name).source(
            Space.read(name).parse(Space.read(name).start[0]), Problem.parse("fp32.d64")
        )
        assert (name in backends.candidates()) == (rendered is not None) == (name not in backends.rivals()), name


# What is left of a damaged file.


def test_everything_is_found_in_leaves_alone(tmp_path: Path) -> None:
    """Rows that need pages of their own, rows only in the log, every format, and a first page of zeros or of another size."""
    path = tmp_path / "one.db"
    wide = replace(made(7), samples=tuple(1e-3 + n * 1e-8 for n in range(3000)), reason="r" * 2000)
    rows = [*(m for m, _ in mixed()), wide, *map(made, range(10, 400))]
    database = Database.for_writing(path)
    database.take_over((m, True) for m in rows)
    for kept in (tmp_path / "log.db", tmp_path / "log.db-wal"):
        kept.write_bytes(path.with_name(kept.name.replace("log", "one")).read_bytes())
    assert (tmp_path / "log.db-wal").stat().st_size > 100_000
    database.close()
    assert found(tmp_path / "log.db") == content(rows)
    assert found(path) == content(rows)
    whole = path.read_bytes()
    path.write_bytes(bytes(4096) + whole[4096:])
    assert found(path) == content(rows), "nothing of the first page is needed"
    formats.second(tmp_path / "two.db", mixed(), {})
    formats.first(tmp_path / "three.db", [m for m, _ in mixed()])
    for other in ("two.db", "three.db"):
        assert found(tmp_path / other) == content(m for m, _ in mixed()), other
    with closing(sqlite3.connect(tmp_path / "small.db", isolation_level=None)) as small:
        small.execute("PRAGMA page_size = 1024")
        small.execute("VACUUM")
    with Database.for_writing(tmp_path / "small.db") as database:
        database.take_over((m, True) for m in rows)
    assert found(tmp_path / "small.db") == content(rows)


def found(path: Path) -> dict[str, Measurement]:
    return content(m for m, _ in salvage.measurements(path))


def test_a_damaged_database_of_format_2_is_taken_over_too(home: Path) -> None:
    home.mkdir()
    second(places.database())
    whole = places.database().read_bytes()
    places.database().write_bytes(os.urandom(100) + whole[100:])
    with Database.for_writing() as database:
        for local in (True, False):
            assert content(database.measurements(local)) == content(m for m, own in mixed() if own == local)
    assert len(list(home.glob("measurements.db.corrupt-*[0-9]"))) == 1


def test_salvage_survives_any_bytes(tmp_path: Path) -> None:
    """Leaves that lie about everything: cells outside, endless chains, kinds that are none."""
    rng, path = random.Random(2), tmp_path / "broken.db"
    with Database.for_writing(path) as database:
        database.take_over((m, True) for m in map(made, range(60)))
    whole, rows = path.read_bytes(), content(map(made, range(60)))
    for turn in range(60):
        broken = bytearray(whole)
        for _ in range(10 ** (turn % 4)):
            broken[rng.randrange(len(broken))] = rng.randrange(256)
        path.write_bytes(broken)
        assert found(path).items() <= rows.items()


def test_verify_keeps_what_is_sound(home: Path) -> None:
    with Database.for_writing() as database:
        database.take_over(mixed())
        database._connection.execute("UPDATE recorded SET role = 'rival' WHERE created = ?", [made(0).created])
    health = repair.verify()
    assert (health.sound, health.whole, health.damaged) == (len(mixed()) - 1, True, 1) and health.aside
    with Database.for_reading(places.database()) as database:
        assert content(database) == content(m for m, _ in mixed() if m != made(0))


def torn(path: Path, what: str) -> str:
    """A database of 400 measurements with one page of a table or index torn, or its header; what is to be said of it."""
    with Database.for_writing(path) as database:
        database.take_over((made(n), True) for n in range(400))
    content = bytearray(path.read_bytes())
    with closing(sqlite3.connect(path)) as whole:
        roots = dict(whole.execute("SELECT name, rootpage FROM sqlite_master WHERE rootpage"))
    if what == "header":
        content[:16] = bytes(16)
        number, said = 1, "the header: page 1"
    else:
        name = what.removeprefix("all of ")
        root = 4096 * (roots[name] - 1)
        first = int.from_bytes(content[root + 12 : root + 14], "big")
        number = roots[name] if what != name else int.from_bytes(content[root + first : root + first + 4], "big")
        content[4096 * (number - 1) : 4096 * number] = bytes(4096)
        said = f"{'table' if name in ('texts', 'recorded') else 'index'} {name}: page {number}"
    path.write_bytes(content)
    return said


@pytest.mark.parametrize(
    ("what", "least"),
    [("header", 400), ("recorded", 360), ("all of recorded", 400), ("texts", 0), ("recorded_by_problem", 400)],
)
def test_verify_says_what_is_damaged_how_much_is_whole_and_what_to_do(home: Path, what: str, least: int) -> None:
    home.mkdir()
    said = torn(places.database(), what)
    done = CliRunner().invoke(cli.main, ["db", "verify"])
    assert done.exit_code == 1 and f"damaged: {said}\n" in done.stderr, done.stderr
    assert "elsa-tune db import FILE" in done.stderr and str(places.database()) in done.stderr
    with Database.for_reading(places.database()) as database:
        kept = content(database)
        assert kept.items() <= content(map(made, range(400))).items() and len(kept) >= least
    assert done.stdout.startswith(f"{len(kept)} measurements are what was recorded\nset aside: ")
    again = CliRunner().invoke(cli.main, ["db", "verify"])
    assert again.exit_code == 0 and not again.stderr and again.stdout == done.stdout, "once"


def test_verify_counts_what_is_not_what_was_recorded(home: Path) -> None:
    with Database.for_writing() as database:
        database.take_over(mixed())
        database._connection.execute("UPDATE recorded SET ratio = 9.0 WHERE stage = 'final'")
    done = CliRunner().invoke(cli.main, ["db", "verify"])
    changed = sum(m.stage == "final" for m, _ in mixed())
    assert done.exit_code == 1 and f"damaged: {changed} measurements that are not what was recorded\n" in done.stderr


def test_pages_that_lie_are_told_not_followed(tmp_path: Path) -> None:
    """Circles, pages outside, a file cut off: damage is told of any bytes, in a line that stays short."""
    rng, path = random.Random(4), tmp_path / "one.db"
    with Database.for_writing(path) as database:
        database.take_over((made(n), True) for n in range(400))
    whole = path.read_bytes()
    assert pages.Pages(path).damage() == []
    for turn in range(60):
        broken = bytearray(whole)
        for _ in range(10 ** (turn % 5)):
            broken[rng.randrange(len(broken))] = rng.randrange(256)
        path.write_bytes(broken[: rng.randrange(len(broken))] if turn % 3 == 0 else broken)
        assert all(len(one) < 200 for one in pages.Pages(path).damage())
    path.write_bytes(whole[: len(whole) // 2])
    assert any(one.startswith("table recorded: page") for one in pages.Pages(path).damage())


def test_shipped_lines_say_their_roles() -> None:
    for path in sorted((places.PACKAGE.parent / "cache").glob("*.jsonl")):
        for m in lines.read(path):
            assert foreign.sound(m.line) == m
