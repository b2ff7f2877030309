"""GPUs without a GPU: devices, offline ranking, timing, tuning and dispatch on a device that is not here."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from test_dispatch import record, tensors
from torch.nn.functional import scaled_dot_product_attention

import elsa_tune
from elsa_tune import device, places, workload
from elsa_tune.device import Device, host_cpu
from elsa_tune.dispatch import serving, torchs
from elsa_tune.errors import BadDevice, FolderTaken
from elsa_tune.generate import backends, lawful, triton
from elsa_tune.generate.backends import Built
from elsa_tune.measurement import Measurement
from elsa_tune.problem import Problem
from elsa_tune.prove.check import Verdict
from elsa_tune.remember.database import Database
from elsa_tune.shell import cli, doctor
from elsa_tune.space import Space, parse
from elsa_tune.tuning import contender as contenders
from elsa_tune.tuning import final, offline, peaks, race, recall, telemetry, timing, turn
from elsa_tune.tuning import tune as tuning
from elsa_tune.tuning import worker as workers
from elsa_tune.tuning.race import Raced
from elsa_tune.tuning.run import Run
from elsa_tune.tuning.search import searches
from elsa_tune.tuning.task import Task
from elsa_tune.tuning.worker import Worker, WorkerFailed
from elsa_tune.variant import Variant

H200 = Device("cuda", "nvidia_h200", "sm_90", 132, 140, "d580.159_t13.0", memory=140 << 30, caches=(60 << 20,))
SPACE = Space.read("triton")


# Devices.


def test_spelling_and_kinship() -> None:
    assert Device.parse(str(H200)) == H200 and str(H200) == "cuda:nvidia_h200-sm_90-c132-g140+d580.159_t13.0"
    rungs = {
        "exact": str(H200),
        "versions": "cuda:nvidia_h200-sm_90-c132-g140+d575.1_t12.8",
        "model": "cuda:nvidia_h200-sm_90-c16-g18+d580.159_t13.0",
        "arch": "cuda:nvidia_h100_80gb_hbm3-sm_90-c132-g80",
        "family": "cuda:nvidia_a100-sm_80-c108-g40",
    }
    assert {H200.kinship(Device.parse(text)): text for text in rungs.values()} == rungs
    assert H200.kinship(host_cpu()) is None and H200.torch == "cuda:0" and H200.warp == 32
    assert offline.target("gfx942").device.warp == 64 and offline.target("gfx1100").device.warp == 32


@pytest.fixture
def fresh() -> Iterator[None]:
    device.gpus.cache_clear()
    yield
    device.gpus.cache_clear()


def facts(name: str = "NVIDIA H100 80GB HBM3 MIG 1g.10gb") -> SimpleNamespace:
    return SimpleNamespace(
        name=name, major=9, minor=0, multi_processor_count=16, total_memory=10 << 30, L2_cache_size=8 << 20
    )


def test_detection_names_the_slice_and_lists_equal_gpus_once(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: facts())
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    (found,) = device.gpus()
    assert re.fullmatch(r"cuda:nvidia_h100_80gb_hbm3_mig_1g_10gb-sm_90-c16-g10\+d[a-z0-9._]+_t13.0", str(found))
    assert found.last_cache == 8 << 20 and device.of_tensor("cuda", 1) == found and device.detect("sm_90") == [found]
    assert device.of_tensor("cpu", None) == host_cpu() and device.of_tensor("mps", 0) is None


def test_a_broken_driver_is_one_line_and_never_an_exception(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> bool:
        raise RuntimeError("CUDA driver version is insufficient")

    monkeypatch.setattr(torch.cuda, "is_available", broken)
    assert device.gpus() == () and device.detect("auto") == [host_cpu()]
    lines = [f for f in doctor.examine() if f.topic == "GPU"]
    assert len(lines) == 1 and not lines[0].good and "insufficient" in lines[0].detail and lines[0].remedy
    q, k, v = tensors()
    assert torch.equal(elsa_tune.attention(q, k, v), scaled_dot_product_attention(q, k, v))
    with pytest.raises(BadDevice, match="not on this machine"):
        device.detect("cuda")


def test_a_graph_is_another_problem() -> None:
    eager = Problem.parse("bf16.d128@b1.h32.kv8.q1.k4096")
    graph = Problem.parse(f"{eager}.graph")
    assert (
        graph != eager and graph.launch == "graph" and str(graph) == f"{eager}.graph" and graph.family == eager.family
    )


def test_workloads_by_device() -> None:
    assert workload.read("default", H200) == workload.read("gpu", H200)
    assert workload.read("default", host_cpu()) != workload.read("gpu", host_cpu())
    assert {p.precision for p in workload.read("gpu", H200)} >= {"fp32", "strict", "fp16", "bf16"}


def test_torchs_kernels_on_a_gpu() -> None:
    def names(problem: str) -> list[str]:
        return [str(v)[5:] for v in lawful.variants(Space.read("sdpa"), Problem.parse(problem), H200)]

    assert names("fp16.d64@b1.h8.q512.k512") == ["flash", "efficient", "cudnn", "flex", "math"]
    assert names("fp32.d64@b1.h8.q512.k512") == ["efficient", "flex", "math"]
    assert names("fp32.strict.d64@b1.h8.q512.k512") == ["math"]


# Ranking without the device.


def test_offline_ranking_is_recorded_as_candidates_and_tried_first(home: Path) -> None:
    problem = "fp16.d64@b1.h16.q1024.k1024"
    (ranking,) = offline.rank("sm_90", [problem], budget=15.0)
    assert ranking.best and ranking.best == sorted(ranking.best, key=lambda c: c.predicted)
    with Database.for_reading(places.database()) as database:
        rows = database.measurements(status="candidate")
        assert [m.variant for m in rows] == [str(c.variant) for c in ranking.best]
        assert all(m.seconds is None and m.ratio is None and "not measured" in m.reason for m in rows)
        assert database.winners() == []
    task = Task(Problem.parse(problem), searches(Problem.parse(problem), H200, [], "local", 0, False))
    run = Run(
        SimpleNamespace(database=Database.for_writing(), device=H200), tuning.EFFORTS["quick"], 0.0, 1.0,
        lambda progress: None, [], [task],
    )  # fmt: skip
    recall.recall(run, task)
    asked = [str(v) for search in task.searches for v in search.ask(40)]
    assert {m.variant for m in rows} <= set(asked)
    with pytest.raises(BadDevice, match="use one of sm_52"):
        offline.rank("sm_42", [problem])


def test_kernels_compiled_here_are_found_built_there(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """compile on a machine without the GPU, import the manifest on one with it: its candidates need no compiler."""
    problem, ready = "fp32.d64@b1.h16.q1024.k1024", tmp_path / "ready"
    command = ["compile", "--for", "sm_90", "--problem", problem, "--budget", "12", "-o", str(ready)]
    done = CliRunner().invoke(cli.main, command)
    assert done.exit_code == 0 and "ELSA_TUNE_KERNELS" in done.output, (done.output, done.exception)
    monkeypatch.setenv("ELSA_TUNE_HOME", str(tmp_path / "there"))
    monkeypatch.setenv("ELSA_TUNE_KERNELS", str(ready / "kernels"))
    assert CliRunner().invoke(cli.main, ["db", "import", str(ready / offline.MANIFEST)]).exit_code == 0
    with Database.for_reading(places.database()) as database:
        rows = database.measurements(local=False, status="candidate")
    assert rows
    for m in rows:
        variant = parse(m.variant)
        backend = backends.get(variant.backend)
        assert backend.digest(variant, Problem.parse(m.problem), H200) == m.digest, "what the real device asks for"
        built = backend.find(m.digest)
        assert built is not None and built.path is not None and built.path.is_relative_to(ready)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "note.txt").write_text("keep me")
    with pytest.raises(FolderTaken, match="name another"):
        offline.hand_over([], "sm_90", tmp_path / "mine")


def test_the_model_knows_what_must_be_slower() -> None:
    goal, problem = offline.target("sm_80"), Problem.parse("fp16.d64@b1.h16.q4096.k4096")
    variant = SPACE.parse("triton.serial.half.m64.n64.warps4.stages3")
    lean = {"warps": 4, "registers": 128, "shared": 32 << 10, "loop_all": 300, "loop_matrix": 64, "loop_fma": 30}
    lean |= {"loop_exp": 30, "loop_shared": 40}
    base = offline.predict(variant, problem, lean, goal)
    assert base is not None
    for change in (
        {"loop_all": 3000},
        {"loop_exp": 900},
        {"loop_shared": 2000},
        {"registers": 255, "shared": 160 << 10},
    ):
        slower = offline.predict(variant, problem, {**lean, **change}, goal)
        assert slower is not None and slower > base, change
    assert offline.predict(variant, problem, {**lean, "shared": 200 << 10}, goal) is None
    longer = offline.predict(variant, problem.reshaped(q_len=8192, kv_len=8192), lean, goal)
    assert longer is not None and 3 < longer / base < 5


# Timing.


def test_a_lost_gpu_context_costs_one_process() -> None:
    with Worker() as worker:
        before = worker.run(_process, timeout=30.0)
        with pytest.raises(WorkerFailed, match="illegal memory access"):
            worker.run(_lost, timeout=30.0)
        assert worker.run(_process, timeout=30.0) != before
        with pytest.raises(WorkerFailed, match="only wrong"):
            worker.run(_wrong, timeout=30.0)


def _process() -> int:
    import os

    return os.getpid()


def _lost() -> None:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def _wrong() -> None:
    raise ValueError("only wrong")


def test_a_cpu_timer_takes_calls_in_turn() -> None:
    seen: list[int] = []
    timer = timing.timer([lambda i=i: seen.append(i) for i in range(3)], host_cpu(), "eager")  # type: ignore[misc]
    assert timer(4) > 0 and seen == [1, 2, 0, 1]
    assert peaks.clocks(H200) == {}, "no telemetry is no error"


def test_a_capture_that_fails_leaves_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own context stays on the capture's stream where ending the capture raises, too."""
    streams: list[object] = []

    class Ending:
        def __enter__(self) -> None:
            streams.append("capturing")

        def __exit__(self, *exception: object) -> None:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    side = SimpleNamespace(wait_stream=lambda other: None)
    here = SimpleNamespace(wait_stream=lambda other: None)
    fake = SimpleNamespace(
        CUDAGraph=object, Stream=lambda: side, current_stream=lambda: here, stream=lambda stream: nullcontext(),
        graph=lambda graph: Ending(), set_stream=streams.append,
    )  # fmt: skip
    monkeypatch.setattr(timing, "_cuda", lambda: fake)
    made: list[int] = []

    def call() -> None:
        made.append(1)
        if len(made) > 2:
            raise ValueError("no capturing")

    with pytest.raises(RuntimeError, match="previous error") as told:
        timing.timer([call, call], H200, "graph")
    assert streams == ["capturing", here] and "no capturing" in race._whole_story(told.value)


class Clocked:
    """What the timers ask of torch.cuda, on a CPU: events read a clock, a graph's replay calls what was captured."""

    capturing = False

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.at = 0.0

        def record(self) -> None:
            self.at = time.perf_counter()

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: Any) -> float:
            return 1e3 * float(end.at - self.at)

    class CUDAGraph:
        def replay(self) -> None:
            time.sleep(1e-4)

    def __init__(self) -> None:
        stream = SimpleNamespace(wait_stream=lambda other: None)
        self.Stream = self.current_stream = lambda: stream
        self.stream = lambda stream: nullcontext()
        self.synchronize = self.set_stream = lambda *stream: None

    @contextmanager
    def graph(self, graph: Any) -> Iterator[None]:
        self.capturing = True
        try:
            yield
        finally:
            self.capturing = False


@pytest.mark.parametrize("launch", ["eager", "graph"])
def test_a_race_by_events_and_from_graphs(monkeypatch: pytest.MonkeyPatch, launch: str) -> None:
    """The real race on a GPU that is not here: one contender cannot be captured, one cannot be launched; the others are
    timed, and the GPU is read meanwhile."""
    cuda, goal = Clocked(), replace(H200, caches=(1 << 16,), memory=1 << 30)
    monkeypatch.setattr(timing, "_cuda", lambda: cuda)
    monkeypatch.setattr(telemetry, "_instrument", lambda goal: (lambda: {"sm_mhz": 1755.0}, 0.0))
    monkeypatch.setattr(Device, "torch", property(lambda self: "cpu"))
    problem = Problem.parse(f"fp32.d16@b1.h2.q64.k64{'.graph' if launch == 'graph' else ''}")

    def contender(name: str, kernel: Callable[..., object]) -> Any:
        return SimpleNamespace(variant=name, device=goal, load=lambda problem: kernel)

    def uncaptured(*tensors: torch.Tensor) -> torch.Tensor:
        if cuda.capturing:
            raise RuntimeError("operation not permitted when stream is capturing")
        return scaled_dot_product_attention(*tensors)

    def broken(*tensors: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("invalid argument")

    plain = [contender(f"plain {i}", scaled_dot_product_attention) for i in range(2)]
    raced = race.race(problem, [plain[0], contender("a", uncaptured), contender("b", broken), plain[1]], 4, 5.0)
    assert set(raced.failed) == ({1, 2} if launch == "graph" else {2}) and "invalid argument" in raced.failed[2]
    assert raced.samples[0] and raced.samples[3] and raced.samples[2] == () and raced.reading["sm_mhz"] == 1755.0

    def lost() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    cuda.synchronize = lost
    with pytest.raises(RuntimeError, match=r"b: RuntimeError: invalid argument; after that, CUDA error: an illegal"):
        race.race(problem, [contender("b", broken), plain[0]], 4, 5.0)


def test_a_gpu_is_read_while_it_works(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    said = iter([{"sm_mhz": 1980.0, "watts": 300.0, "throttled": 4.0}, {"sm_mhz": 1200.0, "throttled": 64.0}, {"sm_mhz": 1700.0}])  # fmt: skip
    monkeypatch.setattr(telemetry, "_instrument", lambda goal: (lambda: next(said), 0.0))
    reading = telemetry.Gauge(H200)
    for _ in range(3):
        reading.read()
    assert reading.summary() == {"sm_mhz": 1700.0, "sm_mhz_low": 1200.0, "watts": 300.0, "throttled": 68.0}
    monkeypatch.undo()
    silent = telemetry.Gauge(H200)
    silent.read()
    assert silent.summary() == {}, "no telemetry is no error"
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho '1755, 2619, 655.10, [N/A], 0x0000000000000044'\n")
    program.chmod(0o755)
    asked = telemetry._ask(str(program), "uuid")
    assert asked == {"sm_mhz": 1755.0, "memory_mhz": 2619.0, "watts": 655.1, "throttled": 68.0}


def test_limits_by_class() -> None:
    rates = {"peak_fp32": 50e3, "peak_tf32": 400e3, "peak_fp16": 800e3, "peak_bf16": 800e3, "peak_gbytes": 4000.0}
    shape = "@b1.h16.q4096.k4096"
    least = {
        c: peaks.least_seconds(Problem.parse(c + shape), rates) for c in ("fp32.strict.d64", "fp32.d64", "fp16.d64")
    }
    assert least["fp32.strict.d64"] == pytest.approx(Problem.parse("fp32.d64" + shape).flops / 50e12)
    assert least["fp32.d64"] == pytest.approx(3 * Problem.parse("fp32.d64" + shape).flops / 400e12)
    assert least["fp16.d64"] == pytest.approx(Problem.parse("fp32.d64" + shape).flops / 800e12)
    assert peaks.least_seconds(Problem.parse("fp16.d64"), {}) is None


# Tuning and dispatch on a GPU that is not here.


class Rehearsed:
    """In place of a Worker: the jobs of a GPU, answered without one. Kernels take what the offline model says."""

    goal = offline.target("sm_90")
    built: list[Variant] = []

    def __init__(self, memory: int | None = None, count: int = 1) -> None:
        pass

    def __enter__(self) -> Rehearsed:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def run(self, job: Callable[..., Any], *arguments: Any, timeout: float) -> Any:
        return getattr(self, f"do_{job.__name__}")(*arguments)

    def do_build(self, variant: Variant, problem: Problem, goal: Device) -> Built:
        self.built.append(variant)
        work = backends.get(variant.backend).work(variant, problem, {"loop_all": 1, "loop_shared": 1})
        assert work is not None
        axes = {name: int(value) for name, value in variant.axes.items() if isinstance(value, int)}
        m, n, warps = work.block_m, work.step // axes["workers"], axes.get("warps") or axes["threads"] // 32
        if m * n > 8192:
            return Built(
                f"{variant}", None, {"registers": 255, "local": 9, "stack": 64}, "9 spills beside 255 registers"
            )
        resources = {"warps": warps, "registers": 64 + m * n // 64, "shared": 64 * n * 4}
        loop = {
            "loop_all": 60 + m * n // 16,
            "loop_matrix": m * n // 64,
            "loop_fma": 8,
            "loop_exp": 8,
            "loop_shared": 20,
        }
        return Built(f"{variant}", None, {**resources, **loop})

    def do_check_family(self, problem: Problem, candidate: Any, peers: Any) -> Verdict:
        wrong = "planted" if any(word in str(candidate.variant) for word in ("masked", "swizzled")) else ""
        return Verdict(1e-7, 0.5, wrong)

    def do_check_shape(self, problem: Problem, candidate: Any, incumbent: Any) -> Verdict:
        if str(candidate.variant) == "sdpa.cudnn":
            raise WorkerFailed("failed", "RuntimeError: No available kernel")
        return Verdict(1e-7, 0.5)

    def do_race(self, problem: Problem, contenders: Any, rounds: int, seconds: float, beat: float = 0.0) -> Any:
        samples = [tuple(self.seconds(problem, c) * (1 + 0.002 * i) for i in range(rounds)) for c in contenders]
        return Raced(samples, [0.0] * len(samples))

    def seconds(self, problem: Problem, contender: Any) -> float:
        name = str(contender.variant)
        if name.startswith("sdpa."):
            return {"sdpa.flash": 3e-4, "sdpa.efficient": 6e-4, "sdpa.flex": 5e-4, "sdpa.math": 3e-3}[name]
        return offline.predict(contender.variant, problem, contender.built.resources, self.goal) or 1.0

    def do_peak(self, goal: Device) -> dict[str, float]:
        return {"fp32": 5e4, "tf32": 4e5, "fp16": 1e6, "bf16": 8e5, "gbytes": 4e3}

    def do_clocks(self, goal: Device) -> dict[str, float]:
        return {"sm_mhz": 1980.0, "celsius": 40.0}


def test_tuning_a_gpu_from_end_to_end(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "Worker", Rehearsed)
    monkeypatch.setattr(tuning, "detect", lambda text: [H200])
    Rehearsed.built.clear()
    report = tuning.tune(
        ["fp16.d64@b1.h16.q4096.k4096", "fp16.d64@b1.h16.q4096.k4096.graph"], budget=30.0, effort="full"
    )
    assert report.complete and all(o.winner and o.winner.device == str(H200) for o in report.outcomes)
    with Database.for_reading(places.database()) as database:
        rows = database.measurements(device=str(H200))
    status = {m.status for m in rows}
    assert {"ok", "pruned", "failed"} <= status and "wrong" in status
    assert any(m.variant == "sdpa.cudnn" and m.status == "failed" and "No available kernel" in m.reason for m in rows)
    assert {m.incumbent for m in rows if m.status == "ok"} == {"sdpa.flash"}, "the fastest of torch's kernels"
    assert any(m.variant == "sdpa.flex" for m in rows), "there was time for it"
    assert any(m.provenance.get("celsius") == 40.0 and m.provenance.get("peak_fp16") == 1e6 for m in rows)
    best = max(m.ratio or 0 for m in rows if m.status == "ok")
    won = report.outcomes[0].winner
    assert won is not None and won.ratio is not None and won.ratio >= 0.98 * best and won.ratio > 1
    assert report.outcomes[0].limit is not None and 0 < report.outcomes[0].limit < 1
    assert len(set(Rehearsed.built)) <= len([m for m in rows if not m.variant.startswith("sdpa.")])


def a_run(problem: str) -> tuple[Run, Task]:
    """A run of one problem on the GPU that is not here, before its first turn."""
    posed = Problem.parse(problem)
    task = Task(posed, searches(posed, H200, []))
    task.target = 24
    trials = SimpleNamespace(database=None, device=H200)
    return Run(trials, tuning.EFFORTS["quick"], 0.0, 1.0, lambda progress: None, [], [task]), task


def test_every_turn_asks_every_backend_for_a_few() -> None:
    run, task = a_run("fp32.strict.d64@b1.h16.q1024.k1024")
    asked = turn.ask(run, task)
    assert [v.backend for v in asked] == ["cuda"] * 4 + ["triton"] * 4
    task.trials = 20
    assert len(turn.ask(run, task)) == 4, "as many as are missing"


def test_a_backend_that_was_never_tried_starts_in_the_final() -> None:
    """A budget that ends early, or whose trials of one backend took it all, names no winner for want of trying."""
    run, task = a_run("fp32.strict.d64@b1.h16.q1024.k1024")
    starts = {
        name: [search.ask(1)[0] for search in task.searches if search.backend == name] for name in ("cuda", "triton")
    }
    finalists = list(final.finalists(run, task))
    assert [v.backend for v in finalists] == ["cuda"] * 2 + ["triton"] * 2
    assert not {*starts["cuda"], *starts["triton"]} & {*finalists}
    facts = {"device": str(H200), "problem": str(task.problem), "variant": str(starts["cuda"][0])}
    task.note(Measurement(**facts, status="ok", ratio=1.5, incumbent="sdpa.math"))
    assert [v.backend for v in final.finalists(run, task)] == ["cuda", "triton", "triton"]
    facts["variant"] = str(starts["triton"][0])
    task.note(Measurement(**facts, status="wrong", reason="planted"))
    assert list(final.finalists(run, task)) == starts["cuda"], "one that was tried and failed is not asked again"


def test_the_doctor_starts_a_kernel_on_a_fresh_thread(here: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders, "build", lambda variant, problem, goal: triton.build(variant, problem, goal))
    threads: list[bool] = []
    call = triton.TritonKernel.__call__

    def counted(self: Any, *arguments: Any) -> Any:
        threads.append(threading.current_thread() is threading.main_thread())
        return call(self, *arguments)

    monkeypatch.setattr(triton.TritonKernel, "__call__", counted)
    assert doctor.launch("triton", here) < 1e-5 and threads == [False]


def test_the_doctor_says_which_launches_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    class Doctored(Rehearsed):
        def do_launch(self, backend: str, goal: Device) -> float:
            if backend == "cuda":
                raise WorkerFailed("failed", "CUDA error: invalid device context")
            return 2e-7

    monkeypatch.setattr(workers, "Worker", Doctored)
    monkeypatch.setattr(device, "gpus", lambda: (H200,))
    found = {f.topic: f for f in doctor._launches()}
    assert set(found) == {"launch, cuda", "launch, triton"} and found["launch, triton"].good
    assert "invalid device context" in found["launch, cuda"].detail and not found["launch, cuda"].good


@pytest.fixture
def here(home: Path, monkeypatch: pytest.MonkeyPatch) -> Device:
    """CPU tensors count as an H200's; its kernels run under Triton's interpreter."""
    monkeypatch.setattr(serving, "of_tensor", lambda kind, index: H200)
    monkeypatch.setattr(Device, "torch", property(lambda self: "cpu"))
    monkeypatch.setattr(triton, "compile_report", lambda module, problem, goal: {"registers": 1})
    monkeypatch.setattr(triton, "compile_kernels", lambda module, problem, goal: {})
    return H200


def gpu_won(problem: str, variant: str, goal: Device = H200, **more: Any) -> Measurement:
    posed, chosen = Problem.parse(problem), parse(variant)
    found: dict[str, Any] = dict(
        device=str(goal), problem=problem, variant=variant, status="ok", stage="final", error=1e-7, seconds=1e-3,
        digest=triton.digest(chosen, posed, goal), ratio=2.0, ratio_low=1.9, ratio_high=2.1, incumbent="sdpa.efficient",
        created=1.0,
    )  # fmt: skip
    return Measurement(**{**found, **more})


FORWARD = "triton.serial.ieee.m64.n64.warps4.stages1"


def test_attention_and_its_gradients_by_kernels_of_a_gpu(here: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[str] = []
    shape = "@b2.h4.q50.k50"
    for family in ("fp32.d16.causal", "fp32.d16.causal.backward"):
        triton.build(parse(FORWARD), Problem.parse(family), here)
        record(gpu_won(family + shape, FORWARD))
    for kind in (triton.TritonKernel, triton.TritonGradients):
        call = kind.__call__

        def counted(self: Any, *arguments: Any, _call: Any = call, **more: Any) -> Any:
            served.append(type(self).__name__)
            return _call(self, *arguments, **more)

        monkeypatch.setattr(kind, "__call__", counted)
    q, k, v = (x.requires_grad_() for x in tensors())
    with torch.no_grad():
        plain = elsa_tune.attention(q, k, v, is_causal=True)
    out = elsa_tune.attention(q, k, v, is_causal=True)
    found = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert served == ["TritonKernel", "TritonKernel", "TritonGradients"]
    expected = scaled_dot_product_attention(q, k, v, is_causal=True)
    wanted = torch.autograd.grad(expected.square().sum(), (q, k, v))
    assert torch.equal(plain, out) and torch.allclose(out, expected, atol=1e-6)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, wanted, strict=True))
    output, lse = elsa_tune.attention_with_lse(q.detach(), k.detach(), v.detach(), is_causal=True)
    assert torch.equal(output, plain) and lse.isfinite().all() and len(served) == 4


def test_without_a_tuned_backward_torch_differentiates(here: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchs, "takes", lambda *about: False)  # as of tensors on a GPU
    triton.build(parse(FORWARD), Problem.parse("fp32.d16"), here)
    record(gpu_won("fp32.d16@b2.h4.q50.k50", FORWARD))
    q, k, v = (x.requires_grad_() for x in tensors())
    out = elsa_tune.attention(q, k, v)
    assert torch.equal(out, scaled_dot_product_attention(q, k, v)) and out.grad_fn is not None


def test_a_driver_update_keeps_winners_after_a_check(here: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same GPU with other versions: the winner serves even with a small advantage, once it was checked again."""
    before = Device.parse("cuda:nvidia_h200-sm_90-c132-g140+d575.1_t12.8")
    record(gpu_won("fp32.d16@b2.h4.q50.k50", FORWARD, before, ratio_low=1.05))
    chosen = serving.explain(Problem.parse("fp32.d16@b2.h4.q50.k50"), here)
    assert chosen.rung == "versions" and str(chosen.variant) == FORWARD
    other = serving.explain(Problem.parse("fp32.d16@b2.h4.q60.k60"), here)
    assert other.by_sdpa, "a neighbour of a small advantage does not carry over"


def test_launch_and_class_decide(home: Path) -> None:
    shape = "@b1.h4.q50.k50"
    record(
        gpu_won(f"fp32.d16{shape}", FORWARD), gpu_won(f"fp32.d16{shape}.graph", f"{FORWARD}.heads"),
    )  # fmt: skip
    eager, graph = Problem.parse(f"fp32.d16{shape}"), Problem.parse(f"fp32.d16{shape}.graph")
    assert str(serving.explain(eager, H200).variant) == FORWARD
    assert str(serving.explain(graph, H200).variant) == f"{FORWARD}.heads"
    rough = serving.explain(eager.reshaped(precision="tf32"), H200)
    assert str(rough.variant) == FORWARD, "more exact than asked is welcome"
    assert serving.explain(eager.reshaped(precision="strict"), H200).by_sdpa, "never less exact than asked"


def test_scratch_grows_linearly_and_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory for the states of splits: as measured, so many floats a row, and never more than the budget."""
    variant = parse("triton.blelloch.ieee.m16.n16.warps4.stages1.s4.two_kernels")
    problem = Problem.parse("fp32.d16")
    kernel = triton.load(triton.build(variant, problem), variant, problem)
    sizes: list[int] = []
    new_empty = torch.Tensor.new_empty

    def measured(self: torch.Tensor, size: Any, **options: Any) -> torch.Tensor:
        if options.get("dtype") is torch.float32:
            sizes.append(size)
        return new_empty(self, size, **options)

    monkeypatch.setattr(torch.Tensor, "new_empty", measured)
    outputs = []
    for n in (16, 32, 64):
        x = torch.randn(1, 2, n, 16, generator=torch.Generator().manual_seed(0))
        outputs.append(kernel(x, x, x))
    assert sizes == [2 * 4 * n * 18 for n in (16, 32, 64)]
    sizes.clear()
    module = triton._module(triton.build(variant, problem).path)  # type: ignore[arg-type]
    monkeypatch.setattr(module, "SCRATCH_BYTES", 4 * 4 * 64 * 18)
    assert torch.equal(module.attention(x, x, x), outputs[-1]) and sizes == [4 * 64 * 18], "one head at a time"
