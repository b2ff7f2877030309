"""Kernels for devices without Python: headers in programs of their own, kits built and run, their results brought home."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from elsa_tune import device as devices
from elsa_tune import space
from elsa_tune.device import Device, host_cpu
from elsa_tune.errors import BadDevice, FolderTaken, KernelMissing
from elsa_tune.problem import Problem
from elsa_tune.remember.database import Database
from elsa_tune.shell import cli
from elsa_tune.ship import export, kit
from elsa_tune.tuning import recall
from elsa_tune.tuning import tune as tuning
from elsa_tune.tuning.run import Run
from elsa_tune.tuning.search import searches
from elsa_tune.tuning.task import Task
from elsa_tune.tuning.trial import Trials
from elsa_tune.tuning.worker import Worker

ARM = pytest.mark.skipif(
    shutil.which("aarch64-linux-gnu-g++") is None or shutil.which("qemu-aarch64") is None,
    reason="needs Debian's g++-aarch64-linux-gnu and qemu-user",
)
OPENCL = pytest.mark.skipif(
    not Path("/usr/include/CL/cl.h").is_file(), reason="needs Debian's opencl-c-headers and ocl-icd-opencl-dev"
)
SMALL = ("fp32.d64@b1.h2.q40.k50", "fp32.d40.v24.causal@b2.h4.kv2.q33.k33", "fp32.d128@b1.h8.kv2.q1.k600")
HALVES = ("fp16.d32.causal@b1.h4.kv2.q40.k50", "bf16.d40.v24@b2.h2.q30.k90")


def invoke(*arguments: str) -> str:
    done = CliRunner().invoke(cli.main, arguments)
    assert done.exit_code == 0, done.output
    return done.output


def run(folder: Path, *settings: str, environment: dict[str, str] | None = None) -> str:
    """``make run`` in a kit: its table."""
    command = ["make", "-C", str(folder), "run", "SECONDS=0.05", *settings]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **(environment or {})}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WRONG" not in done.stdout
    return done.stdout


def bring_home(folder: Path, problems: tuple[str, ...]) -> list[str]:
    """Import a kit's results; the variants that are now known as measured on its device."""
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert f"{len(lines)} measurements, {len(lines)} of them new" in invoke(
        "db", "import", str(folder / "results.jsonl")
    )
    with Database.for_writing() as database:
        rows = [m for problem in problems for m in database.measurements(device=lines[0]["device"], problem=problem)]
        assert len(rows) == len(lines) and all(m.status == "ok" and m.seconds and m.error is not None for m in rows)
        assert not database.winners(), "a kit compares with a plain kernel, which makes nobody a winner over torch"
        invoke("db", "import", str(folder / "results.jsonl"))
        assert len(database.measurements(device=lines[0]["device"])) == len(lines), "twice is once"
    return [m.variant for m in rows]


@ARM
def test_a_kit_for_arm_runs_under_an_emulator(tmp_path: Path, home: Path) -> None:
    folder = tmp_path / "kit"
    output = invoke("kit", "--device", "aarch64", *(w for p in SMALL for w in ("--problem", p)), "-o", str(folder))
    assert "make run" in output
    table = run(folder, "CXX=aarch64-linux-gnu-g++ -static", "RUN=qemu-aarch64")
    assert all(problem in table for problem in SMALL) and "plain" in table
    assert all(variant.startswith("cpp.") and ".neon." in variant for variant in bring_home(folder, SMALL))


def _opencl_kit(tmp_path: Path) -> str:
    """Why it cannot be tried, if it cannot."""
    if not devices.opencl_devices():
        return "needs an OpenCL device: apt-get install pocl-opencl-icd"
    problems = SMALL + HALVES
    headers = kit.make("opencl", tmp_path / "kit", problems)
    assert {h.problem.family for h in headers} == {Problem.parse(p).family for p in problems}
    assert any(h.variant.axes["schedule"] == "two_kernels" for h in headers)
    run(tmp_path / "kit")
    bring_home(tmp_path / "kit", problems)
    here = devices.opencl_devices()[0]
    with Database.for_writing() as database:
        assert {m.device for m in database.measurements()} == {str(here)}, (
            "the runner spells the device as elsa-tune does"
        )
        fastest = max(database.measurements(problem=SMALL[0]), key=lambda m: m.ratio or 0)
    assert str(export.best(Problem.parse(SMALL[0]), here)[0]) == fastest.variant, "what the kit measured leads"
    return ""


@OPENCL
@pytest.mark.opencl
def test_an_opencl_kit_runs_on_the_cpu_device(tmp_path: Path, home: Path) -> None:
    """In a process of its own: PoCL's compiler ends one where another of its kind was loaded."""
    with ProcessPoolExecutor(1, get_context("spawn")) as alone:
        if absent := alone.submit(_opencl_kit, tmp_path).result():
            pytest.skip(absent)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_a_cuda_kit_compiles(tmp_path: Path, home: Path) -> None:
    kit.make("sm_80", tmp_path / "kit", ["fp16.d32.causal@b1.h4.kv2.q40.k50", SMALL[2]])
    command = ["make", "-C", str(tmp_path / "kit"), "runner", "NVCC=nvcc -Werror all-warnings"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:3000]


@pytest.mark.slow
def test_a_kit_for_a_jetson(tmp_path: Path, home: Path) -> None:
    """The issue's own example: a workload by name, kernels that fit 48 KB, C++14 and the target in the Makefile."""
    invoke("kit", "--device", "sm_62", "--workload", "vit", "-o", str(tmp_path / "kit"))
    assert "-std=c++14" in (tmp_path / "kit" / "Makefile").read_text()
    assert "ARCH ?= sm_62" in (tmp_path / "kit" / "Makefile").read_text()
    headers = list((tmp_path / "kit" / "kernels").glob("*.h"))
    assert len(headers) >= 6 and all("cp.async" not in h.read_text() for h in headers)
    names = {path.name for path in (tmp_path / "kit").iterdir()}
    assert names == {"Makefile", "README.md", "runner.cu", "kernels"}


PROGRAM = """
#include <cstdio>
#include "attention_d64.h"
int main() {
  static float q[2 * 5 * 64], k[1 * 7 * 64], v[1 * 7 * 64], out[2 * 5 * 64], lse[2 * 5];
  for (int i = 0; i < 640; ++i) q[i] = (i * 37 % 101) / 50.0f - 1;
  for (int i = 0; i < 448; ++i) k[i] = (i * 53 % 97) / 48.0f - 1, v[i] = (i * 29 % 89) / 44.0f - 1;
  elsa_attention_call call{q, k, v, out, lse, 1, 2, 1, 5, 7, {640, 320, 64}, {448, 448, 64}, {448, 448, 64}, {640, 320, 64}, 0.125, nullptr};
  if (attention_fp32_d64_workspace(&call) || attention_fp32_d64(&call, 2)) return 1;
  for (float x : out) std::printf("%.9g\\n", x);
  for (float x : lse) std::printf("%.9g\\n", x);
}
"""


def test_a_header_in_a_program_of_its_own(tmp_path: Path, home: Path) -> None:
    """The winner of a problem, exported, compiled into an example without Python, agrees with torch."""
    invoke("export", "fp32.d64@b1.h2.kv1.q5.k7", "-o", str(tmp_path / "attention_d64.h"))
    (tmp_path / "example.cpp").write_text(PROGRAM)
    problem = Problem.parse("fp32.d64")
    flags = export.header(export.best(problem, host_cpu())[0], problem).kernel.flags
    command = [
        "g++",
        *flags,
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-psabi",
        "-Wno-unused-function",
        "example.cpp",
        "-o",
        "example",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:3000]
    shown = subprocess.run([str(tmp_path / "example")], capture_output=True, text=True, check=True).stdout.split()
    numbers = torch.tensor([float(x) for x in shown])

    def made(count: int, a: int, b: int, c: float) -> torch.Tensor:
        return torch.tensor([(i * a % b) / c - 1 for i in range(count)], dtype=torch.float64)

    q, k, v = (
        made(640, 37, 101, 50).view(1, 2, 5, 64),
        made(448, 53, 97, 48).view(1, 1, 7, 64),
        made(448, 29, 89, 44).view(1, 1, 7, 64),
    )
    scores = q @ k.mT / 8
    expected = torch.cat([(scores.softmax(-1) @ v).flatten(), scores.logsumexp(-1).flatten()])
    assert torch.allclose(numbers.double(), expected, atol=2e-6)


def test_what_a_kit_measured_is_tried_first_and_never_compared(home: Path) -> None:
    problem = Problem.parse("fp32.d64@b1.h2.q64.k64")
    variant = f"cpp.serial.{host_cpu().isas[0]}.l{space.parse(str(export.best(problem, host_cpu())[0])).axes['lanes']}.q2.k4.v4.n16"
    row = {
        "device": str(host_cpu()), "problem": str(problem), "variant": variant, "status": "ok", "seconds": 1e-6, "ratio": 900.0,
        "ratio_low": 800.0, "ratio_high": 1000.0, "samples": [1e-6, 1e-6], "incumbent": "plain", "error": 1e-8,
    }  # fmt: skip
    (home.parent / "results.jsonl").write_text(json.dumps(row) + "\n")
    invoke("db", "import", str(home.parent / "results.jsonl"))
    with Database.for_writing() as database, Worker() as worker:
        task = Task(problem, searches(problem, host_cpu(), [], "local", 0, False))
        run = Run(Trials(database, worker, host_cpu()), tuning.EFFORTS["quick"], 0.0, 0.0, lambda p: None, [], [task])
        recall.recall(run, task)
        assert not task.latest and task.best == 1.0
        asked = [str(v) for _ in range(12) for v in task.searches[0].ask(1)]
        assert variant in asked


def test_mistakes_are_messages(home: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(FolderTaken, match="name another"):
        kit.make("sm_62", tmp_path)
    with pytest.raises(BadDevice, match="not for hip"):
        kit.make("gfx942", tmp_path / "kit")
    with pytest.raises(BadDevice, match="sm_62, gfx942, cortex_a72"):
        devices.named("toaster")
    with pytest.raises(KernelMissing, match="give --problem"):
        kit.make("cortex_a72", tmp_path / "kit", ["bf16.d64@b1.h1.q64.k64"])
    with pytest.raises(KernelMissing, match="cannot be a header"):
        export.header(space.parse("sdpa.math"), Problem.parse("fp32.d64"))
    missing = CliRunner().invoke(cli.main, ["db", "import", str(tmp_path / "nowhere.jsonl")])
    assert missing.exit_code == 2 and "nowhere.jsonl" in missing.output
    assert devices.named("cpu:arm_0x41_0xd08-cortex_a72-c4") == Device("cpu", "arm_0x41_0xd08", "cortex_a72", 4)
