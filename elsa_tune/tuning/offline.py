"""Ranks variants for a GPU that is not here: compiler reports, occupancy and instruction mix in place of a clock.

What it predicts is never a measurement: it orders candidates, which the first minutes on the real device try first.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

from elsa_tune import places
from elsa_tune import workload as workloads
from elsa_tune.device import Device, host_cpu
from elsa_tune.errors import BadDevice, CompilerMissing, FolderTaken
from elsa_tune.generate import backends, lawful
from elsa_tune.generate.backends import Built
from elsa_tune.generate.gpu.limits import REGISTERS
from elsa_tune.measurement import Measurement
from elsa_tune.parts import element as elements
from elsa_tune.problem import Problem
from elsa_tune.remember import lines
from elsa_tune.remember.database import Database
from elsa_tune.space import Space
from elsa_tune.tuning.contender import build
from elsa_tune.tuning.search import Search
from elsa_tune.tuning.trial import BUILD_SECONDS
from elsa_tune.tuning.worker import Worker, WorkerFailed
from elsa_tune.variant import Variant

MANIFEST = "manifest.jsonl"
SHORTLIST = 5
"""Candidates recorded for each problem."""

ROUND = 6
"""Variants compiled for a problem before the next problem has its turn."""

LAUNCH = 3e-6
"""Seconds between the starts of two dependent kernels."""

_SECOND = 1.0
"""What predictions are compared with: a search wants ratios, and only their order matters."""

_LATENCY = 700
"""Clocks from asking memory for a leaf to having it."""

_SCHEDULERS = 4
_BLOCKS = 32
"""Of a multiprocessor: warps that issue in one clock, blocks that it holds."""


@dataclass(frozen=True, slots=True)
class Target:
    """A typical GPU of an architecture; units are those of search_spaces/targets.toml."""

    device: Device
    ghz: float
    fma: int
    matrix: int
    exp: int
    shared: int
    threads: int
    gbytes: float


@cache
def targets() -> Mapping[str, Target]:
    """Every target that can be ranked for, by its name (``sm_80``, ``gfx942``)."""
    found = {}
    for arch, facts in places.read_toml(places.data("search_spaces") / "targets.toml").items():
        device = Device(
            kind="hip" if arch.startswith("gfx") else "cuda",
            model=re.sub(r"[^a-z0-9]+", "_", facts["name"].lower()),
            arch=arch,
            cores=facts["cores"],
            gib=facts["gib"],
            name=facts["name"],
            memory=facts["gib"] << 30,
            caches=(facts["cache"] << 20,),
        )
        rates = {name: facts[name] for name in ("ghz", "fma", "matrix", "exp", "threads", "gbytes")}
        found[arch] = Target(device=device, shared=facts["shared"] << 10, **rates)
    return found


def target(text: str) -> Target:
    """The target called ``text``. Raises BadDevice."""
    if text not in targets():
        raise BadDevice(f"device {text!r} cannot be ranked for offline; use one of {', '.join(targets())}")
    return targets()[text]


def occupancy(resources: Mapping[str, int], goal: Target) -> int:
    """Blocks that one multiprocessor holds at a time; 0 if not even one fits."""
    threads = resources["warps"] * goal.device.warp
    registers = -(-max(resources["registers"], 16) // 8) * 8 * threads
    limits = [REGISTERS * goal.device.warp // 32 // registers, goal.threads // threads, _BLOCKS]
    if resources["shared"]:
        limits.append(goal.shared // (resources["shared"] + 1024))
    return min(limits)


def predict(variant: Variant, problem: Problem, resources: Mapping[str, int], goal: Target) -> float | None:
    """Predicted seconds of a call, for ordering only; None if the kernel cannot be resident.

    The clocks of one iteration of the hottest loop are those of its scarcest unit: issue slots, multiply-adds, special
    functions, shared memory, or the matrix unit; where too few blocks are resident to hide memory's latency, that.
    Memory traffic is a limit of its own.
    """
    resident = occupancy(resources, goal) if "registers" in resources else 0  # a compiler that tells nothing
    work = backends.get(variant.backend).work(variant, problem, resources) if resident else None
    if work is None:
        return None
    warps, iteration = resources["warps"], work.iteration
    backward = problem.direction == "backward"
    rows = problem.q_len * (1 if backward else problem.group)
    pairs = problem.batch * (problem.heads if backward else problem.kv_heads)
    tiles = pairs * -(-rows // work.block_m) * work.splits
    seen = problem.seen_pairs / problem.q_len / work.splits
    iterations = max(1.0, seen / work.step)
    threads = warps * goal.device.warp
    products = work.block_m * work.step * (problem.head_dim + problem.value_dim) * (2.5 if backward else 1.0)
    on_matrix = iteration["loop_matrix"] and goal.matrix
    clocks = max(
        iteration["loop_all"] * warps / _SCHEDULERS,
        iteration["loop_fma"] * threads / goal.fma,
        iteration["loop_exp"] * threads / goal.exp,
        iteration["wavefronts"] * warps,
        products * work.product / goal.matrix if on_matrix else 0,
    )
    latency = _LATENCY / max(1, work.stages)
    queue = -(-tiles // goal.device.cores)  # tiles that one multiprocessor computes, ``resident`` of them at a time
    busy = iterations * max(queue * clocks, -(-queue // resident) * (clocks + latency)) / (goal.ghz * 1e9)
    width = elements.get(problem.dtype).bytes
    again = (
        tiles * iterations * work.step * (problem.head_dim + problem.value_dim) * width
    )  # read by tiles, mostly from cache
    states = 8 * pairs * rows * (problem.value_dim + 2) * work.splits if work.splits > 1 else 0
    moved = max((problem.bytes + states) / goal.gbytes, again / (4 * goal.gbytes)) / 1e9
    return max(busy, moved) + LAUNCH * work.launches


@dataclass(frozen=True, slots=True)
class Candidate:
    """A variant that was compiled but not measured."""

    problem: Problem
    variant: Variant
    built: Built
    predicted: float


@dataclass
class Ranking:
    """One problem being ranked by the searches of the backends that serve it: what was compiled, and how many variants failed
    to or have a flaw."""

    problem: Problem
    searches: list[Search]
    candidates: list[Candidate] = field(default_factory=list)
    refused: int = 0
    exhausted: bool = False

    @property
    def best(self) -> list[Candidate]:
        """The shortlist, fastest predicted first."""
        return sorted(self.candidates, key=lambda c: (c.predicted, str(c.variant)))[:SHORTLIST]


def rank(
    device: str,
    problems: Sequence[Problem | str] | None = None,
    *,
    workload: str = "default",
    budget: float = 180.0,
    seed: int = 0,
    watch: Callable[[str], None] = lambda doing: None,
) -> list[Ranking]:
    """Compile variants for a target that is not here, and record the most promising as candidates, unmeasured.

    ``device`` is a target such as ``sm_80`` or ``gfx942``; the rest is as for ``tune``. Raises BadDevice, BadProblem,
    BadWorkload, DatabaseUnusable, CompilerMissing.
    """
    goal = target(device)
    here = goal.device
    given = [p if isinstance(p, Problem) else Problem.parse(p) for p in problems or workloads.read(workload, here)]
    deadline = time.monotonic() + budget
    rankings = [Ranking(problem, _searches(problem, here, seed)) for problem in dict.fromkeys(given)]
    rankings = [ranking for ranking in rankings if ranking.searches]
    with Database.for_writing() as database, Worker(count=host_cpu().cores) as builders:
        while time.monotonic() < deadline and not all(r.exhausted for r in rankings):
            for ranking in rankings:
                watch(f"{ranking.problem}: {len(ranking.candidates)} compiled, {ranking.refused} refused")
                _compile(ranking, goal, builders)
                if time.monotonic() > deadline:
                    break
        for ranking in rankings:
            _record(database, ranking, here)
    return rankings


def _searches(problem: Problem, device: Device, seed: int) -> list[Search]:
    """The searches that tune real devices, asked here for what the model likes. Raises CompilerMissing if no backend that
    could serve the problem has its compiler here."""
    found, missing = [], None
    for backend in backends.candidates():
        if backends.get(backend).refusal(problem, device):
            continue
        space = Space.read(backend)
        name = partial(backends.get(backend).digest, problem=problem, device=device)
        starts = lawful.starts(space, problem, device)
        try:
            for variant in starts[:1]:
                name(variant)  # needs the compiler's version
        except CompilerMissing as error:
            missing = error
            continue
        search = Search(space, partial(lawful.variants, space, problem, device), name, seed=seed)
        search.enqueue(starts)
        found.append(search)
    if missing and not found:
        raise missing
    return found


def _compile(ranking: Ranking, goal: Target, builders: Worker) -> None:
    """Ask for a few variants, compile them side by side, and tell the search what the model says of them."""

    def attempt(variant: Variant) -> Built | None:
        try:
            return builders.run(build, variant, ranking.problem, goal.device, timeout=BUILD_SECONDS)
        except WorkerFailed:
            return None

    asked = {v: search for search in ranking.searches for v in search.ask(ROUND // len(ranking.searches))}
    ranking.exhausted = not asked
    with ThreadPoolExecutor(host_cpu().cores) as pool:
        for variant, built in zip(asked, list(pool.map(attempt, asked)), strict=True):
            sound = built and not built.flaw
            seconds = predict(variant, ranking.problem, built.resources, goal) if built and sound else None
            asked[variant].tell(variant, _SECOND / seconds if seconds else None)
            if built is None or seconds is None:
                ranking.refused += 1
            else:
                ranking.candidates.append(Candidate(ranking.problem, variant, built, seconds))


def hand_over(rankings: Sequence[Ranking], device: str, folder: Path) -> int:
    """Copy the shortlisted kernels and a manifest of them, measurements of status candidate, into a folder. How many kernels.

    Raises FolderTaken, NoRoom.
    """
    with places.written(folder):
        if folder.exists() and any(folder.iterdir()) and not (folder / MANIFEST).is_file():
            raise FolderTaken(f"folder {folder} is not empty and holds no {MANIFEST}; name another with -o")
        kernels = folder / "kernels"
        kernels.mkdir(mode=0o700, parents=True, exist_ok=True)
        made = [c for ranking in rankings for c in ranking.best]
        for path in {c.built.path for c in made if c.built.path}:
            shutil.copytree(path.parent, kernels / path.parent.name, dirs_exist_ok=True)
    with Database.for_reading(places.database()) as database:
        known = database.measurements(status="candidate", device=str(target(device).device))
    spelled = {(str(c.problem), str(c.variant), c.built.digest) for c in made}
    lines.write([m for m in known if (m.problem, m.variant, m.digest) in spelled], folder / MANIFEST)
    return len(made)


def _record(database: Database, ranking: Ranking, device: Device) -> None:
    for place, candidate in enumerate(ranking.best, 1):
        database.record(
            Measurement(
                device=str(device),
                problem=str(ranking.problem),
                variant=str(candidate.variant),
                status="candidate",
                reason=f"not measured; place {place} of {len(ranking.candidates)} compiled for {device.arch}",
                digest=candidate.built.digest,
                resources=dict(candidate.built.resources),
                provenance=backends.get(candidate.variant.backend).toolchain(device),
                created=database.now(),
            )
        )
