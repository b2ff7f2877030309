"""Many workers, one study: nobody repeats another's trial, and nothing is lost with a worker or the server."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from click.testing import CliRunner
from optuna.trial import TrialState
from postgres import Cluster, programs
from rehearsal import RECORDED, Rehearsal

from elsa_tune.device import Device
from elsa_tune.errors import FleetUnreachable
from elsa_tune.problem import Problem
from elsa_tune.remember.database import Database
from elsa_tune.shell import cli
from elsa_tune.tuning import fleet
from elsa_tune.tuning import tune as tuning

PROBLEM = min(RECORDED, key=lambda name: len(RECORDED[name]))
DEVICE = Device("cpu", "recorded", "zen5", 2)
_numbers = itertools.count()
SMALL = "fp32.d16@b1.h2.q96.k96"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    if programs() is None:
        pytest.skip("no PostgreSQL server is installed; apt install postgresql")
    with tempfile.TemporaryDirectory() as folder:  # not pytest's, which nobody else may enter
        server = Cluster(Path(folder) / "cluster")
        yield server
        server.stop()


@pytest.fixture(params=[pytest.param("journal", marks=pytest.mark.slow), "postgresql"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A storage of each kind, with no study of this test in it."""
    if request.param == "journal":
        return f"journal:{tmp_path / 'fleet.log'}"
    server: Cluster = request.getfixturevalue("cluster")
    return server.empty(f"test{next(_numbers)}")


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "HEARTBEAT", 1)
    monkeypatch.setattr(fleet, "GRACE", 3)


class Workers:
    """Processes that tune one recorded problem together; they begin at the same moment."""

    def __init__(self, storage: str, count: int, seconds: float) -> None:
        program = str(Path(__file__).parent / "rehearsal.py")
        self.processes = [
            subprocess.Popen(
                [sys.executable, program, storage, f"worker{i}", PROBLEM, str(seconds), str(i)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )
            for i in range(count)
        ]  # fmt: skip
        for process in self.processes:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()

    def tried(self, index: int) -> list[str]:
        """What a worker tried, once it has ended."""
        out, _ = self.processes[index].communicate(timeout=120)
        return [json.loads(line)[1] for line in out.splitlines() if line.startswith("[")]


@pytest.mark.slow
def test_workers_never_repeat_each_other_and_try_everything(storage: str) -> None:
    workers = Workers(storage, 3, 0.005)
    tried = [workers.tried(i) for i in range(3)]
    everything = [name for each in tried for name in each]
    assert len(everything) == len(set(everything)) and set(everything) == set(RECORDED[PROBLEM])
    assert all(len(each) > len(everything) / 10 for each in tried), "the work is shared"
    shown = CliRunner().invoke(cli.main, ["fleet", "--storage", storage])
    assert shown.exit_code == 0 and all(f"worker{i}" in shown.output for i in range(3)) and str(DEVICE) in shown.output
    assert {m.worker: m.trials for m in fleet.members(storage)} == {f"worker{i}": len(tried[i]) for i in range(3)}


def test_what_a_killed_worker_held_is_tried_by_others(storage: str) -> None:
    rehearsal, problem = Rehearsal(PROBLEM), Problem.parse(PROBLEM)
    victim = Workers(storage, 1, 1000.0)  # it holds its first claim for ever
    time.sleep(1.5)
    victim.processes[0].send_signal(signal.SIGKILL)
    victim.processes[0].wait()
    with fleet.Fleet(storage, "survivor", DEVICE) as mine:
        search = rehearsal.search(join=partial(mine.join, problem))
        tried: list[str] = []
        deadline = time.monotonic() + 60
        while len(tried) < len(rehearsal.ratios) and time.monotonic() < deadline:
            for variant in search.ask(4):
                tried.append(str(variant))
                search.tell(variant, rehearsal.ratios[str(variant)])
            time.sleep(0.02)
        assert sorted(tried) == sorted(rehearsal.ratios)


def test_a_variant_that_takes_workers_down_is_given_up(tmp_path: Path) -> None:
    storage, rehearsal, problem = f"journal:{tmp_path / 'fleet.log'}", Rehearsal(PROBLEM), Problem.parse(PROBLEM)
    name = next(iter(rehearsal.ratios))
    for attempt in range(fleet.MOST_ATTEMPTS + 1):
        with fleet.Fleet(storage, f"worker{attempt}", DEVICE) as mine:
            search = rehearsal.search(join=partial(mine.join, problem), seed=attempt)
            search.enqueue([rehearsal.variants[name]])
            asked = [str(v) for v in search.ask(1)]
            assert (asked == [name]) == (attempt < fleet.MOST_ATTEMPTS)  # leaving without a result is a failed attempt


def test_the_server_may_go_away_for_a_while(cluster: Cluster) -> None:
    rehearsal, problem, url = Rehearsal(PROBLEM), Problem.parse(PROBLEM), cluster.empty("outage")
    with fleet.Fleet(url, "patient", Device("cpu", "outage", "zen5", 2)) as mine:
        search = rehearsal.search(join=partial(mine.join, problem))
        first = search.ask(2)
        cluster.stop()
        back = threading.Timer(4.0, cluster.start)
        back.start()
        for variant in first:
            search.tell(variant, rehearsal.ratios[str(variant)])
        second = search.ask(2)
        back.join()
        assert len({str(v) for v in first + second}) == 4
    with fleet.Fleet(url, "another", Device("cpu", "outage", "zen5", 2)) as mine:
        heard = rehearsal.search(join=partial(mine.join, problem))
        heard.ask(1)
        assert heard.heard == 2, "results told during the outage arrived"


def test_a_storage_that_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "ATTEMPTS", 1)
    with pytest.raises(FleetUnreachable, match="run-a-fleet") as failure:
        fleet.open_storage("postgresql+psycopg://elsa:secret@127.0.0.1:1/none")
    assert "secret" not in str(failure.value)
    shown = CliRunner().invoke(cli.main, ["fleet", "--storage", "nonsense://"])
    assert shown.exit_code == 2 and "storage" in shown.output


def test_two_machines_tune_one_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, storage: str) -> None:
    """The whole command's function, twice, with homes of their own: the second goes on where the first ended."""
    names: list[str] = []
    for machine in ("one", "two"):
        monkeypatch.setenv("ELSA_TUNE_HOME", str(tmp_path / machine))
        report = tuning.tune([SMALL], device="cpu", budget=30, storage=storage)
        assert report.complete
        with Database.for_reading(tmp_path / machine / "measurements.db") as database:
            names.append(database.installation)
            assert {m.provenance["installation"] for m in database} == {names[-1]}
            measured = {m.variant for m in database}
        told = [trial for trial in finished(storage) if trial["worker"] == names[-1]]
        assert len(told) >= 2 and {trial["variant"] for trial in told} <= measured
    variants = [trial["variant"] for trial in finished(storage)]
    assert len(variants) == len(set(variants)), "no trial is repeated"
    assert names[0] != names[1] and {m.worker for m in fleet.members(storage)} == set(names)


def finished(url: str) -> list[dict[str, str]]:
    """The worker and the variant of every finished trial of a storage."""
    storage = fleet.open_storage(url)
    studies = [study._study_id for study in storage.get_all_studies()]
    complete = (TrialState.COMPLETE,)
    return [trial.user_attrs for study in studies for trial in storage.get_all_trials(study, states=complete)]
