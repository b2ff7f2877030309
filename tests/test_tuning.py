"""A whole run on small problems: winners, resuming, interruptions, machines that lack something."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import elsa_tune
from elsa_tune import places
from elsa_tune.device import host_cpu
from elsa_tune.dispatch import serving
from elsa_tune.errors import BadDevice, BadProblem, ElsaTuneError
from elsa_tune.generate import backends, cpp
from elsa_tune.generate.backends import Built
from elsa_tune.generate.cpp import compiler as _compiler
from elsa_tune.remember.database import Database
from elsa_tune.tuning import drift
from elsa_tune.tuning import tune as tuning
from elsa_tune.tuning.effort import Effort
from elsa_tune.tuning.tune import Progress, tune

SMALL = "fp32.d16@b1.h2.q96.k96"
HERE = str(host_cpu())


def recorded() -> dict[str, int]:
    """How many measurements of each status the database holds."""
    with Database.for_reading(places.database()) as database:
        rows = database.measurements()
    return {status: sum(m.status == status for m in rows) for status in ("ok", "wrong", "failed", "timeout", "pruned")}


def test_from_nothing_to_a_winner_that_serves(home: Path) -> None:
    seen: list[str] = []

    def watch(progress: Progress) -> None:
        seen.append(progress.doing)

    report = tune([SMALL], budget=40, watch=watch)
    assert report.complete and [str(o.problem) for o in report.outcomes] == [SMALL]
    assert report.outcomes[0].winner is not None
    winner = report.outcomes[0].winner.measurement
    assert winner.stage == "final" and winner.error is not None and winner.error < 1e-6
    assert winner.provenance["torch"] == torch.__version__ and float(winner.provenance["peak_gflops"]) > 0
    assert len(winner.samples) == len(winner.incumbent_samples) >= 3
    assert any("final" in s for s in seen) and any("cpp." in s for s in seen)
    first = recorded()
    assert first["ok"] >= 5 and first["failed"] == first["wrong"] == first["timeout"] == 0
    serving = elsa_tune.load(SMALL)
    assert str(serving.variant) == winner.variant and serving.rung == "exact"

    again = tune([SMALL], budget=5)
    assert again.complete and recorded()["ok"] > first["ok"], "a second run goes on from the first"


def test_a_settled_run_only_refines(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tuning.EFFORTS, "quick", Effort(trials=2, fewest=2, seconds=5, final_rounds=5))
    tune([SMALL], budget=30)
    before = recorded()["ok"]
    start = time.monotonic()
    tune([SMALL], budget=60)
    assert time.monotonic() - start < 30 and recorded()["ok"] > before


def test_what_was_reopened_is_tuned_anew_by_the_next_run(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the run that saw the drift ended before it could: what was measured before is only a hint of what to try."""
    monkeypatch.setitem(tuning.EFFORTS, "quick", Effort(trials=2, fewest=2, seconds=5, final_rounds=5))
    tune([SMALL], budget=30)
    with Database.for_writing() as database:
        drift.reopen(database, host_cpu(), SMALL)
    tune([SMALL], budget=30)
    with Database.for_reading(places.database()) as database:
        anew = [m for m in database.measurements() if m.provenance.get("era") == 1]
    ours = [m for m in anew if not m.variant.startswith("sdpa.")]
    assert {m.stage for m in ours} == {"trial", "final"} and len([m for m in ours if m.stage == "trial"]) >= 2


def started(home: Path, problems: list[str], report: str) -> subprocess.Popen[str]:
    """A script that tunes, without a guard of ``__main__``, in a process group of its own; it prints ``report``, an expression of
    its progress p, at every step."""
    path = home.parent / "run.py"
    path.write_text(
        f"import elsa_tune\nelsa_tune.tune({problems!r}, budget=60, watch=lambda p: print({report}, flush=True))\n"
    )
    command = [sys.executable, str(path)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    )


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_stopped_in_the_middle_then_resumed(home: Path, how: signal.Signals) -> None:
    """kill -9 and Ctrl-C lose at most the trial in flight: what was announced as recorded is there afterwards."""
    process = started(home, [SMALL, "fp32.d32@b1.h2.q96.k96"], "sum(sum(t.counts.values()) for t in p.tasks)")
    acknowledged = 0
    assert process.stdout is not None
    for line in process.stdout:
        acknowledged = int(line)
        if acknowledged >= 6:
            break
    process.send_signal(how)
    process.wait(timeout=90)
    with contextlib.suppress(ProcessLookupError):  # its worker has noticed and ended by itself
        os.killpg(process.pid, signal.SIGKILL)
    kept = sum(recorded().values())
    assert kept >= acknowledged >= 6
    report = tune([SMALL], budget=4)
    assert report.complete and sum(recorded().values()) > kept


def test_no_worker_survives_its_tuner(home: Path) -> None:
    """A killed tuner's worker ends too: nothing is left computing behind the user's back."""
    process = started(home, [SMALL], "p.doing")
    assert process.stdout is not None
    assert any("cpp." in line for line in process.stdout), "it must be killed in the middle of its trials"
    process.kill()
    process.wait()

    def alive() -> list[str]:
        found = subprocess.run(
            ["ps", "-o", "pid=,stat=", "-g", str(process.pid)], capture_output=True, text=True, check=False
        )
        return [line for line in found.stdout.splitlines() if "Z" not in line.split()[1]]

    deadline = time.monotonic() + 20
    while alive() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not alive()


def test_two_tuners_share_a_machine_and_a_database(home: Path) -> None:
    program = (
        f"import elsa_tune\nif __name__ == '__main__':\n    assert elsa_tune.tune([{SMALL!r}], budget=25).complete\n"
    )
    path = home.parent / "run.py"
    path.write_text(program)
    both = [subprocess.Popen([sys.executable, str(path)]) for _ in range(2)]
    assert [process.wait(timeout=150) for process in both] == [0, 0]
    assert recorded()["ok"] >= 6


def test_without_a_compiler_torch_wins_and_the_remedy_is_told(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_compiler, "_candidates", lambda: [])
    _compiler.find.cache_clear()
    try:
        report = tune([SMALL], budget=5)
    finally:
        _compiler.find.cache_clear()
    winner = report.outcomes[0].winner
    assert report.complete and winner is not None and winner.variant.startswith("sdpa.")
    assert any("apt-get install g++" in note and "elsa-tune[compiler]" in note for note in report.notes)
    q = torch.randn(1, 2, 96, 16)
    assert torch.equal(elsa_tune.attention(q, q, q), torch.nn.functional.scaled_dot_product_attention(q, q, q))


def test_faulty_candidates_are_recorded_and_the_run_goes_on(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every third kernel crashes, every other third is wrong, in the middle of a real run."""
    from planted import CALL, FAULTS

    built: list[int] = []
    original = cpp.build_text

    def sabotaged(text: str, name: str, variant: object) -> Built:
        built.append(1)
        if CALL in text and len(built) % 3 == 1:
            text, name = text.replace(*FAULTS["segfault"]), f"{name}crash"
        elif CALL in text and len(built) % 3 == 2:
            text, name = text.replace(*FAULTS["wrong by 1e-3"]), f"{name}wrong"
        return original(text, name, variant)  # type: ignore[arg-type]

    monkeypatch.setattr(cpp, "build_text", sabotaged)
    report = tune([SMALL], budget=20)
    counts = recorded()
    assert report.complete and counts["failed"] and counts["wrong"] and counts["ok"]
    with Database.for_reading(places.database()) as database:
        bad = {m.digest for m in database.measurements() if m.status in ("wrong", "failed")}
        assert not bad & {w.measurement.digest for w in database.winners()}


def test_exhaustive_and_random_run(home: Path) -> None:
    assert tune([SMALL], budget=6, exhaustive=True).complete
    assert tune([SMALL], budget=3, sampler="random", effort="full", seed=4).complete


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"effort": "heroic"}, ElsaTuneError),
        ({"sampler": "oracle"}, ElsaTuneError),
        ({"device": "cuda:0"}, BadDevice),
        ({"problems": ["x"]}, BadProblem),
    ],
)
def test_mistakes(home: Path, options: dict[str, object], error: type[Exception]) -> None:
    with pytest.raises(error, match="use|write"):
        tune(**{"problems": [SMALL], "budget": 1, **options})  # type: ignore[arg-type]


def test_problems_no_backend_generates_are_left_to_torch(home: Path) -> None:
    report = tune(["fp32.d300@b1.h1.q8.k8"], budget=5)
    assert report.complete and report.outcomes[0].winner.variant.startswith("sdpa.")  # type: ignore[union-attr]


def test_a_running_process_learns_of_its_own_tuning(home: Path) -> None:
    problem = elsa_tune.Problem.parse(SMALL)
    assert serving.explain(problem, host_cpu()).by_sdpa
    tune([SMALL], budget=8)
    assert serving.explain(problem, host_cpu()).rung == "exact"


def test_every_backend_states_its_toolchain() -> None:
    for name in backends.names():
        assert all(backends.get(name).toolchain().values())
