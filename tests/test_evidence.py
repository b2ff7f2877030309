"""The database: append-only, winners as a view, ties, layers, and every way a file can be unusable."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import sqlite3
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from planted import variant_of

from elsa_tune import places
from elsa_tune.device import Device, host_cpu
from elsa_tune.dispatch import serving
from elsa_tune.errors import DatabaseUnusable, ElsaTuneError
from elsa_tune.measurement import Measurement
from elsa_tune.problem import Problem
from elsa_tune.remember import database as databases
from elsa_tune.remember import layers, lines
from elsa_tune.remember.database import Database
from elsa_tune.shell import cli

DEVICE = "cpu:amd_f26m2-zen5-c2"
PROBLEM = "fp32.d64@b1.h8.q1024.k1024"


def measured(variant: str, low: float, high: float, **more: object) -> Measurement:
    facts: dict[str, object] = dict(
        device=DEVICE, problem=PROBLEM, variant=variant, status="ok", stage="final", error=1e-7, seconds=1e-3,
        ratio=(low + high) / 2, ratio_low=low, ratio_high=high, samples=(1e-3,), incumbent="sdpa.flash",
        incumbent_samples=(2e-3,), resources={"hot_spills": 0}, provenance={"torch": "2"}, created=1.0,
    )  # fmt: skip
    return Measurement(**{**facts, **more})  # type: ignore[arg-type]


SDPA = measured("sdpa.flash", 1, 1, role="rival")


def winner(*rows: Measurement) -> str | None:
    found = Database.in_memory([SDPA, *rows], "test").winners()
    assert len(found) <= 1
    return found[0].variant if found else None


def test_a_measurement_survives_the_database(home: Path) -> None:
    m = measured("cpp.a", 1.9, 2.1, reason="é\n'\";", constant=0.5)
    with Database.for_writing() as database:
        database.record(m)
        database.record(m)
        assert database.measurements() == [m], "the same measurement twice is one row"
    with Database.for_reading(places.database()) as database:
        assert database.measurements(problem=PROBLEM) == [m]
        assert [w.measurement for w in database.winners()] == [m]
        with pytest.raises(ElsaTuneError, match="no column"):
            database.measurements(**{"1; DROP TABLE measurements": "x"})


def test_winner_rules() -> None:
    assert winner() == "sdpa.flash"
    assert winner(measured("cpp.a", 1.9, 2.1), measured("cpp.b", 2.9, 3.1)) == "cpp.b"
    assert winner(measured("cpp.a", 0.9, 1.4)) == "sdpa.flash", "not faster beyond its interval"
    assert winner(measured("cpp.a", 1.9, 2.1, stage="trial")) == "sdpa.flash", "trials do not win"
    assert winner(measured("cpp.a", 1.9, 2.1, status="wrong")) == "sdpa.flash"
    assert (
        winner(measured("cpp.a", 1.27, 1.29), measured("cpp.a", 0.8, 1.2, created=2.0), measured("cpp.b", 1.1, 1.12))
        == "cpp.a"
    ), "a worse day does not undo a better one"


def after(**said: object) -> Measurement:
    """A later final of cpp.a, slower than what it was, whose provenance says something more."""
    return measured("cpp.a", 1.1, 1.2, created=2.0, provenance={"torch": "2", **said})


@pytest.mark.parametrize(
    ("later", "ratio", "finals"),
    [
        (after(), (3.0 / (0.2 / 3 + 0.02) ** 2 + 1.15 / (0.1 / 1.15 + 0.02) ** 2)
            / (1 / (0.2 / 3 + 0.02) ** 2 + 1 / (0.1 / 1.15 + 0.02) ** 2), 2),
        (after(torch="3"), 1.15, 1),
        (after(era=1), 1.15, 1),
        (measured("cpp.a", 1.1, 1.2, created=2.0, digest="other"), 1.15, 1),
        (after(disturbed=1.0), 3.0, 1),
    ],
)  # fmt: skip
def test_what_finals_say_together(later: Measurement, ratio: float, finals: int) -> None:
    """They pool under the same code, torch and era; a disturbed one counts only where there is no other."""
    first = measured("cpp.a", 2.9, 3.1)
    for rows in ([first, later], [later, first]):
        (found,) = [x for x in Database.in_memory(rows, "test").evidence() if x.variant == "cpp.a"]
        assert found.ratio == pytest.approx(ratio) and found.finals == finals
        assert found.measurement == (first if found.ratio == 3 else later), "the newest of those that count"


def test_a_new_era_is_of_a_whole_problem_and_of_who_counts_it() -> None:
    old, others = (
        measured("cpp.b", 4.9, 5.1),
        measured("cpp.c", 2.9, 3.1, provenance={"torch": "2", "installation": "x"}),
    )
    assert winner(old, after(era=1.0)) == "cpp.a", "what was measured before the change is forgotten"
    assert winner(others, after(era=1.0)) == "cpp.c", "another machine's eras are its own"


def test_a_disturbed_variant_does_not_outvote_a_clean_one() -> None:
    disturbed = measured("cpp.b", 2.9, 3.1, provenance={"torch": "2", "disturbed": 0.9})
    assert winner(disturbed, measured("cpp.a", 1.9, 2.1)) == "cpp.a"
    assert winner(disturbed) == "cpp.b", "but torch does not win because the machine was busy"


def test_the_view_says_from_how_many_finals(home: Path) -> None:
    with Database.for_writing() as database:
        for day in range(3):
            database.record(measured("cpp.a", 1.9, 2.1, created=float(day)))
    with sqlite3.connect(places.database()) as connection:  # anyone's SQL
        rows = connection.execute("SELECT variant, round(ratio, 3), finals, created FROM winners").fetchall()
    connection.close()
    assert rows == [("cpp.a", 2.0, 3, 2.0)]


def test_views_of_an_older_version_are_defined_anew(home: Path) -> None:
    _recorded()
    with sqlite3.connect(places.database()) as connection:
        connection.execute("DROP VIEW winners")
        connection.execute("CREATE VIEW winners AS SELECT * FROM measurements")
    connection.close()
    with Database.for_writing():
        pass
    with sqlite3.connect(places.database()) as connection:
        assert "finals" in [column[1] for column in connection.execute("PRAGMA table_info(winners)")]
    connection.close()


def test_one_damaged_final_does_not_count(home: Path) -> None:
    with Database.for_writing() as database:
        for row in (SDPA, measured("cpp.a", 1.9, 2.1), measured("cpp.a", 1.9, 2.1, created=2.0)):
            database.record(row)
        database._connection.execute("UPDATE recorded SET ratio = 9.0 WHERE created = 2.0")
        (found,) = database.winners()
    assert (found.variant, found.ratio, found.finals) == ("cpp.a", 2.0, 1)


def test_ties_go_to_the_smaller_error_then_fewer_spills_then_the_spelling() -> None:
    fast, tied = measured("cpp.z", 1.98, 2.04), measured("cpp.b", 1.96, 2.0)
    assert winner(fast, tied) == "cpp.b", "within 2 % the spelling decides"
    assert winner(fast, measured("cpp.b", 1.9, 2.0)) == "cpp.z", "beyond, though intervals overlap, the ratio"
    assert winner(fast, measured("cpp.b", 1.9, 2.0, error=1e-8)) == "cpp.b", "or a smaller error"
    exact_but_slow, unsure = measured("cpp.a", 1.4, 1.7, error=1e-9), measured("cpp.y", 1.5, 2.5)
    assert winner(unsure, exact_but_slow) == "cpp.y", "a wide interval is no tie with whatever it meets"
    assert winner(fast, measured("cpp.b", 1.95, 2.0, error=2e-7)) == "cpp.z"
    assert winner(fast, measured("cpp.b", 1.95, 2.0, resources={"hot_spills": 3})) == "cpp.z"
    assert winner(measured("cpp.z", 2.0, 2.0), measured("cpp.b", 1.97, 1.97)) == "cpp.b", "within 2 %"
    assert winner(measured("cpp.z", 2.0, 2.0), measured("cpp.b", 1.9, 1.91)) == "cpp.z"


def test_two_noisy_runs_name_the_same_winner() -> None:
    """Three tied variants and two slower ones, measured twice with noise: the tie class decides, not the noise."""

    def run(seed: int) -> str | None:
        rng, rows = random.Random(seed), []
        for name, truth in (("cpp.c", 2.0), ("cpp.b", 2.01), ("cpp.a", 1.99), ("cpp.slow", 1.7), ("cpp.slower", 1.4)):
            middle = truth * rng.gauss(1, 0.003)
            rows.append(measured(name, middle * 0.985, middle * 1.015))
        return winner(*rows)

    assert {run(seed) for seed in range(50)} == {"cpp.a"}


def test_kin_answer_in_order(home: Path) -> None:
    others = {
        "exact": DEVICE,
        "model": "cpu:amd_f26m2-zen5-c64",
        "arch": "cpu:intel_f6m143-sapphirerapids-c8",
        "family": "cpu:arm_0x41_0xd0c-neoverse_n1-c4",
    }
    rows = [
        measured("cpp.serial.avx2.l8.q2.k4.v4.n48", 1.9, 2.1, device=device) for device in reversed(others.values())
    ]
    layer = layers.Layer("own", "memory", Database.in_memory(rows, "test"))
    found = layers.known_winners(Device.parse(DEVICE), [layer])
    assert [w.rung for w in found] == list(others)


def test_lines_are_read_back_and_sorted(tmp_path: Path) -> None:
    rows = [measured(f"cpp.{name}", 1.9, 2.1, resources={"hot_spills": 1}) for name in "cab"]
    lines.write(rows, tmp_path / "one.jsonl")
    lines.write(rows[::-1], tmp_path / "two.jsonl")
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()
    assert sorted(lines.read(tmp_path / "one.jsonl"), key=lambda m: m.variant) == sorted(rows, key=lambda m: m.variant)


def _write_many(home: str, writer: int) -> None:
    os.environ["ELSA_TUNE_HOME"] = home
    with Database.for_writing() as database:
        for i in range(100):
            database.record(measured(f"cpp.w{writer}x{i}", 1.9, 2.1, created=float(i)))


def test_two_processes_write_one_database(home: Path) -> None:
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write_many, args=(str(home), w)) for w in range(2)]
    for process in writers:
        process.start()
    for process in writers:
        process.join()
        assert process.exitcode == 0
    with Database.for_reading(places.database()) as database:
        assert len(database.measurements()) == 200


def test_a_writer_waits_for_a_lock_that_sqlite_does_not_wait_for(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A change of journal mode fails at once beside another connection: two first runs at the same moment."""
    home.mkdir(exist_ok=True)
    holder = sqlite3.connect(places.database(), check_same_thread=False)
    holder.execute("CREATE TABLE another (x)")
    holder.execute("BEGIN IMMEDIATE")
    monkeypatch.setattr(databases, "PATIENCE", 0.0)
    with pytest.raises(DatabaseUnusable, match="locked"):
        Database.for_writing()
    monkeypatch.setattr(databases, "PATIENCE", 30.0)
    release = threading.Timer(0.3, holder.rollback)
    release.start()
    _recorded(1)
    release.join()
    holder.close()


def _recorded(count: int = 3) -> list[Measurement]:
    rows = [measured(f"cpp.a{i}", 1.9, 2.1, created=float(i)) for i in range(count)]
    with Database.for_writing() as database:
        for row in rows:
            database.record(row)
    return rows


def _own_layer() -> layers.Layer:
    return next(layer for layer in layers.layers() if layer.name == "own")


@pytest.mark.parametrize("damage", ["garbage", "empty header", "torn page"])
def test_corrupt_file_is_set_aside_never_overwritten(home: Path, damage: str) -> None:
    rows = _recorded(200)
    path = places.database()
    whole = path.read_bytes()
    broken = {
        "garbage": b"not a database" * 99,
        "empty header": bytes(100) + whole[100:],
        "torn page": whole[:4096] + os.urandom(len(whole) - 4096),
    }[damage]
    path.write_bytes(broken)
    for tail in ("-wal", "-shm"):
        path.with_name(path.name + tail).unlink(missing_ok=True)
    layer = _own_layer()
    if layer.database is not None:  # a torn page may only show when it is read
        with pytest.raises(DatabaseUnusable, match="malformed; elsa-tune db verify"):
            layer.database.measurements()
    assert path.read_bytes() == broken, "reading changes nothing"
    new = measured("cpp.new", 1.9, 2.1)
    with Database.for_writing() as database:
        database.record(new)
        kept = rows if damage == "empty header" else []
        assert database.measurements() == sorted([*kept, new], key=lambda m: (m.created, m.id))
    aside = [p for p in path.parent.glob("measurements.db.corrupt-*") if not p.name.endswith(("-wal", "-shm"))]
    assert [a.read_bytes() for a in aside] == [broken]


def test_future_version_is_left_alone(home: Path) -> None:
    _recorded()
    with sqlite3.connect(places.database()) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    assert "upgrade" in _own_layer().problem
    with pytest.raises(DatabaseUnusable, match="newer"):
        Database.for_writing()
    assert not list(home.glob("*.corrupt-*"))


def test_locked_database(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = _recorded()
    holder = sqlite3.connect(places.database())
    holder.execute("PRAGMA journal_mode = DELETE")
    holder.execute("BEGIN EXCLUSIVE")
    assert "locked" in _own_layer().problem
    holder.rollback()
    holder.close()
    found = _own_layer().database
    assert found is not None and found.measurements() == rows


def test_read_only_folder_still_serves(home: Path) -> None:
    rows = _recorded()
    places.database().chmod(0o400)
    home.chmod(0o500)
    try:
        found = _own_layer().database
        assert found is not None and found.measurements() == rows
        if os.geteuid():  # root may write anywhere
            with pytest.raises(DatabaseUnusable, match="ELSA_TUNE_HOME"):
                Database.for_writing()
    finally:
        home.chmod(0o700)


def test_a_home_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ELSA_TUNE_HOME", str(tmp_path / "file" / "home"))
    with pytest.raises(DatabaseUnusable, match="ELSA_TUNE_HOME"):
        Database.for_writing()


def test_network_file_systems_get_no_write_ahead_log(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(databases, "_on_network", lambda path: True)
    _recorded()
    with sqlite3.connect(places.database()) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone()[0] == "delete"
    connection.close()
    assert len(_own_layer().database.measurements()) == 3  # type: ignore[union-attr]


# What the command says of it.


def told(*arguments: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(cli.main, arguments)
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout, done.stderr


def test_winners_are_listed_by_whatever_names_a_device(home: Path) -> None:
    """A kind, an architecture, a full spelling, whether such a device is here or not; anything else says what is recorded."""
    elsewhere = "cuda:nvidia_h200-sm_90-c132-g140+d580.82_t12.8"
    with Database.for_writing() as database:
        for device in (DEVICE, elsewhere, str(host_cpu())):
            database.record(replace(SDPA, device=device))
    for named, listed in {
        "cpu": {DEVICE, str(host_cpu())}, "zen5": {DEVICE}, DEVICE: {DEVICE}, "cuda": {elsewhere}, "sm_90": {elsewhere},
        "auto": {str(host_cpu())},
    }.items():  # fmt: skip
        code, out, _ = told("winners", "--device", named, "--json")
        assert code == 0 and {row["device"] for row in json.loads(out)} == listed, named
        code, out, _ = told("db", "export", "--device", named)
        assert code == 0 and {json.loads(line)["device"] for line in out.splitlines()} == listed, named
    assert {row["ratio"] for row in json.loads(told("winners", "--json")[1])} == {1.0}
    assert not {"line", "said"} & json.loads(told("winners", "--json")[1])[0].keys(), (
        "what a measurement keeps for itself"
    )
    for command in (("winners",), ("db", "export")):
        code, _, err = told(*command, "--device", "hip")
        assert code == 2 and "'hip'" in err and elsewhere in err and DEVICE in err and err.count("\n") == 1


DAMAGES = {
    "garbage": "file is not a database",
    "a row": "1 of the measurements in it are damaged and left out",
    "a page": "malformed",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_database_is_said_in_one_line_and_others_answer(
    home: Path, tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By winners and explain, with the file and the command that mends it; what a team has serves meanwhile."""
    variant = variant_of(Problem.parse(PROBLEM))
    mine = measured(variant, 2.9, 3.1, device=str(host_cpu()))
    (tmp_path / "team").mkdir()
    lines.write([replace(mine, ratio=2.0, ratio_low=1.9, ratio_high=2.1)], tmp_path / "team" / "all.jsonl")
    monkeypatch.setenv("ELSA_TUNE_DB", str(tmp_path / "team" / "all.jsonl"))
    assert not layers.refresh_all()
    with Database.for_writing() as database:
        database.record(mine)
        if damage == "a row":
            database._connection.execute("UPDATE recorded SET ratio = 99.0")
        root = database._connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'recorded'").fetchone()[0]
    content = places.database().read_bytes()
    if damage == "garbage":
        places.database().write_bytes(b"not a database" * 99)
    elif damage == "a page":
        places.database().write_bytes(content[: 4096 * (root - 1)] + bytes(4096) + content[4096 * root :])
    serving.refresh()
    code, out, err = told("winners", "--json")
    assert code == 0 and [row["ratio"] for row in json.loads(out)] == [2.0], "the team's"
    assert err.startswith(f"elsa-tune: {places.database()}: ") and DAMAGES[damage] in err
    assert "elsa-tune db verify" in err and err.count("\n") == 1
    code, out, err = told("explain", PROBLEM, "--device", "cpu")
    assert code == 0 and f"is served by {variant} (rung: exact)" in out and not err
    assert [DAMAGES[damage] in line and "elsa-tune db verify" in line for line in out.splitlines()].count(True) == 1
    code, out, err = told("db", "export")
    assert (code, out) == ((0, "") if damage == "a row" else (2, "")) and DAMAGES[damage] in err
