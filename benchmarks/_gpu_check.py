"""Small checks of every family in one process, as compute-sanitizer wants them, and compute-sanitizer itself."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from _gpu_lists import checks
from _gpu_log import Log
from elsa_tune import backends, check, reference
from elsa_tune.device import Device
from elsa_tune.problem import Problem
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
            kernel, problem, reference.with_forward(problem, inputs, generator).to(device.torch)
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
    wrong = number = 0
    listed = checks(device)
    for number, (problem, variant) in enumerate(listed, 1):
        if time.monotonic() > deadline:
            print(f"out of time before {len(listed) - number + 1} checks", flush=True)
            break
        start = time.monotonic()
        try:
            said = check_once(problem, variant, device)
        except Exception as error:
            said = f"RAISED: {type(error).__name__}: {error}"
        wrong += said.startswith(("WRONG", "RAISED"))
        print(f"{problem} {variant}: {said} ({time.monotonic() - start:.1f} s)", flush=True)
    print(f"{number} checks, {wrong} bad", flush=True)


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
    checks = [sys.executable, script, "--check", "--device", str(device), "--minutes", str(max(0.0, seconds - 12) / 60)]
    start = time.monotonic()
    try:
        done = subprocess.run(
            [program, "--tool", tool, *checks],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=seconds,
            check=False,
            env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},  # every tensor has bounds of its own
        )
        said, code = done.stdout, done.returncode
    except subprocess.TimeoutExpired as error:
        said, code = error.stdout or b"", None
    text = said.decode(errors="replace")
    found = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", text)
    errors = int(found[-1]) if found else None
    log.line(
        tool, f"{'no summary' if errors is None else f'{errors} errors'} in {time.monotonic() - start:.0f} s, exit code {code}",
        errors=errors, code=code, said=[line for line in text.splitlines() if "=========" in line][:60], tail=text[-1500:],
    )  # fmt: skip
