"""Nothing recorded is lost, and no wrong winner appears, whatever crashes: kills, full disks, flipped bits, clocks, readers."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from victim import DEVICE, made

from elsa_tune import places
from elsa_tune.device import Device
from elsa_tune.dispatch import serving
from elsa_tune.errors import DatabaseUnusable, FolderTaken
from elsa_tune.measurement import Measurement
from elsa_tune.problem import Problem
from elsa_tune.remember import database as databases
from elsa_tune.remember import layers, lines, repair
from elsa_tune.remember.database import Database
from elsa_tune.tuning import tune as tuning

KILLS = 200
FLIPS = 100
READERS = 40
SMALL = "fp32.d16@b1.h2.q96.k96"


def best_of(rows: list[Measurement]) -> dict[str, str]:
    """The winners that plain Python finds: these measurements have one variant and no ties, so the newest is it."""
    newest: dict[str, Measurement] = {}
    for m in rows:
        if m.problem not in newest or m.created > newest[m.problem].created:
            newest[m.problem] = m
    return {problem: m.id for problem, m in newest.items()}


def test_kills_lose_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    """kill -9 while recording, importing and merging."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "victim.py"), str(tmp_path), str(KILLS), "7"],
        capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    told = json.loads(done.stdout)
    assert sum(told["kills"].values()) == KILLS and told["damaged"] == told["aside"] == 0
    assert len(told["acknowledged"]) > KILLS, "the kills came too early to prove anything"
    with Database.for_reading(tmp_path / "measurements.db") as database:
        rows = list(database)
        lost = set(told["acknowledged"]) - {m.id for m in rows}
        assert not lost, f"{len(lost)} of {len(told['acknowledged'])} are lost"
        assert {w.problem: w.measurement.id for w in database.winners()} == best_of(rows)


def test_killed_tuning_goes_on_where_it_was(home: Path) -> None:
    """The command itself, killed at random moments; then it runs to its end."""
    rng, before = random.Random(3), 0
    for _ in range(5):
        command = [sys.executable, "-m", "elsa_tune.shell.cli", "--device", "cpu", "--problem", SMALL, "--budget", "8"]
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        time.sleep(rng.uniform(1.0, 5.0))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if places.database().exists():
            assert repair.verify().damaged == 0
            with Database.for_reading(places.database()) as database:
                assert len(database) >= before
                before = len(database)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with Database.for_reading(places.database()) as database:
        assert len(database) > before and database.winners()


def test_flipped_bits_and_cut_files(tmp_path: Path) -> None:
    """What is damaged is set aside and reported; everything else is kept; nothing is believed that was not recorded."""
    rng, path = random.Random(11), tmp_path / "measurements.db"
    rows = {m.id: m for m in map(made, range(400))}
    with Database.for_writing(path) as database:
        for m in rows.values():
            database._insert([(m, True)])
    whole = path.read_bytes()
    outcomes: Counter[str] = Counter()
    for turn in range(FLIPS + 10):
        for old in tmp_path.glob("measurements.db*"):
            old.unlink()
        broken = bytearray(whole)
        if turn < FLIPS:
            broken[rng.randrange(len(broken))] ^= 1 << rng.randrange(8)
        else:
            broken = broken[: rng.randrange(len(broken))]
        path.write_bytes(broken)
        try:  # who only reads never sees a winner that was not recorded
            with Database.for_reading(path) as database:
                assert {w.measurement.id for w in database.winners()} <= rows.keys()
        except (DatabaseUnusable, sqlite3.DatabaseError):
            pass
        health = repair.verify(path)
        with Database.for_reading(path) as database:
            kept = list(database)
            assert len(kept) == health.sound
            assert all(rows.get(m.id) == m for m in kept), "something is believed that was never recorded"
            assert {w.problem: w.measurement.id for w in database.winners()} == best_of(kept)
        lost = len(rows) - len(kept)
        if lost or health.damaged or not health.whole:
            assert health.aside, "what was damaged is gone"
        outcomes["whole" if not lost else "few lost" if lost <= 40 else "many lost" if turn < FLIPS else "cut"] += 1
    assert outcomes["many lost"] <= FLIPS // 10, outcomes
    assert outcomes["few lost"] > 10, outcomes


def test_a_full_disk(tmp_path: Path) -> None:
    """Writing stops with one error; what was acknowledged is there, and goes on when there is room again."""
    program = f"""
import resource, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from victim import made
from elsa_tune.remember.database import Database
from elsa_tune.errors import DatabaseUnusable, FolderTaken
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with Database.for_writing(Path({str(tmp_path / "measurements.db")!r})) as database:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))
    try:
        for number in range(10_000):
            database.record(made(number))
            print(made(number).id, flush=True)
    except DatabaseUnusable as error:
        print("refused:", error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    database.record(made(20_000))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *told, refused = done.stdout.splitlines()
    assert refused.startswith("refused:") and "free some space" in refused and len(told) > 20
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    with Database.for_reading(tmp_path / "measurements.db") as database:
        assert {m.id for m in database} == {*told, made(20_000).id} and not database.damaged()


def test_forty_readers_beside_a_writer(home: Path) -> None:
    recorded: list[str] = []
    troubles: list[str] = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            known = list(recorded)
            try:
                with Database.for_reading(places.database()) as database:
                    missing = set(known) - {m.id for m in database}
                    if missing:
                        troubles.append(f"{len(missing)} acknowledged measurements are not seen")
                    database.winners(True, [DEVICE])
            except Exception as error:
                troubles.append(f"{type(error).__name__}: {error}")

    with Database.for_writing() as database:
        readers = [threading.Thread(target=read) for _ in range(READERS)]
        for reader in readers:
            reader.start()
        for number in range(60):
            database.record(made(number))
            recorded.append(made(number).id)
        done.set()
        for reader in readers:
            reader.join()
    assert not troubles, troubles[:3]


@pytest.mark.slow
def test_forty_processes_read_during_a_tune(home: Path) -> None:
    """No reading fails, and nobody sees less than before."""
    program = f"""
import os, sys, time
from pathlib import Path
from elsa_tune.remember.database import Database
path, done = Path({str(places.database())!r}), Path({str(home / "done")!r})
for number in range({READERS}):
    if not os.fork():
        seen = set()
        while not done.exists():
            if path.exists():
                with Database.for_reading(path) as database:
                    now = {{m.id for m in database}}
                    database.winners(True)
                if seen - now:
                    os._exit(3)
                seen = now
            time.sleep(0.05)
        os._exit(0 if seen else 4)
statuses = [os.waitstatus_to_exitcode(os.wait()[1]) for _ in range({READERS})]
print(*statuses)
"""
    with Database.for_writing():
        pass
    readers = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    report = tuning.tune([SMALL], device="cpu", budget=15)
    time.sleep(0.5)
    (home / "done").touch()
    out, _ = readers.communicate(timeout=60)
    assert report.complete and out.split() == ["0"] * READERS


def test_a_clock_that_jumps(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last measurement is the newest, whatever the clock said."""
    times = iter([2e9, 1.7e9, 1.8e9, 0.0])
    monkeypatch.setattr(databases.time, "time", lambda: next(times))
    seen = []
    for _ in range(2):
        with Database.for_writing() as database:
            for _ in range(2):
                seen.append(database.now())
                database.record(
                    Measurement(
                        device=DEVICE, problem=SMALL, variant="sdpa.math", role="rival", status="ok", created=seen[-1]
                    )
                )
    assert seen == sorted(set(seen))


def test_a_frozen_image_serves_another_user(tmp_path: Path) -> None:
    """A home tuned by the administrator, read-only, used by somebody who may write nowhere."""
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody else")
    home = tmp_path / "image"
    environment = {**os.environ, "ELSA_TUNE_HOME": str(home)}
    subprocess.run(
        [sys.executable, "-m", "elsa_tune.shell.cli", "--device", "cpu", "--problem", SMALL, "--budget", "8"],
        env=environment, check=True, capture_output=True,
    )  # fmt: skip
    for folder in [home, *home.parents]:
        if str(folder).startswith(str(tmp_path.parents[2])) and str(folder) != "/tmp":
            folder.chmod(0o755)
    for path in home.rglob("*"):
        path.chmod(0o555 if path.is_dir() or path.suffix == ".so" else 0o444)
    for tail in ("-wal", "-shm"):
        places_of = home / f"measurements.db{tail}"
        places_of.unlink(missing_ok=True)
    home.chmod(0o555)
    program = f"""
import os, sys, torch, elsa_tune
from elsa_tune.dispatch import attention as dispatch
from elsa_tune.dispatch import serving
from elsa_tune.tuning import tune, race, worker
from elsa_tune.prove import check
from elsa_tune.generate import cpp, sdpa, cuda, triton
import archspec.cpu, threadpoolctl
archspec.cpu.TARGETS, serving.of_tensor("cpu", None), cpp._pool.openmp()
os.setgid(65534); os.setuid(65534)
q = torch.randn(1, 2, 96, 16)
out = elsa_tune.attention(q, q, q)
from elsa_tune.problem import Problem
choice = serving.explain(Problem.parse({SMALL!r}), serving.of_tensor("cpu", None))
assert choice.rung == "exact" and choice.winner.layer == "own", choice
assert choice.by_sdpa or serving.table[serving.entry_of(q, q, q, False, False)].call
assert torch.allclose(out, torch.nn.functional.scaled_dot_product_attention(q, q, q), atol=1e-5)
"""
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    home.chmod(0o755)
    assert done.returncode == 0, done.stderr


def test_others_may_not_change_ones_own(home: Path) -> None:
    with Database.for_writing() as database:
        database.record(made(1))
    places.database().chmod(0o666)
    (own,) = (layer for layer in layers.layers() if layer.name == "own")
    assert own.database is None and "chmod go-w" in own.problem
    with Database.for_writing() as database:  # whoever tunes here mends it
        assert len(database) == 1
    assert not places.database().stat().st_mode & 0o022
    moved = home / "elsewhere.db"
    places.database().rename(moved)
    places.database().symlink_to(moved)
    assert "link" in next(layer for layer in layers.layers() if layer.name == "own").problem


def test_a_file_set_aside_beside_a_writer(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who was writing to what another process found damaged goes on in the new file, and nothing stays behind in the old."""
    with Database.for_writing() as writer:
        writer.record(made(0))
        before = writer.installation
        with monkeypatch.context() as patch:
            patch.setattr(Database, "damaged", lambda self: [1])
            assert repair.verify().aside
        writer.record(made(1))
        writer.note("name", "value")
        writer.add(map(made, range(2, 5)))
        assert writer.installation != before
    with Database.for_reading(places.database()) as database:
        assert sorted(m.id for m in database) == sorted(made(n).id for n in range(5))
        assert database.about("name") == "value"


def test_export_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out.jsonl"
    lines.write([made(1)], target)
    before = target.read_bytes()

    def fail(self: Path, data: bytes) -> int:
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(FolderTaken, match="no space left"):
        lines.write(map(made, range(3)), target)
    assert target.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["out.jsonl"]


def test_two_versions_on_one_database(home: Path) -> None:
    """An older program that is still running is refused, not ignored; rows of a newer search space are passed over."""
    with Database.for_writing() as database:
        database.record(made(29))
        newer = "cpp.serial.avx512.l16.q3.k8.v8.n64.quantum"
        database.record(
            replace(made(59), problem=made(29).problem, variant=newer, ratio=9.0, ratio_low=8.9, ratio_high=9.1)
        )
        older = sqlite3.connect(places.database())
        with pytest.raises(sqlite3.OperationalError, match="view"):
            older.execute("INSERT INTO measurements (problem) VALUES ('lost')")
        older.close()
        assert [m.variant for m in database.winners()] == [newer]
    choice = serving.explain(Problem.parse(made(29).problem), Device.parse(DEVICE))
    assert str(choice.variant) == made(29).variant, "what this version understands still wins"
