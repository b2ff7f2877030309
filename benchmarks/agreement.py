"""Whether fresh runs of elsa-tune name the same winners: several homes, one command, quiet or beside a busy core.

Winners that differ are raced against each other and count as tied within 2 %, or where the race cannot tell them apart by more;
what is the same code is one. Asked too: variants tried a problem, wall time, and problems that one run left to torch though another
gained there.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elsa_tune.device import Device, host_cpu
from elsa_tune.generate import backends
from elsa_tune.problem import Problem
from elsa_tune.remember.winners import Database
from elsa_tune.space import parse
from elsa_tune.tuning import race
from elsa_tune.tuning.contender import Contender
from elsa_tune.tuning.race import Ratio
from elsa_tune.tuning.worker import Worker

ROOT = Path(__file__).resolve().parent.parent
TIED = 1.02
GAIN = 1.05
"""Torch in one run and more than this in another is a contradiction, whatever a race says."""

BUSY = ["nice", "-n", "19", sys.executable, "-c", "while True: pass"]


@dataclass(frozen=True, slots=True)
class Run:
    """One fresh run: wall seconds, problem -> (winner, ratio), problem -> variants tried, and what it said at its end."""

    seconds: float
    winners: dict[str, tuple[str, float]]
    tried: dict[str, int]
    notes: list[str]


@contextmanager
def neighbour(wanted: bool) -> Iterator[None]:
    """A process at the lowest priority that would take one core, if wanted."""
    process = subprocess.Popen(BUSY) if wanted else None
    try:
        yield
    finally:
        if process is not None:
            process.kill()
            process.wait()


def fresh_run(arguments: list[str]) -> Run:
    """``elsa-tune`` in a home that did not exist."""
    with tempfile.TemporaryDirectory(prefix="agreement-") as home:
        environment = {**os.environ, "ELSA_TUNE_HOME": home}
        command = [sys.executable, "-m", "elsa_tune.shell.cli", "--device", "cpu", "--json", *arguments]
        start = time.monotonic()
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        seconds = time.monotonic() - start
        if not done.stdout:
            raise SystemExit(done.stderr)
        told = json.loads(done.stdout)
        won = {o["problem"]: (o["winner"]["variant"], o["winner"]["ratio"]) for o in told["outcomes"] if o["winner"]}
        with Database.for_reading(Path(home) / "measurements.db") as database:
            pairs = {(m.problem, m.variant) for m in database if not m.variant.startswith("sdpa.")}
        tried = {o["problem"]: sum(p == o["problem"] for p, _ in pairs) for o in told["outcomes"]}
        return Run(seconds, won, tried, told["notes"])


def against(problem: Problem, first: str, second: str, device: Device, worker: Worker) -> Ratio:
    """How many times as fast ``second`` is as ``first``, raced in turns."""
    contenders = []
    for spelling in (first, second):
        variant = parse(spelling)
        contenders.append(Contender(variant, backends.get(variant.backend).build(variant, problem, device), device))
    if contenders[0].built.digest == contenders[1].built.digest:
        return Ratio(1.0, 1.0, 1.0)
    raced = worker.run(race.race, problem, contenders, 200, 5.0, timeout=300.0)
    return race.ratio(raced.samples[0], raced.samples[1])


def judged(problem: str, runs: list[Run], device: Device, worker: Worker) -> dict[str, Any]:
    """Winners of one problem, and in how many runs it is the commonest of them or one tied with it."""
    named = [run.winners[problem] for run in runs if problem in run.winners]
    counts = Counter(variant for variant, _ in named)
    commonest = counts.most_common(1)[0][0] if counts else ""
    raced = {v: against(Problem.parse(problem), commonest, v, device, worker) for v in counts if v != commonest}
    tied = {v for v, ratio in raced.items() if ratio.low <= TIED and ratio.high >= 1 / TIED}
    same = sum(n for v, n in counts.items() if v == commonest or v in tied)
    gains = [ratio for variant, ratio in named if not variant.startswith("sdpa.")]
    torch_wins = any(variant.startswith("sdpa.") for variant, _ in named)
    return {
        "problem": problem, "agree": same / len(runs), "winners": dict(counts),
        "raced_against_commonest": {v: [ratio.median, ratio.low, ratio.high] for v, ratio in raced.items()},
        "ratios": [round(ratio, 3) for _, ratio in named], "contradiction": torch_wins and max(gains, default=1.0) > GAIN,
        "tried": [run.tried[problem] for run in runs],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--budget", type=float, default=180.0)
    parser.add_argument("--problem", action="append", default=[], help="instead of the default workload; repeatable")
    parser.add_argument(
        "--busy", action="store_true", help="beside a process at the lowest priority that takes one core"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    arguments = ["--budget", str(options.budget), *(word for p in options.problem for word in ("--problem", p))]
    runs = []
    with neighbour(options.busy):
        for number in range(options.runs):
            runs.append(fresh_run(arguments))
            print(f"run {number + 1}: {runs[-1].seconds:.0f} s; {'; '.join(runs[-1].notes)}", flush=True)
    device, lines = host_cpu(), []
    with tempfile.TemporaryDirectory(prefix="agreement-") as home:
        os.environ["ELSA_TUNE_HOME"] = home
        with Worker() as worker:
            for problem in dict.fromkeys(p for run in runs for p in run.winners):
                lines.append(judged(problem, runs, device, worker))
                print(json.dumps(lines[-1]), flush=True)
    tried = [n for line in lines for n in line["tried"]]
    found = {
        "device": str(device), "name": device.name, "busy": options.busy, "budget": options.budget, "date": time.strftime("%Y-%m-%d"),
        "agree": statistics.mean(line["agree"] for line in lines), "contradictions": sum(line["contradiction"] for line in lines),
        "seconds": [round(run.seconds, 1) for run in runs], "fewest_tried": min(tried), "median_tried": statistics.median(tried),
        "notes": [run.notes for run in runs], "lines": lines,
    }  # fmt: skip
    print(f"agree or tie: {found['agree']:.0%}; contradictions: {found['contradictions']}; variants a problem: at least {min(tried)}, "
          f"median {found['median_tried']:.0f}; longest run {max(found['seconds']):.0f} s of {options.budget:.0f}")  # fmt: skip
    name = f"agreement-{str(device).replace(':', '-', 1)}"
    path = options.out / f"{name}.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**known, "busy" if options.busy else "quiet": found}, indent=1))


if __name__ == "__main__":
    main()
