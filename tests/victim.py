"""A program that is killed again and again while it writes to one database; it ends with what was acknowledged.

Run with a folder, a number of kills and a seed; prints one JSON line: acknowledged names, and kills by what was going on.
"""

from __future__ import annotations

import json
import os
import random
import select
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import sqlite_utils as _sqlite_utils  # noqa: F401  what a child imports is no time to be killed in

from elsa_tune.measurement import Measurement
from elsa_tune.remember import foreign, lines, repair
from elsa_tune.remember.database import Database

DEVICE = "cpu:amd_f26m2-zen5-c2"


def made(number: int, stage: str = "final") -> Measurement:
    """A measurement that no other number makes; every thirtieth is of the same problem."""
    ratio = 1.2 + number % 97 / 100
    return Measurement(
        device=DEVICE, problem=f"fp32.d64@b1.h8.q{1 + number % 30}.k1024", variant="cpp.serial.avx512.l16.q3.k8.v8.n64", status="ok",
        stage=stage, ratio=ratio, ratio_low=ratio - 0.01, ratio_high=ratio + 0.01, error=1e-7, seconds=1e-3, samples=(1e-3,) * 5,
        incumbent="sdpa.flash", incumbent_samples=(2e-3,) * 5, provenance={"torch": "2", "number": number}, created=float(number + 1),
    )  # fmt: skip


def recording(folder: Path, first: int, tell: int) -> None:
    with Database.for_writing(folder / "measurements.db") as database:
        for number in range(first, first + 1_000_000):
            measurement = made(number)
            database.record(measurement)
            os.write(tell, measurement.id.encode())  # acknowledged


def importing(folder: Path, first: int, tell: int) -> None:
    source = folder / f"import-{first}.jsonl"
    rows = [made(number) for number in range(first, first + 300)]
    lines.write(rows, source)
    with Database.for_writing(folder / "measurements.db") as database:
        database.add(foreign.read(source, Counter()), at_once=50)
        for measurement in rows:
            os.write(tell, measurement.id.encode())
    time.sleep(60)


def merging(folder: Path, first: int, tell: int) -> None:
    for number in (first, first + 100):
        lines.write([made(n) for n in range(number, number + 100)], folder / f"merge-{number}.jsonl")
    while True:
        foreign.merge([str(folder / f"merge-{n}.jsonl") for n in (first, first + 100)], folder / "merged.jsonl")


def main(folder: Path, kills: int, seed: int) -> None:
    rng = random.Random(seed)
    acknowledged: list[str] = []
    interrupted: Counter[str] = Counter()
    lines.write([made(0)], folder / "merged.jsonl")
    for turn in range(kills):
        what = (recording, recording, importing, merging)[turn % 4]
        ear, mouth = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(ear)
            try:
                what(folder, 10_000 * (turn + 1), mouth)
            finally:
                os._exit(1)
        os.close(mouth)
        heard = b""
        end = time.monotonic() + rng.uniform(0.004, 0.12)
        while (left := end - time.monotonic()) > 0:
            if select.select([ear], [], [], left)[0]:
                heard += os.read(ear, 1 << 16)
        os.kill(child, signal.SIGKILL)
        while portion := os.read(ear, 1 << 16):
            heard += portion
        os.close(ear)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), f"{what.__name__} ended by itself"
        interrupted[what.__name__] += 1
        whole = len(heard) // 24 * 24
        acknowledged += [heard[i : i + 24].decode() for i in range(0, whole, 24)]
        assert len(list(foreign._lines(folder / "merged.jsonl"))) in (1, 200), "half a merge"
    health = repair.verify(folder / "measurements.db")
    print(
        json.dumps(
            {"acknowledged": acknowledged, "kills": interrupted, "damaged": health.damaged, "aside": len(health.aside)}
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
