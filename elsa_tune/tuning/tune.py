"""The whole story: problems and a device in, measured winners out.

incumbent -> ask -> build -> check -> race -> record, again and again -> finals -> winners
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial

from elsa_tune.device import Device, detect, host_cpu
from elsa_tune.errors import BadVariant, CompilerMissing, ElsaTuneError
from elsa_tune.generate import backends
from elsa_tune.measurement import Evidence, Measurement
from elsa_tune.problem import Problem
from elsa_tune.remember.database import Database
from elsa_tune.remember.layers import known_winners, layers, listeners, refresh_all
from elsa_tune.space import Space, parse
from elsa_tune.tuning import drift
from elsa_tune.tuning import workload as workloads
from elsa_tune.tuning.fleet import Fleet
from elsa_tune.tuning.measure import Contender, Worker, WorkerFailed
from elsa_tune.tuning.outcome import Outcome, Report, least_seconds, outcome
from elsa_tune.tuning.search import Search
from elsa_tune.tuning.task import EFFORTS, Effort, Progress, Task
from elsa_tune.tuning.trial import OutOfTime, Trials
from elsa_tune.variant import Variant

BUDGET = 180.0
GPU_TRIALS = 2
"""Trials on a GPU for each that a CPU would be given."""

ENOUGH = 0.95
"""Share of the physical limit that ends a search: what is left is within the noise of the limit itself."""

MORE_FINALS = 2
"""Finals that a problem may have in a run, time allowing, after its first."""

FINAL_SECONDS, FASTEST = 0.6, 0.002
"""What calls that are faster than FASTEST seconds are raced for in a final, whose rounds would be over within a neighbour's breath."""

REFINE_SECONDS = 5.0
"""How long a run looks further when every problem is settled already."""

SIDE_BY_SIDE = 4
"""Variants asked of each backend, built and raced at once; on a CPU one a core, where there are more. On a GPU checks take
longer than building side by side, so more at once would save nothing, and results could not guide the next."""

STARTERS = 2
"""Variants that stand in the final for a backend of which none was tried."""

GRACE, LEAST_GRACE = 0.05, 5.0
"""What a run may last beyond its budget: a share of it, and seconds, before whatever it does is given up."""

HARDLY = 12
"""A problem for which fewer variants were tried was hardly searched, and the run says so."""


def tune(
    problems: Sequence[Problem | str] | None = None,
    *,
    workload: str = "default",
    device: str = "auto",
    budget: float = BUDGET,
    effort: str = "quick",
    seed: int = 0,
    sampler: str = "local",
    exhaustive: bool = False,
    storage: str = "",
    watch: Callable[[Progress], None] = lambda progress: None,
) -> Report:
    """Find the fastest exact kernel for each problem on each device, and record everything that was measured.

    ``problems`` are Problems or their spellings; without them the workload's. ``budget`` is wall seconds, compiling
    included. ``effort`` is quick or full; ``sampler`` local, tpe or random; ``exhaustive`` walks the whole space instead.
    ``storage`` shares the search with every machine of this model that names it (elsa_tune.tuning.fleet.open_storage).
    Raises FleetUnreachable, BadProblem, BadWorkload, BadDevice, DatabaseUnusable. May be stopped at any moment: what is recorded stays.
    """
    if effort not in EFFORTS:
        raise ElsaTuneError(f"effort {effort!r} is unknown; use one of {', '.join(EFFORTS)}")
    start, notes, outcomes = time.monotonic(), list[str](), list[Outcome]()
    devices = detect(device)
    notes += refresh_all()
    with Database.for_writing() as database:
        for number, here in enumerate(devices):
            given = [Problem.parse(p) if isinstance(p, str) else p for p in problems or workloads.load(workload, here)]
            wanted = list(dict.fromkeys(given))
            share = (budget - (time.monotonic() - start)) / (len(devices) - number)
            with ExitStack() as stack:
                fleet = stack.enter_context(Fleet(storage, database.installation, here)) if storage else None
                look = partial(_searches, device=here, notes=notes, sampler=sampler, seed=seed, exhaustive=exhaustive)
                tasks = [Task(p, look(p, fleet=fleet)) for p in wanted]
                stack.enter_context(_running(database, here, effort, share, watch, notes, tasks)).tune()
            outcomes += [outcome(database, p, here) for p in wanted]
    for changed in listeners:
        changed()
    return Report(outcomes, time.monotonic() - start, notes)


def race(
    device: str = "auto", *, budget: float = BUDGET, watch: Callable[[Progress], None] = lambda progress: None
) -> Report:
    """Time what was imported for these devices, or is disputed, against this machine's best and torch; record the results.

    Raises BadDevice, DatabaseUnusable.
    """
    start, notes, outcomes = time.monotonic(), list[str](), list[Outcome]()
    with Database.for_writing() as database:
        for here in detect(device):
            contested = drift.contested(database, here)
            tasks = [Task(p, _searches(p, here, notes)) for p in map(Problem.parse, contested)]
            left = budget - (time.monotonic() - start)
            with _running(database, here, "quick", left, watch, notes, tasks) as run:
                run.race(contested)
            outcomes += [outcome(database, task.problem, here) for task in tasks]
    for changed in listeners:
        changed()
    return Report(outcomes, time.monotonic() - start, notes)


@contextmanager
def _running(
    database: Database, device: Device, effort: str, seconds: float, watch: Callable[[Progress], None],
    notes: list[str], tasks: list[Task],
) -> Iterator[_Run]:  # fmt: skip
    """One device's run, with the processes that build and time for it."""
    with ExitStack() as stack:
        worker = stack.enter_context(Worker(memory=0 if device.is_gpu else None))
        builders = stack.enter_context(Worker(count=host_cpu().cores)) if device.is_gpu else None
        trials = Trials(database, worker, device, builders=builders, thorough=effort == "full")
        yield _Run(trials, EFFORTS[effort], time.monotonic() + seconds, seconds, watch, notes, tasks)


def _searches(
    problem: Problem, device: Device, notes: list[str], sampler: str = "local", seed: int = 0, exhaustive: bool = False,
    fleet: Fleet | None = None,
) -> list[Search]:  # fmt: skip
    """A search for every backend that generates code and can serve the problem here."""
    found = []
    for name in backends.names():
        backend, space = backends.get(name), Space.load(name)
        try:
            if not backend.generated or backend.refusal(problem, device):
                continue
            backend.toolchain(device)
        except CompilerMissing as error:
            if str(error) not in notes:
                notes.append(str(error))
            continue
        search = Search(
            space,
            partial(space.variants, problem, device),
            partial(_digest, name, problem, device),
            sampler,
            seed,
            exhaustive,
            partial(fleet.join, problem) if fleet else None,
        )
        starts = [space.parse(text) for text in space.start]
        search.enqueue(v for v in starts if space.refusal(v, problem, device) is None)
        found.append(search)
    return found


def _digest(backend: str, problem: Problem, device: Device, variant: Variant) -> str:
    return backends.get(backend).digest(variant, problem, device)


@dataclass
class _Run:
    """One device's tasks until the deadline."""

    trials: Trials
    effort: Effort
    deadline: float
    budget: float
    watch: Callable[[Progress], None]
    notes: list[str]
    tasks: list[Task]

    def __post_init__(self) -> None:
        self.database, self.device = self.trials.database, self.trials.device
        self.trials.recorded = self.recorded
        self.of = {task.problem: task for task in self.tasks}
        self.grace = max(LEAST_GRACE, GRACE * self.budget)

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def show(self, doing: str) -> None:
        self.watch(Progress(self.tasks, doing, self.budget - self.left(), self.budget))

    def recorded(self, problem: Problem, m: Measurement) -> None:
        self.of[problem].note(m)
        self.show(f"{problem}  {m.variant}")

    def tune(self) -> None:
        """Incumbents, then trials where most are missing, then finals; refinement where nothing is missing."""
        self.trials.deadline = self.deadline + self.grace
        self.tasks.sort(key=lambda task: task.problem.flops + 20 * task.problem.bytes)
        with suppress(OutOfTime):
            for task in self.tasks:
                self.recall(task)
            for task in self.tasks:
                self.find_incumbent(task)
            self.trials.find_limits()
            self.look_for_drift()
            if all(task.settled for task in self.tasks):
                self.refine()
                return
            reserve = min(0.4 * self.budget, sum(map(self.final_seconds, self.tasks)))
            self.trials.deadline = self.deadline - 0.5 * reserve
            with suppress(OutOfTime):
                self.search(reserve)
                self.try_late_ones_again(reserve)
            self.trials.deadline = self.deadline + self.grace
            for number, task in enumerate(self.tasks):
                later = sum(map(self.final_seconds, self.tasks[number + 1 :]))
                wanted = self.final_seconds(task)
                self.final(task, max(0.3 * wanted, min(wanted, self.left() - later)))
            self.race_again()
        self.tell()

    def search(self, reserve: float) -> None:
        """Turns, for the problem that most are missing of, until only finals can still be run."""
        while self.left() > reserve and (waiting := [t for t in self.tasks if t.incumbent and t.trials < t.target]):
            self.turn(min(waiting, key=lambda task: task.trials / task.target), reserve)

    def race_again(self) -> None:
        """Finals of the least certain winners again, with the time that is left: all finals of a variant count together."""
        open_to_finals = [t for t in self.tasks if t.incumbent and t.ranked()]
        uncertain = sorted(open_to_finals, key=lambda task: (task.finals > 0, -self.uncertainty(task)))
        for task in uncertain * MORE_FINALS:
            if self.final_seconds(task) < self.left():
                self.final(task, self.final_seconds(task))

    def try_late_ones_again(self, reserve: float) -> None:
        """Kernels that took too long while others used the machine get one more chance."""
        late, self.trials.late = self.trials.late, []
        for problem, variant in late:
            if self.left() > reserve:
                with self.trials.alone():
                    self.try_out(self.of[problem], self.trials.build(problem, [variant]))

    def tell(self) -> None:
        """What this run could not do."""
        wanted = min(HARDLY, self.effort.trials)
        if few := [f"{t.problem} ({t.trials})" for t in self.tasks if t.trials < min(wanted, t.target)]:
            self.notes.append(f"time for fewer than {HARDLY} variants: {', '.join(few)}; a longer --budget tries more")
        if self.trials.waited > GRACE * self.budget:
            self.notes.append(f"waited {self.trials.waited:.0f} s for another elsa-tune that used this machine")
        if busy := [str(task.problem) for task in self.tasks if task.busy and not task.finals]:
            self.notes.append(f"others used this machine; not settled: {', '.join(busy)}; run again when it is quiet")

    def look_for_drift(self) -> None:
        """After a change of software or clock, time a few winners again; if one has moved, all; those that moved are open."""
        peaks = {name: x for name, x in self.trials.limits.items() if name in ("peak_gflops", "peak_fp32")}
        searched = {search.backend for task in self.tasks for search in task.searches}
        versions = {name: text for backend in sorted(searched) for name, text in self.trials.versions(backend).items()}
        if found := drift.changes(self.database, self.device, versions, peaks):
            self.notes.append("; ".join(found))
            known = sorted((t for t in self.tasks if t.incumbent and t.pooled), key=lambda task: task.seconds)
            moved = [task for task in known[: drift.CANARIES] if self.has_moved(task)]
            if moved:
                moved += [task for task in known[drift.CANARIES :] if self.left() > 0 and self.has_moved(task)]
            for task in moved:
                drift.reopen(self.database, self.device, str(task.problem))
                task.trials = task.finals = 0
            timed = len(known) if moved else min(len(known), drift.CANARIES)
            self.notes.append(f"{timed} winners timed again, {len(moved)} have moved and are tuned anew")
            if any(task.busy for task in known[: drift.CANARIES]):
                return  # nobody knows yet: the next run asks again
        if versions and peaks:
            drift.remember(self.database, self.device, versions, peaks)

    def has_moved(self, task: Task) -> bool:
        """Whether a problem's winner, raced again, is not as fast as it was."""
        before = self.winner(task)
        if before is None or before.is_rival:
            return False
        with suppress(BadVariant):  # of a version whose space had other values
            variant = parse(before.variant)
            if self.is_lawful(variant, task.problem):
                self.final(task, min(1.0, self.final_seconds(task)), [variant])
        after = task.latest.get(before.variant)
        if after is None:  # of other code, or it can no longer be built
            return True
        is_new = after.created > before.measurement.created and not after.disturbed
        return is_new and drift.moved(before, after)

    def winner(self, task: Task) -> Evidence | None:
        """What the database says is best here."""
        return next(iter(self.database.winners(True, device=str(self.device), problem=str(task.problem))), None)

    def race(self, contested: dict[str, list[str]]) -> None:
        """Settle what others measured: their variants against this machine's best and torch."""
        self.trials.deadline = self.deadline + self.grace
        with suppress(OutOfTime):
            for number, task in enumerate(self.tasks):
                self.recall(task)
                self.find_incumbent(task)
                spellings = task.ranked()[:1] + contested[str(task.problem)]
                share = self.left() / (len(self.tasks) - number)
                entrants = [v for v in map(parse, dict.fromkeys(spellings)) if self.is_lawful(v, task.problem)]
                if entrants and self.left() > 0:
                    self.final(task, min(share, self.final_seconds(task)), entrants)

    def is_lawful(self, variant: Variant, problem: Problem) -> bool:
        """Whether the laws allow a variant here."""
        return Space.load(variant.backend).refusal(variant, problem, self.device) is None

    def refine(self) -> None:
        """Everything is known: race the least certain winners again for a few seconds."""
        self.deadline = min(self.deadline, time.monotonic() + REFINE_SECONDS)
        for task in sorted(self.tasks, key=self.uncertainty, reverse=True):
            if self.left() > 1 + 25 * task.seconds:
                self.final(task, seconds=0.6)

    def recall(self, task: Task) -> None:
        """Begin from every measurement of this device, and from winners of its kin and of the family's other shapes."""
        era = drift.era(self.database, self.device, str(task.problem))
        for m in self.database.measurements(local=True, device=str(self.device), problem=str(task.problem)):
            if m.provenance.get("era", 0) != era or self.is_of_other_code(task.problem, m):
                self.suggest(task, m.variant)
                continue
            task.note(m)
            if m.no_verdict:
                self.suggest(task, m.variant)
            elif m.variant == m.incumbent and m.seconds and not m.disturbed:
                task.incumbent, task.seconds = self.trials.contender(parse(m.variant), task.problem), m.seconds
            elif m.status == "ok":
                self.suggest(task, m.variant)
        self.pool(task)
        task.target = self.target(task)
        for winner in known_winners(self.device, layers(), family=task.problem.family):
            self.suggest(task, winner.variant)
        for m in self.database.measurements(local=False, problem=str(task.problem), status="ok"):
            if self.device.kinship(Device.parse(m.device)) not in (None, "family"):  # imported: to be tried here
                self.suggest(task, m.variant)
        for m in self.database.measurements(status="candidate", family=task.problem.family):
            if self.device.kinship(Device.parse(m.device)) not in (None, "family"):  # ranked for this architecture
                self.suggest(task, m.variant)

    def pool(self, task: Task) -> None:
        """Learn what all finals of each variant say together."""
        task.pool(self.database.evidence(True, device=str(self.device), problem=str(task.problem)))

    def is_of_other_code(self, problem: Problem, m: Measurement) -> bool:
        """Whether the templates have changed since in what they render for this variant: then it is tried anew."""
        try:
            variant = parse(m.variant)
        except BadVariant:
            return False
        now = backends.get(variant.backend).source(variant, problem)
        return now is not None and m.provenance.get("source", now.digest) != now.digest

    def suggest(self, task: Task, spelling: str) -> None:
        """Enqueue a variant known from elsewhere, if this space still has it and the laws allow it here."""
        try:
            variant = parse(spelling)
        except BadVariant:
            return
        space = Space.load(variant.backend)
        for search in task.searches:
            if variant.backend == search.backend and not space.refusal(variant, task.problem, self.device):
                search.enqueue([variant])

    def find_incumbent(self, task: Task) -> None:
        if task.incumbent is not None:
            return
        self.show(f"{task.problem}  torch's own kernels")
        try:
            with self.trials.alone():
                task.incumbent, task.seconds = self.trials.incumbent(task.problem)
        except WorkerFailed as error:
            self.notes.append(f"{task.problem}: torch's own kernels could not be timed: {error.reason}")
        task.target = self.target(task)

    def target(self, task: Task) -> int:
        """Trials a problem deserves: fewer where one takes long."""
        if not task.searches:
            return 0
        affordable = int(self.effort.seconds / (1.0 + 8 * task.seconds))
        if self.device.is_gpu:  # a trial takes a fraction of a second, and the space has more corners
            affordable, most = GPU_TRIALS * affordable, GPU_TRIALS * self.effort.trials
        else:
            most = self.effort.trials
        return max(self.effort.fewest, min(most, affordable))

    def final_seconds(self, task: Task) -> float:
        """What a final of four contenders takes, checks included: many rounds if a call is fast, a few if it is slow."""
        rounds = 4 * self.final_rounds(task) * max(task.seconds, FASTEST)
        return 0.5 + 4 * task.seconds + min(rounds, max(1.2, 14 * task.seconds))

    def final_rounds(self, task: Task) -> int:
        """Rounds of a final: more of fast calls."""
        return max(self.effort.final_rounds, round(FINAL_SECONDS / (4 * max(task.seconds, FASTEST))))

    def uncertainty(self, task: Task) -> float:
        """Relative width of the winner's interval."""
        winner = self.winner(task)
        if winner is None:
            return float("inf")
        return (winner.ratio_high - winner.ratio_low) / winner.ratio

    def turn(self, task: Task, reserve: float = 0.0) -> None:
        """Ask for a few new variants, build them side by side, then check and time them, for other shapes of the family too.

        A problem whose best variant is ENOUGH of what the measured peaks allow is asked nothing more.
        """
        if self.is_near_the_limit(task):
            return
        self.show(f"{task.problem}  building")
        asked = self.ask(task)
        if not asked:
            task.target = task.trials
            return
        with self.trials.alone():
            built = self.trials.build(task.problem, asked)
            self.try_out(task, built)
            for other in self.tasks:
                if (
                    other is not task
                    and other.problem.family == task.problem.family
                    and self.affords(other, built, reserve)
                ):
                    self.try_out(other, self.taken(other, built))

    def is_near_the_limit(self, task: Task) -> bool:
        """Whether what is left is within the noise of the physical limit itself; then the search of a problem ends."""
        least = least_seconds(task.problem, self.trials.limits)
        searched = task.trials >= min(HARDLY, task.target)
        near = bool(least and searched and task.seconds and least * task.best / task.seconds > ENOUGH)
        if near:
            task.target = task.trials
        return near

    def affords(self, task: Task, built: Sequence[Contender], reserve: float) -> bool:
        """Whether a problem is still open, and there is time to try so many variants on it."""
        if task.incumbent is None or task.trials >= task.target or self.is_near_the_limit(task):
            return False
        return self.left() - reserve > len(built) * (0.2 + 6 * task.seconds)

    def taken(self, task: Task, built: Sequence[Contender]) -> list[Contender]:
        """Which kernels, built for another shape of the family, are lawful and new for this one."""
        lawful = [c.variant for c in built if self.is_lawful(c.variant, task.problem)]
        new = {v for search in task.searches for v in search.take(v for v in lawful if v.backend == search.backend)}
        return [c for c in built if c.variant in new]

    def try_out(self, task: Task, built: Sequence[Contender]) -> None:
        """Check and time kernels on one problem."""
        assert task.incumbent is not None
        if built:
            self.trials.trial(task.problem, task.incumbent, task.seconds, built, task.best)

    def ask(self, task: Task) -> list[Variant]:
        """A few variants of each search, as many together as are still to be tried."""
        few = SIDE_BY_SIDE if self.device.is_gpu else max(SIDE_BY_SIDE, host_cpu().cores)
        asked: list[Variant] = []
        for search in task.searches:
            missing, heard = -(-(task.target - task.trials) // len(task.searches)), search.heard
            asked += search.ask(max(2, min(few, missing)))
            task.trials += search.heard - heard
        return asked

    def final(self, task: Task, seconds: float, entrants: Sequence[Variant] = ()) -> None:
        """Race entrants, or this problem's best variants and the best of the family's other shapes, with many samples."""
        if task.incumbent is None or not task.searches:
            return
        self.show(f"{task.problem}  final")
        with self.trials.alone():
            built = self.trials.build(task.problem, list(entrants or self.finalists(task)))
            usable = [c for c in built if self.trials.usable(task.problem, task.incumbent, task.seconds, c)]
            if not usable:
                return
            try:
                self.trials.final(task.problem, task.incumbent, usable, self.final_rounds(task), seconds)
            except WorkerFailed as error:
                if (note := f"{task.problem}: the final was lost: {error.reason}") not in self.notes:
                    self.notes.append(note)
        self.pool(task)

    def finalists(self, task: Task) -> Iterator[Variant]:
        """The best three of the problem, the best of each other shape of its family that was not tried here, and STARTERS of
        each backend of which nothing was tried."""
        chosen = task.ranked()[:3]
        for other in self.tasks:
            if other is not task and other.problem.family == task.problem.family and other.latest:
                chosen += [best for best in other.ranked()[:1] if best not in task.latest]
        chosen += [str(search.best) for search in task.searches if search.best]  # in a fleet, another's
        lawful = [v for v in map(parse, dict.fromkeys(chosen)) if self.is_lawful(v, task.problem)]
        yield from lawful
        known = {variant.backend for variant in lawful}
        for search in task.searches:
            if search.backend not in known and (not search.told or not known):
                yield from search.ask(STARTERS)
