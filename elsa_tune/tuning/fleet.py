"""Many machines, one study: who tries what, kept in Optuna's own storages. The claims that search.py asks for."""

from __future__ import annotations

import math
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from elsa_tune.device import Device
from elsa_tune.errors import FleetUnreachable
from elsa_tune.generate import render
from elsa_tune.problem import Problem
from elsa_tune.space import Space
from elsa_tune.variant import Variant

HEARTBEAT, GRACE = 15, 60
"""Seconds between signs of life, and without one until a worker's trials are given to others."""

PATIENCE = 600.0
"""Seconds that a worker waits for a storage that does not answer."""

MOST_ATTEMPTS = 3
"""Workers that a variant may take down before nobody tries it again."""

ATTEMPTS = 10
"""To find the tables of a database that others are making."""

WORKERS = "elsa-tune workers"
"""The study that holds no trials, only who is there."""

T = TypeVar("T")
Axes = Mapping[str, optuna.distributions.BaseDistribution]


def open_storage(url: str) -> optuna.storages.BaseStorage:
    """The storage of a fleet: a database's URL (``postgresql+psycopg://...``, ``mysql://...``, ``sqlite:///...``), or
    ``journal:`` and a file in a folder that every machine sees. Raises FleetUnreachable."""
    try:
        if url.startswith("journal:"):
            path = Path(url.removeprefix("journal:")).expanduser()
            path.parent.mkdir(parents=True, exist_ok=True)
            return JournalStorage(JournalFileBackend(str(path)))
        return _open_database(url)
    except Exception as error:  # each database has errors of its own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FleetUnreachable(
            f"storage {_without_password(url)}: {reason}; start it (docs/how-to/run-a-fleet.md), or pip install 'elsa-tune[fleet]'"
        ) from error


def _open_database(url: str) -> optuna.storages.BaseStorage:
    """A database, its tables made if they are not there: of several first workers one makes them, the others try again."""
    for attempt in range(ATTEMPTS):
        try:
            return optuna.storages.RDBStorage(
                url, heartbeat_interval=HEARTBEAT, grace_period=GRACE, engine_kwargs={"pool_pre_ping": True}
            )
        except Exception as error:
            if attempt + 1 == ATTEMPTS or not ("exist" in str(error) or "duplicate" in str(error)):
                raise
            time.sleep(random.uniform(0.2, 1.0))
    raise AssertionError("the last attempt raises")


def _without_password(url: str) -> str:
    scheme, apart, rest = url.partition("://")
    return f"{scheme}{apart}{rest.rpartition('@')[2]}"


class Fleet:
    """This worker's place in a fleet: it shows signs of life for what it has claimed, until closed.

    ``worker`` is the random name of its database; it says nothing of user or host.
    """

    def __init__(self, url: str, worker: str, device: Device) -> None:
        self._closed = threading.Event()
        self._storage = open_storage(url)
        self.worker, self.device = worker, device
        self.running: dict[int, str] = {}  # trial -> variant
        self._signs: dict[str, tuple[object, float]] = {}  # worker -> its last sign, and when it was first seen here
        self._count = 0
        self.staff = self.patiently(lambda: self.study(WORKERS))
        self._show()
        self._thread = threading.Thread(target=self._live, name="elsa-tune-heartbeat", daemon=True)
        self._thread.start()

    def study(self, name: str) -> optuna.Study:
        """A shared study, new or old."""
        return optuna.create_study(storage=self._storage, study_name=name, direction="maximize", load_if_exists=True)

    def join(self, problem: Problem, space: Space, axes: Axes) -> Board:
        """The study of a problem on devices like this one, among workers whose version renders the same code."""
        here = self.device
        model = f"{here.kind}:{here.model}-{here.arch}-c{here.cores}" + (f"-g{here.gib}" if here.gib else "")
        version = f"{space.digest}-{render.version(space.backend)}"
        return Board(self, f"{model} {problem} {space.backend} {version}", axes)

    def patiently(self, operation: Callable[[], T]) -> T:
        """What ``operation`` returns, tried again while the storage does not answer. Raises FleetUnreachable."""
        deadline, wait = time.monotonic() + PATIENCE, 0.2
        while True:
            try:
                return operation()
            except (optuna.exceptions.UpdateFinishedTrialError, KeyError):
                raise
            except Exception as error:  # each database has errors of its own
                if time.monotonic() > deadline:
                    raise FleetUnreachable(
                        f"the fleet's storage has not answered for {PATIENCE:.0f} s ({type(error).__name__}); "
                        "what was measured is kept here: start it and run again"
                    ) from error
                time.sleep(wait)
                wait = min(5.0, 1.5 * wait)

    def _show(self) -> None:
        self._count += 1
        sign = {"device": str(self.device), "seen": round(time.time(), 1), "sign": self._count}
        self.staff.set_user_attr(self.worker, sign)
        for trial in list(self.running):
            if isinstance(self._storage, optuna.storages.RDBStorage):
                self._storage.record_heartbeat(trial)

    def _live(self) -> None:
        while not self._closed.wait(HEARTBEAT):
            with suppress(Exception):  # the storage is away: the next sign may reach it
                self._show()

    def silent(self) -> set[str]:
        """Workers that have shown no sign of life for GRACE seconds of this machine's own clock."""
        now, found = time.monotonic(), set()
        for worker, sign in self.staff.user_attrs.items():
            known, since = self._signs.get(worker, (None, now))
            if known != sign:
                self._signs[worker] = (sign, now)
            elif now - since > GRACE:
                found.add(worker)
        return found - {self.worker}

    def give_up(self, study: optuna.Study) -> None:
        """Fail the trials of workers that are gone, so that others try them."""
        optuna.storages.fail_stale_trials(study)
        gone = self.silent()
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if trial.user_attrs.get("worker") in gone:
                with suppress(optuna.exceptions.UpdateFinishedTrialError, KeyError):
                    self._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)

    def close(self) -> None:
        """Give back what is claimed and not tried, and stop showing signs of life."""
        self._closed.set()
        for trial in list(self.running):
            with suppress(Exception):  # others find out by themselves
                self._storage.set_trial_state_values(trial, TrialState.FAIL)
        self._thread.join(timeout=5)

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


@dataclass
class News:
    """What happened on a board since it was last read: results, variants that others are trying, and trials that were lost."""

    results: list[tuple[str, float | None]] = field(default_factory=list)
    taken: set[str] = field(default_factory=set)
    lost: list[str] = field(default_factory=list)


class Board:
    """One shared study of one problem and backend: variants are claimed before they are tried, and no two workers hold one."""

    def __init__(self, fleet: Fleet, name: str, axes: Axes) -> None:
        self._fleet, self._axes = fleet, dict(axes)
        self._study = fleet.patiently(lambda: fleet.study(name))
        self._read: set[int] = set()
        self._checked = -math.inf

    def news(self) -> News:
        """Results that were not told before; who tries what; what nobody tries any more. Raises FleetUnreachable."""
        return self._fleet.patiently(self._news)

    def _news(self) -> News:
        if time.monotonic() - self._checked > HEARTBEAT:
            self._fleet.give_up(self._study)
            self._checked = time.monotonic()
        found, failures = News(), Counter[str]()
        done: set[str] = set()
        for trial in self._study.get_trials(deepcopy=False):
            spelling = trial.user_attrs.get("variant")
            if not isinstance(spelling, str):
                continue
            if trial.state == TrialState.COMPLETE:
                done.add(spelling)
                if trial.number not in self._read:
                    self._read.add(trial.number)
                    found.results.append((spelling, _ratio(trial.user_attrs.get("ratio"))))
            elif trial.state == TrialState.RUNNING:
                found.taken.add(spelling)
            elif trial.state == TrialState.FAIL:
                failures[spelling] += 1
        lost = {s: n for s, n in failures.items() if s not in done and s not in found.taken}
        found.lost = [s for s, n in lost.items() if n < MOST_ATTEMPTS]
        found.taken |= {s for s, n in lost.items() if n >= MOST_ATTEMPTS}
        return found

    def claim(self, variant: Variant) -> bool:
        """Whether this worker, and no other, is to try a variant now. Raises FleetUnreachable.

        A claim is a running trial; of several claims of one variant the first counts, which every worker sees alike.
        """
        return self._fleet.patiently(lambda: self._claim(variant))

    def _claim(self, variant: Variant) -> bool:
        storage, spelling = self._fleet._storage, str(variant)
        mine = storage.create_new_trial(self._study._study_id, self._trial(variant, TrialState.RUNNING, None, None))
        self._fleet.running[mine] = spelling
        if isinstance(storage, optuna.storages.RDBStorage):
            storage.record_heartbeat(mine)
        live = (TrialState.RUNNING, TrialState.COMPLETE)
        same = [
            t for t in self._study.get_trials(deepcopy=False, states=live) if t.user_attrs.get("variant") == spelling
        ]
        if min(same, key=lambda t: t.number)._trial_id == mine:
            return True
        del self._fleet.running[mine]
        storage.set_trial_state_values(mine, TrialState.PRUNED)
        return False

    def tell(self, variant: Variant, ratio: float | None, value: float) -> None:
        """Tell everyone a result, claimed or known from before. Raises FleetUnreachable."""
        spelling = str(variant)
        claims = [trial for trial, name in self._fleet.running.items() if name == spelling]

        def write() -> None:
            storage = self._fleet._storage
            for trial in claims:
                with suppress(optuna.exceptions.UpdateFinishedTrialError, KeyError):  # given to others meanwhile
                    storage.set_trial_user_attr(trial, "ratio", ratio)
                    storage.set_trial_state_values(trial, TrialState.COMPLETE, [value])
                    return
            self._study.add_trial(self._trial(variant, TrialState.COMPLETE, ratio, value))

        self._fleet.patiently(write)
        for trial in claims:
            self._fleet.running.pop(trial, None)

    def _trial(self, variant: Variant, state: TrialState, ratio: float | None, value: float | None) -> FrozenTrial:
        return optuna.trial.create_trial(
            state=state, params=dict(variant.values), distributions=self._axes, value=value,
            user_attrs={"variant": str(variant), "worker": self._fleet.worker, "ratio": ratio},
        )  # fmt: skip


def _ratio(x: object) -> float | None:
    """A ratio that a clock can give, or None."""
    return x if isinstance(x, float) and 1e-9 < x < 1e9 else None


# Who is there.


@dataclass(frozen=True, slots=True)
class Member:
    """A worker of a fleet: its device, trials it finished, how many a minute while it worked, seconds since its last sign."""

    worker: str
    device: str
    trials: int
    rate: float
    ago: float


def members(url: str) -> list[Member]:
    """Every worker that a storage has seen. Raises FleetUnreachable."""
    storage = open_storage(url)
    try:
        studies = optuna.get_all_study_names(storage)
        staff = optuna.load_study(storage=storage, study_name=WORKERS).user_attrs if WORKERS in studies else {}
        finished: dict[str, list[float]] = {worker: [] for worker in staff}
        for name in studies:
            for trial in optuna.load_study(storage=storage, study_name=name).get_trials(deepcopy=False):
                worker = trial.user_attrs.get("worker")
                if worker in finished and trial.state == TrialState.COMPLETE and trial.datetime_complete:
                    finished[worker].append(trial.datetime_complete.timestamp())
    except Exception as error:
        raise FleetUnreachable(
            f"storage {_without_password(url)}: {type(error).__name__}; start it and ask again"
        ) from error
    return [
        Member(worker, str(sign["device"]), len(times), _rate(times), max(0.0, time.time() - float(sign["seen"])))
        for worker, sign in sorted(staff.items(), key=lambda one: -float(one[1]["seen"]))
        for times in [finished[worker]]
    ]


def _rate(times: list[float]) -> float:
    """Trials a minute from the first to the last."""
    return 60 * (len(times) - 1) / (max(times) - min(times)) if len(times) > 1 and max(times) > min(times) else 0.0
