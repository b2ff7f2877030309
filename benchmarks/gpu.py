"""Everything worth knowing of a GPU in one call of less than eight minutes, losing nothing: elsa-tune's Triton and CUDA C beside
torch's flash, memory-efficient, cuDNN and math kernels and compiled FlexAttention.

Runs from a checkout with PYTHONPATH alone:  PYTHONPATH=. python benchmarks/gpu.py --out gpu-results
(benchmarks/gpu.sh is the whole command where packages are lacking and nothing can be fetched.)

In this order, until the deadline: small checks of every family; a fixed list of variants for each of twelve problems, compiled side
by side, checked against float64 and raced directly against everyone of torch's, eager and, where calls are short, from graphs; one
race twice; a search with the time that remains; compute-sanitizer. Every line is on disk in OUT/lines.jsonl before the next step
begins, measurements are in OUT/home, and what fails costs its own line. Losses are printed like wins. Written at the end:
OUT/<device>.json (what was raced), OUT/<device>.jsonl (winners, for cache/), OUT/<device>.trials.jsonl (every measurement).
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from _gpu_check import check_here, sanitize
from _gpu_lists import PROBLEMS, candidates
from _gpu_log import Log
from _gpu_session import CLOSING, Session, write
from elsa_tune.device import Device, detect, host_cpu
from elsa_tune.remember.winners import Database
from elsa_tune.tuning.run import GRACE, LEAST_GRACE
from elsa_tune.tuning.worker import Worker

SANITIZER = 0.13
"""Share of the time that compute-sanitizer is left."""

LEAST_SEARCH = 30.0
"""Seconds below which no search begins."""


def run(device: Device, problems: Sequence[str], seconds: float, out: Path) -> Log:
    """Every stage until the deadline; each failure costs its own line."""
    log, memory = Log(out, time.monotonic() + seconds), 0 if device.is_gpu else None
    with (
        Database.for_writing() as database,
        Worker(memory) as worker,
        Worker(memory, count=max(2, host_cpu().cores - 1)) as builders,
    ):
        session = Session(device, problems, log, database, worker, builders)
        try:
            stages(session)
        finally:
            spent = {"builders": session.builders.rounded(), "worker": session.worker.rounded()}
            log.line("end", f"{log.left:.0f} s left; seconds spent {spent}", left=log.left, spent=spent)
            write(session, out)
    return log


def stages(session: Session) -> None:
    log, device = session.log, session.device
    reserve = SANITIZER * session.total if device.is_gpu else 0.0
    with log.step("machine"):
        session.introduce()
    with log.step("preparations"):
        session.prepare_all()
    session.trials.deadline = log.deadline - reserve - CLOSING
    for number, problem in enumerate(session.problems):
        with log.step(f"race {problem}", needs=reserve + CLOSING), session.trials.alone():
            session.race(problem, candidates(problem, device))
        if number == 0 and problem in session.racing:
            with log.step("noise", needs=reserve + CLOSING), session.trials.alone():
                session.race_twice(problem)
        if device.is_gpu and session.is_short(problem):
            with log.step(f"launches {problem}", needs=reserve + CLOSING), session.trials.alone():
                session.launches(problem)
    left = log.left - reserve - CLOSING
    with log.step("search", needs=reserve + CLOSING + min(LEAST_SEARCH, 0.25 * session.total)):
        session.search(left - max(LEAST_GRACE, GRACE * left))
    if device.is_gpu:
        for tool in ("memcheck", "racecheck"):
            with log.step(tool, needs=CLOSING + 5):
                sanitize(tool, device, log, (log.left - CLOSING) * (0.65 if tool == "memcheck" else 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--problem", action="append", help="only these problems; repeatable")
    parser.add_argument("--minutes", type=float, default=7.5, help="for everything")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder for everything that is written")
    parser.add_argument("--check", action="store_true", help="only the small checks, in this process")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was learnt is still written
    os.environ.setdefault("ELSA_TUNE_HOME", str(options.out.resolve() / "home"))
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # of a builder: one runs on each core
    if options.device != "cpu":  # processes of a core each, whose truths are computed on the host
        os.environ.setdefault("OMP_NUM_THREADS", "2")
    device = detect(options.device)[0]
    if options.check:
        signal.signal(signal.SIGALRM, lambda *_: sys.exit(1))  # so that whoever watches this process still sums up
        signal.alarm(int(60 * options.minutes) + 4)
        check_here(device, time.monotonic() + 60 * options.minutes)
        return
    run(device, options.problem or PROBLEMS, 60 * options.minutes, options.out)


if __name__ == "__main__":
    main()
