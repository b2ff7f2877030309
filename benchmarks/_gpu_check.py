"""Small checks of every family in one process, as compute-sanitizer wants them, and compute-sanitizer itself."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from _gpu_lists import checks
from _gpu_log import Log
from elsa_tune.device import Device
from elsa_tune.generate import backends
from elsa_tune.problem import Problem
from elsa_tune.prove import check, gradients, reference
from elsa_tune.variant import Variant

PLACES = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer", "/opt/cuda/bin", "/opt/cuda/compute-sanitizer")


def check_once(problem: Problem, variant: Variant, device: Device) -> str:
    """Build, call once on random inputs between canaries, and compare with float64: the verdict, as a sentence."""
    kernel = backends.get(variant.backend).load(
        backends.get(variant.backend).build(variant, problem, device), variant, problem
    )
    generator = torch.Generator().manual_seed(0)
    inputs, stray = reference.random_inputs(problem, generator), ""
    if problem.direction == "backward":
        error = check.gradient_error(
            kernel, problem, gradients.with_forward(problem, inputs, generator).to(device.torch)
        )
    else:
        rows = reference.every_row(problem)
        truth = reference.attention_rows(problem, inputs, rows)
        there = inputs.to(device.torch)
        out, stray = check.run(kernel, there)
        error = reference.measure_error(problem, there, rows, out, truth)
    verdict = check.judge(problem, problem.shape, error, stray)
    return f"WRONG: {verdict.reason}" if verdict.reason else f"error {verdict.error:.1e}"


def check_here(device: Device, deadline: float) -> None:
    """Print a verdict for each check until the deadline; what raises is told and costs nobody else."""
    wrong = done = 0
    listed = checks(device)
    for problem, variant in listed:
        if time.monotonic() > deadline:
            print(f"out of time before {len(listed) - done} checks", flush=True)
            break
        start = time.monotonic()
        try:
            said = check_once(problem, variant, device)
        except Exception as error:
            said = f"RAISED: {type(error).__name__}: {error}"
        done += 1
        wrong += said.startswith(("WRONG", "RAISED"))
        print(f"{problem} {variant}: {said} ({time.monotonic() - start:.1f} s)", flush=True)
    print(f"{done} checks, {wrong} bad", flush=True)


def run_for(command: list[str], seconds: float, environment: Mapping[str, str]) -> tuple[int | None, str]:
    """Exit code and output of a command that is ended after so many seconds (then None), with everything that it started."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, **environment},
        start_new_session=True,
    )
    try:
        said, code = process.communicate(timeout=seconds)[0], process.returncode
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        said, code = process.communicate()[0], None
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
    return code, said.decode(errors="replace")


def sanitizer() -> str | None:
    """Where compute-sanitizer is."""
    return shutil.which("compute-sanitizer", path=os.pathsep.join((os.environ.get("PATH", ""), *PLACES)))


def sanitize(tool: str, device: Device, log: Log, seconds: float) -> None:
    """The small checks under one of compute-sanitizer's tools, for so many seconds: how many errors it saw, and its words."""
    program = sanitizer()
    if program is None:
        log.line(tool, "compute-sanitizer is not here; install NVIDIA's CUDA toolkit", absent=True)
        return
    script = str(Path(__file__).with_name("gpu.py"))
    checks = [sys.executable, script, "--check", "--device", str(device), "--minutes", str(max(0.0, seconds - 10) / 60)]
    start, environment = time.monotonic(), {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # every tensor has bounds of its own
    code, text = run_for([program, "--tool", tool, *checks], seconds, environment)
    found = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", text)
    errors = int(found[-1]) if found else None
    log.line(
        tool, f"{'no summary' if errors is None else f'{errors} errors'} in {time.monotonic() - start:.0f} s, exit code {code}",
        errors=errors, code=code, said=[line for line in text.splitlines() if "=========" in line][:60], tail=text[-1500:],
    )  # fmt: skip
