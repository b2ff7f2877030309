"""How much sooner several workers find the best variant than one, on recorded timings.

Workers are processes that share one study; a trial lasts as long as ``--seconds``, and its answer comes from records. Asked:
wall time from the start until the best recorded variant of a problem is told.
"""

from __future__ import annotations

import argparse
import json
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ASKED = {"2": 0.6, "8": 0.2}
"""At most, of one worker's time."""
sys.path.insert(0, str(ROOT / "tests"))

from postgres import Cluster, programs  # noqa: E402
from rehearsal import RECORDED  # noqa: E402


def seconds_to_best(storage: str, problem: str, workers: int, seconds: float, seed: int) -> float:
    """Wall seconds until somebody has tried the best variant."""
    best = max(RECORDED[problem], key=lambda name: RECORDED[problem][name] or 0)
    program = str(ROOT / "tests" / "rehearsal.py")
    processes = [
        subprocess.Popen(
            [sys.executable, program, storage, f"s{seed}n{workers}w{i}", problem, str(seconds), str(1000 * seed + i)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for i in range(workers)
    ]  # fmt: skip
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    start = time.time()
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    found: queue.SimpleQueue[float] = queue.SimpleQueue()

    def listen(process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            at, variant = json.loads(line)
            if variant == best:
                found.put(at)

    for process in processes:
        threading.Thread(target=listen, args=(process,), daemon=True).start()
    end = found.get()
    for process in processes:
        process.kill()
        process.wait()
    return end - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=0.25, help="of a trial")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "fleet.json")
    options = parser.parse_args()
    problems = sorted(RECORDED)
    times: dict[int, list[float]] = {1: [], 2: [], 8: []}
    with tempfile.TemporaryDirectory() as name:
        cluster = Cluster(Path(name) / "cluster") if programs() else None
        for seed in range(options.seeds):
            for problem in problems:
                for workers in times:  # in turns, so that a busy machine is busy for all
                    label = f"s{seed}p{problems.index(problem)}w{workers}"
                    storage = cluster.empty(label) if cluster else f"journal:{name}/{label}.log"
                    times[workers].append(seconds_to_best(storage, problem, workers, options.seconds, seed))
                print(problem, {n: round(t[-1], 2) for n, t in times.items()}, flush=True)
        if cluster:
            cluster.stop()
    total = {n: sum(t) for n, t in times.items()}
    found = {
        "storage": "postgresql" if cluster else "journal", "seconds_of_a_trial": options.seconds, "problems": problems, "asked": ASKED,
        "seconds_to_best": {str(n): [round(x, 2) for x in t] for n, t in times.items()},
        "share_of_one": {str(n): round(total[n] / total[1], 3) for n in times},
        "share_of_one_median": {str(n): round(statistics.median(a / b for a, b in zip(t, times[1], strict=True)), 3) for n, t in times.items()},
    }  # fmt: skip
    print(json.dumps(found, indent=1))
    options.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
