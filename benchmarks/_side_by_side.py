"""What the benchmarks share: tuning what is not tuned yet, turns, memory, versions, and where results go."""

from __future__ import annotations

import importlib.metadata
import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from elsa_tune.device import host_cpu
from elsa_tune.remember import layers
from elsa_tune.tuning import race
from elsa_tune.tuning import tune as tuning

RESULTS = Path(__file__).parent / "results"


def version(package: str) -> str:
    """The installed version, or that there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def was_tuned(problem: str) -> bool:
    """Whether a generated variant was in a final for the problem on this device."""
    found = next((layer.database for layer in layers.layers() if layer.name == "own"), None)
    rows = found.measurements(device=str(host_cpu()), problem=problem, stage="final") if found else []
    return any(not m.is_rival for m in rows)


def tune_first(problems: Iterable[str], seconds: float) -> None:
    """Tune those that are not tuned yet on this CPU, ``seconds`` for each."""
    untuned = [p for p in dict.fromkeys(problems) if not was_tuned(p)]
    if untuned:
        print(f"tuning {len(untuned)} problems first", flush=True)
        tuning.tune(untuned, device="cpu", budget=seconds * len(untuned))


def results_file(prefix: str = "") -> Path:
    """Where this CPU's results go."""
    return RESULTS / f"{prefix}{str(host_cpu()).replace(':', '-')}.json"


def timed(call: Callable[[], Any], repeats: int = 1) -> float:
    """Seconds of a call."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def in_turns(racing: Mapping[str, Callable[[], Any]], rounds: int, seconds: float, pause: float) -> dict[str, Any]:
    """Rounds in which everyone is timed once, in turns, at least five and then until ``seconds`` are over; by name how many times as long
    each took as "elsa-tune". Everyone was called before. Between samples it pauses: threads spin for a while after they finish."""
    repeats = {name: max(1, min(200, round(0.004 / timed(call)))) for name, call in racing.items()}
    samples: dict[str, list[float]] = {name: [] for name in racing}
    end = time.perf_counter() + seconds
    for number in range(rounds):
        if number >= 5 and time.perf_counter() > end:
            break
        for name in random.Random(number).sample(list(racing), len(racing)):
            time.sleep(pause)
            timed(racing[name])
            samples[name].append(timed(racing[name], repeats[name]))
    peers = {}
    for name, each in samples.items():
        found = race.ratio(each, samples["elsa-tune"])
        peers[name] = {"ratio": found.median, "low": found.low, "high": found.high, "seconds": each}
    return peers


def mib_of(call: Callable[[], Any]) -> float:
    """MiB that a call adds to what this process has, at most, what it returns included. Linux tells it."""
    before = _kilobytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    _kept = call()
    return (_kilobytes("VmHWM") - before) / 1024


def _kilobytes(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    assert found is not None
    return int(found[1])


def told_by(*arguments: str, **variables: str) -> list[float]:
    """The numbers that a process of its own prints, a Python with these arguments and variables."""
    environment = {**os.environ, **variables}
    told = subprocess.run([sys.executable, *arguments], stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return [float(word) for word in told.stdout.split()]


def write(prefix: str, packages: Iterable[str] = ("elsa-tune", "torch"), **content: Any) -> None:
    """Write this CPU's results, with where, when and with what they were measured."""
    whole = {
        "device": str(host_cpu()), "name": host_cpu().name, "threads": torch.get_num_threads(),
        "versions": {p: version(p) for p in packages}, "date": time.strftime("%Y-%m-%d"), **content,
    }  # fmt: skip
    path = results_file(prefix)
    path.write_text(json.dumps(whole, indent=1))
    print(f"written to {shown(path)}")


def shown(path: Path) -> Path:
    """A path as a reader in the current folder writes it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
