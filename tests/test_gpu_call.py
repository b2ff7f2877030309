"""The one call on a GPU (benchmarks/gpu.py, gpu.sh), rehearsed without one: a failure planted at every step costs its own line."""

from __future__ import annotations

import gzip
import json
import os
import re
import sqlite3
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from planted import variant_of
from test_gpu import H200, Rehearsed

from elsa_tune.device import Device, host_cpu
from elsa_tune.problem import Problem
from elsa_tune.prove.check import Verdict
from elsa_tune.space import parse
from elsa_tune.tuning import contender as contenders
from elsa_tune.tuning import tune as tuning
from elsa_tune.tuning.effort import Effort
from elsa_tune.tuning.race import Raced
from elsa_tune.tuning.worker import WorkerFailed
from elsa_tune.variant import Variant

ROOT = Path(__file__).resolve().parent.parent
SHORT, LONG, DECODE = "fp16.d64@b1.h16.q1024.k1024", "fp32.d64@b1.h16.q4096.k4096", "bf16.d128@b1.h32.kv8.q1.k16384"
SMALL = "fp32.d16@b2.h4.q96.k96"


@pytest.fixture
def gpu(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """benchmarks/gpu.py on a device that is not here."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import _gpu_check
    import _gpu_session
    import gpu

    monkeypatch.setattr(gpu, "Worker", Planted)
    monkeypatch.setattr(tuning, "Worker", Planted)
    monkeypatch.setattr(tuning, "detect", lambda text: [H200])
    monkeypatch.setattr(_gpu_session, "check_command", lambda device, seconds: "40 checks, 0 bad")
    monkeypatch.setattr(_gpu_check, "sanitizer", lambda: None)
    monkeypatch.setitem(tuning.EFFORTS, "quick", Effort(trials=2, fewest=2, seconds=60.0, final_rounds=5))
    Planted.faults, Planted.renewed = {}, 0
    yield gpu


class Planted(Rehearsed):
    """A GPU's jobs, some of which fail as ``faults`` says: name of a fault -> what it befalls."""

    faults: dict[str, str] = {}
    renewed = 0

    def renew(self) -> None:
        Planted.renewed += 1

    def befalls(self, fault: str, variant: object) -> bool:
        return str(variant) == self.faults.get(fault)

    def do_prepare(self, variant: Variant, problem: Problem, goal: Device, peers: Any) -> Any:
        from _gpu_jobs import Prepared

        if self.befalls("compiler fails", variant):
            return Prepared(None, None, 1.0, failure="BuildFailed: planted")
        if self.befalls("breaks the context", variant):
            raise WorkerFailed("failed", "the worker died with exit code 77")
        built = self.do_build(variant, problem, goal)
        wrong = Verdict(1.0, 1e7, "planted") if self.befalls("wrong", variant) else Verdict(1e-7, 0.5)
        return Prepared(built, None if built.flaw or peers is None else wrong, 1.0, 0.5)

    def do_warm(self, problem: Problem, contender: Any) -> Any:
        from _gpu_jobs import Prepared

        return Prepared(contender.built, None, 1.0)

    def do_launch_costs(self, problem: Problem, contenders: Any) -> dict[str, float]:
        return {str(c.variant): 10.0 for c in contenders}

    def do_check_family(self, problem: Problem, candidate: Any, peers: Any) -> Verdict:
        return Verdict(1e-7, 0.5)

    def do_check_shape(self, problem: Problem, candidate: Any, incumbent: Any) -> Verdict:
        if self.befalls("raises", candidate.variant):
            raise WorkerFailed("failed", "RuntimeError: planted at launch")
        return super().do_check_shape(problem, candidate, incumbent)

    def do_race(self, problem: Problem, contenders: Any, rounds: int, seconds: float, beat: float = 0.0) -> Any:
        names = [str(c.variant) for c in contenders]
        if str(problem) == self.faults.get("worker dies") and len(names) > 5:
            raise WorkerFailed("failed", "the worker died with exit code -11")
        raced = super().do_race(problem, contenders, rounds, seconds, beat)
        lost = self.faults.get("is not captured", "")
        if problem.launch == "graph" and lost in names:
            raced.failed[names.index(lost)] = "RuntimeError: operation not permitted when stream is capturing"
            raced.samples[names.index(lost)] = ()
        return Raced(raced.samples, raced.disturbed, raced.failed, {"sm_mhz": 1755.0, "watts": 640.0, "throttled": 4.0})

    def do_peak(self, goal: Device) -> dict[str, float]:
        if "telemetry" in self.faults:
            raise WorkerFailed("failed", "NVMLError: planted")
        return super().do_peak(goal)


def lines(out: Path, kind: str = "") -> list[dict[str, Any]]:
    """What is on disk, of one kind or all."""
    read = [json.loads(text) for text in (out / "lines.jsonl").read_text().splitlines()]
    return [line for line in read if kind in ("", line["kind"])]


def test_the_twelve_problems_are_lawful_and_each_has_enough_to_race(gpu: Any) -> None:
    from _gpu_lists import LEAST, MOST, PROBLEMS, candidates, checks

    posed = [Problem.parse(text) for text in PROBLEMS]
    assert len(posed) == len(set(posed)) == 12 and all(LEAST <= len(candidates(p, H200)) <= MOST for p in posed)
    assert {p.precision for p in posed} == {"strict", "fp32", "fp16", "bf16"} and {p.head_dim for p in posed} == {
        64,
        128,
    }
    assert {"causal", "none"} == {p.mask for p in posed} and {"forward", "backward"} == {p.direction for p in posed}
    assert {1024, 4096, 16384} == {p.kv_len for p in posed} and any(p.q_len == 1 and p.group > 1 for p in posed)
    backends = {v.backend for v in candidates(Problem.parse(LONG), H200)}
    assert backends == {"triton", "cuda"}
    families = {p.family for p, _ in checks(H200)[:12]}
    assert len(families) >= 5, "every family is checked before any is checked twice"


def test_a_failure_at_every_step_costs_its_own_line(gpu: Any, tmp_path: Path) -> None:
    from _gpu_lists import candidates

    first, second, third, fourth, fifth = (str(v) for v in candidates(Problem.parse(LONG), H200)[:5])
    captured = next(str(v) for v in candidates(Problem.parse(SHORT), H200) if "half" in str(v))
    Planted.faults = {
        "raises": first, "wrong": second, "compiler fails": third, "is not captured": captured, "worker dies": DECODE,
        "breaks the context": fifth, "telemetry": "absent",
    }  # fmt: skip
    gpu.run(H200, [SHORT, LONG, DECODE], 60.0, tmp_path)
    raced = {line["problem"]: line for line in lines(tmp_path, "raced")}
    assert [p for p in raced if not p.endswith(".graph")] == [SHORT, LONG, DECODE]
    absent, rows = raced[LONG]["absent"], raced[LONG]["rows"]
    assert (
        "planted at launch" in absent[first] and absent[second] == "wrong: planted" and "BuildFailed" in absent[third]
    )
    assert (
        "exit code 77" in absent[fifth] and fourth in rows and {"sdpa.efficient", "sdpa.flex", "sdpa.math"} <= set(rows)
    )
    lost = raced[f"{SHORT}.graph"]
    assert "capturing" in lost["absent"][captured] and captured in raced[SHORT]["rows"]
    assert len([v for v in lost["rows"] if not v.startswith("sdpa.")]) >= 2 and "sdpa.flash" in lost["rows"]
    assert Planted.renewed, "what a broken capture left behind ends with its process"
    assert [line for line in lines(tmp_path, "trouble") if "exit code -11" in line["reason"]]
    assert any(not v.startswith("sdpa.") for v in raced[DECODE]["rows"]), "raced alone after the worker died"
    assert lines(tmp_path, "launches")[0]["microseconds"]["sdpa.flash"] == 10.0
    assert lines(tmp_path, "noise")[0]["typical"] == 0.0 and lines(tmp_path, "machine")[0]["limits"] == {}
    assert all(line["absent"] for tool in ("memcheck", "racecheck") for line in lines(tmp_path, tool))
    assert len(lines(tmp_path, "searched")) == 3 and lines(tmp_path)[-1]["kind"] == "end"
    row = rows[fourth]
    assert row["predicted"] > 0 and row["resources"]["shared"] and row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
    assert raced[LONG]["reading"] == {"sm_mhz": 1755.0, "watts": 640.0, "throttled": 4.0}
    assert raced[LONG]["seconds"].keys() >= {"race", "check_shape", "all"}
    names = [path.name for path in tmp_path.iterdir()]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", name) for name in names), "what carriers of files take"
    written = {name.partition("_t13.0")[2] or name for name in names}
    assert {"lines.jsonl", ".json", ".jsonl", ".trials.jsonl"} <= written


def test_the_deadline_in_the_middle_of_finals(gpu: Any, tmp_path: Path) -> None:
    """What was timed before is told, and the end still writes everything."""
    from _gpu_session import ROUNDS

    class Late(Planted):
        def run(self, job: Callable[..., Any], *arguments: Any, timeout: float) -> Any:
            if job.__name__ == "race" and arguments[2] == ROUNDS and arguments[0] == Problem.parse(LONG):
                raise WorkerFailed("timeout", "no answer in time")
            return super().run(job, *arguments, timeout=timeout)

    gpu.Worker = Late
    gpu.run(H200, [LONG, SHORT], 40.0, tmp_path)
    assert {line["step"] for line in lines(tmp_path, "skipped")} >= {f"race {LONG}"}
    raced = {line["problem"]: line for line in lines(tmp_path, "raced")}
    assert set(raced[LONG]["rows"]) == {"sdpa.efficient", "sdpa.flex", "sdpa.math"} and len(raced[SHORT]["rows"]) > 4
    assert lines(tmp_path)[-1]["kind"] == "end" and list(tmp_path.glob("cuda-*.trials.jsonl"))


def test_a_kernel_that_breaks_the_context_ends_its_process(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any other failure is told, and the process goes on to the next kernel."""
    import torch

    import _gpu_jobs

    def broken(*arguments: object) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(contenders, "build", broken)
    variant, problem = parse("cuda.serial.t128.x8.r4.k4"), Problem.parse(LONG)
    assert "illegal memory access" in _gpu_jobs.prepare(variant, problem, H200, None).failure
    ended: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    monkeypatch.setattr(_gpu_jobs.os, "_exit", ended.append)
    _gpu_jobs.prepare(variant, problem, H200, None)
    assert ended == [_gpu_jobs.BROKEN]


def test_small_checks_tell_and_go_on(
    gpu: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import _gpu_check

    posed = Problem.parse("fp32.d16.causal@b2.h4.kv2.q30.k30")
    lawless = parse("cuda.serial.opencl.t32.x8.r8.k8.shared")
    listed = [(posed, lawless), (posed, parse(variant_of(posed))), (posed, lawless)]
    monkeypatch.setattr(_gpu_check, "checks", lambda here: listed)
    _gpu_check.check_here(host_cpu(), time.monotonic() + 100)
    told = capsys.readouterr().out.splitlines()
    assert ["RAISED" in line for line in told] == [True, False, True, False]
    assert "error " in told[1] and told[-1] == "3 checks, 2 bad"
    _gpu_check.check_here(host_cpu(), 0.0)
    assert "out of time before 3 checks" in capsys.readouterr().out


def test_what_the_sanitizer_says_is_counted(gpu: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import _gpu_check
    from _gpu_log import Log

    program, log = tmp_path / "compute-sanitizer", Log(tmp_path, time.monotonic() + 60)
    program.write_text(
        "#!/bin/sh\necho '========= Invalid __global__ write of size 4 bytes'\necho '========= ERROR SUMMARY: 3 errors'\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr(_gpu_check, "sanitizer", lambda: str(program))
    _gpu_check.sanitize("memcheck", H200, log, 20.0)
    program.write_text("#!/bin/sh\necho '========= started'\nexec sleep 30\n")
    _gpu_check.sanitize("racecheck", H200, log, 0.5)
    (found,), (late,) = lines(tmp_path, "memcheck"), lines(tmp_path, "racecheck")
    assert found["errors"] == 3 and "Invalid" in found["said"][0] and found["code"] == 0
    assert late["errors"] is None and late["code"] is None and "started" in late["said"][0]


def test_what_was_flushed_before_a_kill_is_readable(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/gpu.py", "--device", "cpu", "--problem", SMALL, "--minutes", "0.6"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("ELSA_TUNE_HOME", None)
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path)], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert any(" raced: " in text for text in process.stdout), "it must be killed after its first race"
    process.kill()
    process.wait()
    (line,) = lines(tmp_path, "raced")
    assert {"sdpa.flash", "sdpa.math"} <= set(line["rows"])
    found = sqlite3.connect(tmp_path / "home" / "measurements.db").execute("SELECT COUNT(*) FROM measurements")
    assert found.fetchone()[0] >= len(line["rows"])


HIDE = """
import importlib.metadata as metadata, os, sys
HIDDEN, plain = ("pebble", "archspec"), metadata.version
def brought(name):  # from anywhere but where this interpreter keeps its packages
    return any(os.path.isdir(os.path.join(path, name)) for path in sys.path if "site-packages" not in path)
class Lacking:
    def find_spec(self, name, path=None, target=None):
        if name in HIDDEN and not brought(name):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
def version(name):
    if name in HIDDEN and not brought(name):
        raise metadata.PackageNotFoundError(name)
    return plain(name)
sys.meta_path.insert(0, Lacking())
metadata.version = version
"""


def wheel(package: str, folder: Path) -> None:
    """A wheel of a package that is installed here."""
    found = metadata.distribution(package)
    name = f"{package}-{found.version}"
    files = [
        (str(f), f.locate().read_bytes()) for f in found.files or () if f.parts[0] == package and f.suffix != ".pyc"
    ]
    files += [
        (f"{name}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: {found.version}\n".encode())
    ]
    files += [(f"{name}.dist-info/WHEEL", b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")]
    with zipfile.ZipFile(folder / f"{name}-py3-none-any.whl", "w") as made:
        for path, content in files:
            made.writestr(path, content)
        made.writestr(f"{name}.dist-info/RECORD", "".join(f"{path},,\n" for path, _ in files))


@pytest.mark.slow
def test_the_whole_command_where_packages_are_lacking(tmp_path: Path) -> None:
    """It names what is lacking, installs it from wheels beside the machine's own packages, and leaves few files."""
    hiding, wheels, out = tmp_path / "hiding", tmp_path / "wheels", tmp_path / "out"
    hiding.mkdir()
    wheels.mkdir()
    (hiding / "sitecustomize.py").write_text(HIDE)
    environment = {
        **os.environ,
        "PYTHONPATH": str(hiding),
        "PYTHON": sys.executable,
        "WHEELS": str(wheels),
        "OUT": str(out),
    }
    command = ["bash", "benchmarks/gpu.sh", "--device", "cpu", "--problem", SMALL, "--minutes", "0.6"]

    def called() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=200
        )

    refused = called()
    assert refused.returncode == 1 and "make wheels-gpu" in refused.stdout and "lacking" in refused.stdout
    for package in ("pebble", "archspec"):
        wheel(package, wheels)
    done = called()
    assert done.returncode == 0, (done.stdout[-2000:], done.stderr[-2000:])
    assert "installing archspec-" in done.stdout and "pebble-" in done.stdout
    names = sorted(re.sub(r"^cpu-[a-z0-9_-]+", "cpu", path.name) for path in out.iterdir())
    assert names == ["cpu.json", "cpu.jsonl", "cpu.trials.jsonl.gz", "lines.jsonl", "measurements.db.gz", "output.txt"]
    (results,) = out.glob("cpu-*.json")
    line = json.loads(results.read_text())["lines"][0]
    assert line["problem"] == SMALL and {"sdpa.flash", "sdpa.math"} <= set(line["rows"]) and line["served_by"]
    assert all(row["milliseconds"] > 0 and row["error"] < 1e-5 for row in line["rows"].values())
    (tmp_path / "back.db").write_bytes(gzip.decompress((out / "measurements.db.gz").read_bytes()))
    (count,) = sqlite3.connect(tmp_path / "back.db").execute("SELECT COUNT(*) FROM measurements").fetchone()
    assert (
        count
        == len(gzip.decompress(next(out.glob("*.trials.jsonl.gz")).read_bytes()).splitlines())
        >= len(line["rows"])
    )
    assert lines(out, "searched") or lines(out, "skipped")
