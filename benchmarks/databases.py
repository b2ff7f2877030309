"""How long databases of many measurements take to write, read, merge and look up, and how large they are.

One run, this machine; the measurements are invented, in the mix that tuning records.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

from elsa_tune.device import host_cpu
from elsa_tune.generate import lawful
from elsa_tune.measurement import Measurement
from elsa_tune.problem import Problem
from elsa_tune.remember import foreign, lines, repair
from elsa_tune.remember.database import Database
from elsa_tune.space import Space

ROOT = Path(__file__).resolve().parent.parent
ASKED = {"import_seconds": 10, "export_seconds": 10, "merge_seconds": 20, "bytes_each": 400, "first_dispatch_ms": 20}
"""At most, of 100,000 measurements."""

DISPATCH = """
import time, torch, elsa_tune
from elsa_tune.dispatch import attention as dispatch
from elsa_tune.dispatch import serving
q = torch.randn(1, 2, 96, 16)
start = time.perf_counter()
elsa_tune.attention(q, q, q)
seconds = time.perf_counter() - start
assert serving.table[serving.entry_of(q, q, q, False, False)].call, "torch served"
start = time.perf_counter()
torch.nn.functional.scaled_dot_product_attention(q, q, q)
print(seconds)
"""


def invented(count: int, seed: int) -> Iterator[Measurement]:
    """Measurements as tuning makes them: per problem two of torch's kernels, trials of five rounds, four finals of 25."""
    rng, made = random.Random(seed), 0
    here, others = (
        str(host_cpu()),
        ["cpu:amd_f25m17-zen4-c8", "cpu:intel_f6m143-sapphirerapids-c16", "cpu:arm_0x41_0xd0c-neoverse_n1-c4"],
    )
    space = Space.read("cpp")
    problems = [Problem(head_dim=d, mask=mask, batch=b, heads=h, q_len=n, kv_len=n)
                for d in (16, 32, 64, 96, 128) for mask in ("none", "causal") for b in (1, 2, 4, 8) for h in (2, 8, 12)
                for n in (97, 128, 256, 512, 1024, 2048)]  # fmt: skip
    pools = {
        d: list(
            islice(
                lawful.variants(space, Problem(head_dim=d, q_len=512, kv_len=512), host_cpu(), rng=random.Random(d)),
                400,
            )
        )
        for d in (16, 32, 64, 96, 128)
    }
    while made < count:
        device = rng.choice([here, here, *others])
        facts = {"compiler": "g++ 12.2.0", "openmp": "libgomp.so.1", "python": "3.11.7", "torch": "2.13.0",
                 "peak_gflops": rng.uniform(200, 500), "peak_gbytes": rng.uniform(20, 50), "installation": f"{rng.getrandbits(64):016x}"}  # fmt: skip
        for problem in rng.sample(problems, 20):
            base = problem.flops / 2e11
            race = tuple(base * rng.gauss(1, 0.02) for _ in range(25))
            for number, variant in enumerate(rng.sample(pools[problem.head_dim], 14)):
                final = number < 4
                own = tuple(base / 2 * rng.gauss(1, 0.02) for _ in range(25 if final else 5))
                against = race if final else tuple(base * rng.gauss(1, 0.02) for _ in range(5))
                spelled = str(variant)
                middle = rng.uniform(1.1, 2.5)
                digest = hashlib.sha256(f"{device} {problem.family} {spelled}".encode()).hexdigest()[:20]
                yield Measurement(
                    device=device, problem=str(problem), variant=spelled, status="ok", stage="final" if final else "trial",
                    digest=digest, error=rng.uniform(1e-8, 4e-7), constant=rng.random(), seconds=base / 2,
                    ratio=middle, ratio_low=middle * 0.98, ratio_high=middle * 1.02, samples=own, incumbent="sdpa.flash",
                    incumbent_samples=against, provenance=facts, created=1.79e9 + rng.random() * 1e6,
                    resources={"depth": 0, "merges": 0, "hot_fmas": 100 + len(spelled) * int(variant.axes["key_tile"]), "hot_spills": 0},
                )  # fmt: skip
                made += 1
                if made == count:
                    return


def timed(what: Callable[[], object]) -> float:
    start = time.perf_counter()
    what()
    return time.perf_counter() - start


def first_dispatch(home: Path, repeats: int) -> list[float]:
    """Seconds of the first call of attention in a fresh process with this home."""
    environment = {**os.environ, "ELSA_TUNE_HOME": str(home)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # as users run it
    return [float(subprocess.run([sys.executable, "-c", DISPATCH], env=environment, capture_output=True, text=True, check=True).stdout)
            for _ in range(repeats)]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "databases.json")
    options = parser.parse_args()
    found: dict[str, object] = {"device": str(host_cpu()), "measurements": options.count, "asked": ASKED}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number in (1, 2):
            lines.write(invented(options.count, number), folder / f"{number}.jsonl")
        with Database.for_writing(folder / "one.db") as database:
            found["import_seconds"] = timed(lambda: foreign.import_from(str(folder / "1.jsonl"), database))
            found["export_seconds"] = timed(lambda: lines.write(database, folder / "again.jsonl"))
            assert (folder / "again.jsonl").read_bytes() == (folder / "1.jsonl").read_bytes()
            database.pack()
            found["bytes_each"] = (folder / "one.db").stat().st_size / len(database)
        both = [str(folder / "1.jsonl"), str(folder / "2.jsonl")]
        found["merge_seconds"] = timed(lambda: foreign.merge(both, folder / "both.jsonl"))
        found["verify_seconds"] = timed(lambda: repair.verify(folder / "one.db"))
        home = folder / "home"
        os.environ["ELSA_TUNE_HOME"] = str(home)
        tune = "import elsa_tune.tuning.tune as t; r = t.tune(['fp32.d16@b1.h2.q96.k96'], budget=8); print(r.outcomes[0].winner.variant)"
        subprocess.run([sys.executable, "-c", tune], check=True)
        found["first_dispatch_ms_few"] = [round(1e3 * s, 1) for s in first_dispatch(home, 7)]
        with Database.for_writing(home / "measurements.db") as database:
            foreign.import_from(str(folder / "1.jsonl"), database)
        found["first_dispatch_ms"] = [round(1e3 * s, 1) for s in first_dispatch(home, 7)]
    print(json.dumps(found, indent=1))
    options.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
