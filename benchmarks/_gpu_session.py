"""The stages of benchmarks/gpu.py on one device: builds, races, launches, the noise floor, the search."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from _gpu_check import run_for
from _gpu_jobs import Ledger, Prepared, launch_costs, prepare, warm
from _gpu_lists import SHORT, candidates, checks
from _gpu_log import Log
from elsa_tune.device import Device, host_cpu
from elsa_tune.errors import CompilerMissing
from elsa_tune.generate import backends, lawful, sdpa
from elsa_tune.measurement import Measurement
from elsa_tune.problem import Problem
from elsa_tune.prove.check import Verdict
from elsa_tune.remember import lines as files
from elsa_tune.remember.database import Database
from elsa_tune.space import Space, parse
from elsa_tune.tuning import offline, telemetry
from elsa_tune.tuning import tune as tuning
from elsa_tune.tuning.contender import Contender
from elsa_tune.tuning.peaks import least_seconds
from elsa_tune.tuning.trial import BUILD_SECONDS, Incumbent, Trials
from elsa_tune.tuning.worker import WorkerFailed
from elsa_tune.variant import Variant

ROUNDS, RACE_SECONDS = 12, 1.5
CHECKS, PREPARED = 0.12, 0.3
"""Shares of the time: for small checks, and until when races begin, whatever is not built."""

A_SEARCH = 12.0
"""Seconds below which a problem is not worth searching."""

CLOSING = 5.0
"""Seconds that writing results is left."""


class Session:
    """One device, one deadline: what every stage works with."""

    def __init__(
        self, device: Device, problems: Sequence[str], log: Log, database: Database, worker: Any, builders: Any
    ):
        self.device, self.log, self.database = device, log, database
        self.problems = [Problem.parse(text) for text in problems]
        self.total = log.left
        self.worker, self.builders = Ledger(worker), Ledger(builders)
        self.trials = Trials(database, self.worker, device, self.builders, thorough=True)  # type: ignore[arg-type]
        self.trials.deadline = log.deadline - CLOSING
        self.seen: dict[Problem, dict[str, Measurement]] = {}
        self.racing: dict[Problem, tuple[Incumbent, list[Contender]]] = {}
        self.unbuilt: dict[str, str] = {}  # digest -> why
        self.verdicts: dict[str, Verdict | None] = {}  # digest -> on its family

    def note(self, problem: Problem, measurements: Iterable[Measurement]) -> list[Measurement]:
        """Remember the newest measurement of each variant, as they come."""
        noted = []
        for m in measurements:
            self.seen.setdefault(problem, {})[m.variant] = m
            noted.append(m)
        return noted

    # Before anything is raced.

    def introduce(self) -> None:
        """The machine, its software, its peaks, its clocks under load."""
        software = {"python": platform.python_version(), "torch": torch.__version__, "cuda": str(torch.version.cuda)}
        for name in backends.names():
            with suppress(CompilerMissing):
                software |= backends.get(name).toolchain(self.device)
        self.trials.find_peaks()
        facts = {
            "smi": nvidia_smi() if self.device.is_gpu else "", "device": str(self.device), "name": self.device.name,
            "cores": os.cpu_count(), "software": software,
            "tf32": torch.get_float32_matmul_precision(), "limits": self.trials.peaks,
        }  # fmt: skip
        self.log.line("machine", f"{self.device} ({self.device.name}) {software} {self.trials.peaks}", **facts)

    def prepare_all(self) -> None:
        """Everything that will be raced is built and checked side by side, in order of need, and FlexAttention compiled to disk;
        small checks meanwhile."""
        jobs: dict[str, Future[Any]] = {}
        pool = ThreadPoolExecutor(host_cpu().cores)
        try:
            raced = {self.digest(p, v): (p, v) for p in self.problems for v in candidates(p, self.device)}
            small = {self.digest(p, v): (p, v) for p, v in checks(self.device)} if self.device.is_gpu else {}
            for problem in self.problems:  # the longest first
                for peer in self.trials.peers(problem, slow=True):
                    if peer.variant.axes["kernel"] in sdpa.SLOW_TO_START:
                        todo = self.builders.run, warm, problem, peer
                        jobs[slow_start(problem, peer.variant)] = pool.submit(*todo, timeout=BUILD_SECONDS)
            for digest in filter(None, [*small, *raced]):
                if digest not in jobs:
                    problem, variant = raced.get(digest) or small[digest]
                    peers = self.trials.peers(problem) if self.device.is_gpu and digest in raced else None
                    jobs[digest] = pool.submit(
                        self.builders.run, prepare, variant, problem, self.device, peers, timeout=BUILD_SECONDS
                    )
            first = [jobs[digest] for digest in small if digest]
            if self.device.is_gpu:
                wait(first, timeout=0.5 * PREPARED * self.total)
                with self.log.step("check"):
                    said = check_command(self.device, CHECKS * self.total)
                    self.log.line("checked", said[-200:].strip(), said=said.splitlines())
            late = wait(jobs.values(), timeout=max(1.0, self.log.left - (1 - PREPARED) * self.total)).not_done
            ready = {digest: job for digest, job in jobs.items() if job not in late}
            for job in late:
                job.cancel()
            self.builders.renew()  # nothing runs beside a race, and nothing of theirs stays in memory
        finally:  # also when this process is told to end
            pool.shutdown(wait=False, cancel_futures=True)
        self.tell_of_preparations(jobs, ready)

    def digest(self, problem: Problem, variant: Variant) -> str:
        """What a variant would build; empty where its compiler cannot even be named."""
        with suppress(Exception):
            return backends.get(variant.backend).digest(variant, problem, self.device)
        return ""

    def tell_of_preparations(self, jobs: dict[str, Future[Any]], ready: dict[str, Future[Any]]) -> None:
        """What was built and checked in how many seconds, and why the rest was not; that will not be raced."""
        done = list[Prepared]()
        for digest in jobs:
            if digest not in ready:
                self.unbuilt[digest] = "not built in time"
            elif why := str(ready[digest].exception() or "") or ready[digest].result().failure:
                self.unbuilt[digest] = why
            else:
                done.append(ready[digest].result())
                self.verdicts[digest] = done[-1].verdict
        building, checking = sum(p.building for p in done), sum(p.checking for p in done)
        self.log.line(
            "prepared", f"{len(done)} of {len(jobs)}: {building:.0f} s of compilers, {checking:.0f} s of checks; not: {self.unbuilt}",
            prepared=len(done), building=building, checking=checking, longest=max((p.building for p in done), default=0.0),
            unbuilt=self.unbuilt,
        )  # fmt: skip

    # Races.

    def race(self, problem: Problem, variants: Sequence[Variant]) -> None:
        """Everyone of torch's and every variant that is right in one race; a line, whatever happens to some of them."""
        start, before = time.monotonic(), self.worker.rounded()
        cold = {
            v: why
            for v in lawful.variants(Space.read("sdpa"), problem, self.device)
            if (why := self.unbuilt.get(slow_start(problem, v)))
        }
        self.trials.thorough = not cold
        incumbent, came_to = self.trials.incumbent(problem)
        self.note(problem, came_to)
        unbuilt = cold | {v: self.unbuilt[d] for v in variants if (d := self.digest(problem, v)) in self.unbuilt}
        reading: dict[str, float] = {}
        try:
            built, lost = self.trials.build(problem, [v for v in variants if v not in unbuilt])
            self.note(problem, lost)
            for candidate in built:
                if verdict := self.verdicts.get(self.digest(problem, candidate.variant)):
                    self.trials.take(problem, candidate, verdict)
            self.note(problem, filter(None, (self.trials.check(problem, incumbent, c) for c in built)))
            usable = [c for c in built if self.trials.is_right(problem, c)]
            everyone = [c for c in self.trials.peers(problem, True) if self.ran(problem, c, incumbent)] + usable
            try:
                raced = self.note(problem, self.trials.final(problem, incumbent, everyone, ROUNDS, RACE_SECONDS))
                said = raced[-1].provenance
                reading = {name: float(said[name]) for name in telemetry.SUMMARY if name in said}
                self.racing[problem] = incumbent, everyone
            except WorkerFailed as error:  # one of them ended the worker: each alone
                self.log.line("trouble", f"{problem}: {error.reason}", step=str(problem), reason=error.reason)
                self.note(problem, self.trials.trial(problem, incumbent, usable, 0.0))
        finally:  # at the deadline too: torch's own were timed
            spent = {name: round(t - before.get(name, 0), 1) for name, t in self.worker.rounded().items()}
            spent["all"] = round(time.monotonic() - start, 1)
            self.tell(problem, incumbent, reading, spent, {str(v): f"failed: {why}" for v, why in unbuilt.items()})

    def ran(self, problem: Problem, peer: Contender, incumbent: Incumbent) -> bool:
        """Whether one of torch's other kernels could be timed."""
        m = self.seen[problem].get(str(peer.variant))
        return peer.variant != incumbent.contender.variant and m is not None and m.status == "ok"

    def tell(
        self,
        problem: Problem,
        incumbent: Incumbent,
        reading: dict[str, float],
        spent: dict[str, float],
        unbuilt: dict[str, str],
    ) -> None:
        """One line and one table of a race."""
        found = self.seen[problem]
        rows = {v: self.row(problem, m) for v, m in found.items() if m.status == "ok" and m.seconds}
        absent = unbuilt | {v: f"{m.status}: {m.reason}"[:400] for v, m in found.items() if m.status != "ok"}
        winner = next(iter(self.database.winners(True, device=str(self.device), problem=str(problem))), None)
        ours = [v for v in rows if backends.role(v) == "candidate"]
        best = min(ours, key=lambda v: rows[v]["milliseconds"], default=None)
        least = least_seconds(problem, self.trials.peaks)
        text = f"{problem}  served by {winner and winner.variant}"
        for v, row in sorted(rows.items(), key=lambda item: item[1]["milliseconds"]):
            limit = f" {1e3 * least / row['milliseconds']:4.0%} of limit" if least else ""
            text += f"\n  {row['milliseconds']:9.4f} ms {row['gflops'] / 1e3:7.1f} TFLOP/s {row['error'] or math.nan:.0e}{limit}  {v}"
            text += f"  {row['ratio']:.2f} [{row['ratio_low']:.2f}, {row['ratio_high']:.2f}]" if v in ours else ""
            text += f"  predicted {row['predicted']:.4f}" if row["predicted"] else ""
        text += "".join(f"\n  absent: {v}: {why[:160]}" for v, why in absent.items())
        self.log.line(
            "raced", text, problem=str(problem), served_by=winner and winner.variant, tuned=best, rows=rows, absent=absent,
            incumbent=str(incumbent.contender.variant), least_milliseconds=least and 1e3 * least, reading=reading, seconds=spent,
        )  # fmt: skip

    def row(self, problem: Problem, m: Measurement) -> dict[str, Any]:
        """A contender's numbers; ratios are to the fastest of torch's, milliseconds as the offline model predicts them too."""
        variant, predicted = parse(m.variant), None
        with suppress(Exception):  # no prediction is no error: torch's kernels, targets that are not known
            predicted = offline.predict(variant, problem, m.resources, offline.target(self.device.arch))
        shown = ("registers", "spills", "local", "stack", "shared", "warps", "loop_all", "loop_matrix", "loop_local")
        return {
            "milliseconds": 1e3 * (m.seconds or math.nan), "gflops": problem.flops / (m.seconds or math.nan) / 1e9,
            "error": m.error, "stage": m.stage, "ratio": m.ratio, "ratio_low": m.ratio_low, "ratio_high": m.ratio_high,
            "predicted": predicted and 1e3 * predicted, "resources": {k: m.resources[k] for k in shown if k in m.resources},
            "samples": list(m.samples),
        }  # fmt: skip

    def is_short(self, problem: Problem) -> bool:
        """Whether a race was held, and calls in it are so short that launching them matters."""
        return problem in self.racing and min(m.seconds or 1.0 for m in self.seen[problem].values()) < SHORT

    def launches(self, problem: Problem) -> None:
        """What launching costs the host, and the same race from a graph."""
        incumbent, others = self.racing[problem]
        alike = [incumbent.contender, *others]
        costs = self.worker.run(
            launch_costs, problem, alike, timeout=max(1.0, min(60.0, self.trials.deadline - time.monotonic()))
        )
        self.log.line(
            "launches", f"{problem}: microseconds of the host {costs}", problem=str(problem), microseconds=costs
        )
        ours = [c.variant for c in others if c.variant.backend != "sdpa"]
        self.race(problem.reshaped(launch="graph"), ours)

    def race_twice(self, problem: Problem) -> None:
        """The noise floor: the same race again, how far medians moved."""
        before = {v: m.seconds for v, m in self.seen[problem].items() if m.seconds and m.stage == "final"}
        self.note(problem, self.trials.final(problem, *self.racing[problem], ROUNDS, RACE_SECONDS))
        after = {
            v: m.seconds for v, m in self.seen[problem].items() if v in before and m.seconds and m.stage == "final"
        }
        moved = {v: round((seconds or math.nan) / before[v] - 1, 4) for v, seconds in after.items()}  # type: ignore[operator]
        typical = statistics.median(map(abs, moved.values())) if moved else None
        self.log.line(
            "noise", f"{problem}: medians moved by {moved}", problem=str(problem), moved=moved, typical=typical
        )

    # Afterwards.

    def search(self, seconds: float) -> None:
        """Tune with the time that remains, the first problems alone where that is little, beginning from everything that was raced."""
        report = tuning.tune(self.problems[: max(1, int(seconds // A_SEARCH))], device=str(self.device), budget=seconds)
        for o in report.outcomes:
            won = o.winner
            told = f"{won.variant} {won.ratio:.2f} [{won.ratio_low:.2f}, {won.ratio_high:.2f}]" if won else "no winner"
            facts = won and {"variant": won.variant, "ratio": won.ratio, "low": won.ratio_low, "high": won.ratio_high}
            self.log.line(
                "searched", f"{o.problem}: {told}", problem=str(o.problem), winner=facts, share_of_limit=o.limit
            )
        self.log.line("search", "; ".join(report.notes), seconds=report.seconds, notes=report.notes)


def slow_start(problem: Problem, variant: Variant) -> str:
    """What the preparation of one of torch's kernels that start slowly is called; from a graph it is called alike."""
    return f"{problem.reshaped(launch='eager')} {variant}"


def nvidia_smi() -> str:
    """What NVIDIA's program says of the GPUs; empty where it is not here."""
    with suppress(OSError, subprocess.SubprocessError):
        asked = "name,driver_version,pstate,power.limit,clocks.max.sm,clocks.max.mem,mig.mode.current,persistence_mode"
        command = ["nvidia-smi", f"--query-gpu={asked}", "--format=csv"]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout
    return ""


def check_command(device: Device, seconds: float) -> str:
    """Run the small checks in a process of their own, which may hang or crash; what it printed last."""
    command = [
        sys.executable,
        str(Path(__file__).with_name("gpu.py")),
        "--check",
        "--device",
        str(device),
        "--minutes",
        str(seconds / 60),
    ]
    code, said = run_for(command, seconds, {})
    return said if code == 0 else f"{said}\nexit code {code}"


def write(session: Session, out: Path) -> None:
    """The files that outlive the machine."""
    device = str(session.device)
    name = re.sub(r"[^\w.-]+", "-", device)  # a spelling may hold what carriers of files do not take
    lines = [line for line in session.log.lines if line["kind"] == "raced"]
    others = [line for line in session.log.lines if line["kind"] != "raced"]
    content = {"device": device, "name": session.device.name, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"),
               "peaks": session.trials.peaks, "lines": lines, "others": others}  # fmt: skip
    (out / f"{name}.json").write_text(json.dumps(content, indent=1, default=str))
    winners = [w.measurement for w in session.database.winners(device=device) if w.ratio_low > 1]
    kept = [m for m in winners if m.error is not None and not m.is_rival]
    files.write(kept, out / f"{name}.jsonl")
    files.write(session.database.measurements(device=device), out / f"{name}.trials.jsonl")
