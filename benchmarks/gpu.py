"""Side by side on a GPU, in one interleaved run: elsa-tune's Triton and CUDA C, torch's flash, memory-efficient, cuDNN and math
kernels, and compiled FlexAttention.

Runs from a checkout with PYTHONPATH alone:  PYTHONPATH=. python benchmarks/gpu.py --minutes 8
Problems that are not tuned yet are tuned first. Every kernel is checked against float64 before it is timed, on inputs that
outgrow the last-level cache. Prints losses like wins; writes benchmarks/results/<device>.json and cache/<device>.jsonl; with
--out, both go there, and every trial that was measured beside them.
For compute-sanitizer:  compute-sanitizer python benchmarks/gpu.py --check   (small problems, this process, nothing timed)
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from elsa_tune import backends, check, layers, measure, places, tuning
from elsa_tune.device import Device, detect
from elsa_tune.errors import CompilerMissing
from elsa_tune.measure import Contender, Worker, WorkerFailed
from elsa_tune.measurement import Measurement
from elsa_tune.problem import Problem
from elsa_tune.space import Space, parse
from elsa_tune.winners import Database

ROOT = Path(__file__).resolve().parent.parent
ROUNDS = 12
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
GENERATORS = ("triton", "cuda")
ARITHMETIC = {
    "sdpa.flash": "half products, float32 sums",
    "sdpa.cudnn": "half products, float32 sums",
    "sdpa.efficient": "float32: three TF32 products from sm_80 on; halves: half products",
    "sdpa.flex": "float32: torch's matmul setting; halves: half products",
    "sdpa.math": "cuBLAS products in torch's matmul setting",
}
"""What each of torch's kernels computes with, so that a ratio compares like with like."""


def problems() -> list[str]:
    """Every family at every length that fits, the ones that matter most first."""
    found = []
    for n in LENGTHS:
        heads = max(1, min(16, 65536 // n))
        shape = f"b1.h{heads}.q{n}.k{n}"
        found += [f"fp32.d64@{shape}", f"fp16.d64@{shape}", f"bf16.d128.causal@{shape}"]
        if n <= 16384:
            found += [
                f"fp32.strict.d64@{shape}",
                f"fp32.d128@{shape}",
                f"fp16.d128@{shape}",
                f"fp32.d64.causal@{shape}",
            ]
        if n in (2048, 8192):
            found += [f"fp32.d64.backward@{shape}", f"fp16.d64.backward@{shape}", f"bf16.d128.causal.backward@{shape}"]
    for n in (4096, 32768):
        found += [f"{t}.d128@b1.h32.kv8.q1.k{n}{launch}" for t in ("bf16", "fp32") for launch in ("", ".graph")]
    order = {n: i for i, n in enumerate((4096, 16384, 1024, 8192, 2048, 32768, 65536))}
    return sorted(found, key=lambda text: order.get(Problem.parse(text).kv_len, 9))


def contender(spelling: str, problem: Problem, device: Device) -> Contender:
    variant = parse(spelling)
    return Contender(variant, backends.get(variant.backend).build(variant, problem, device), device)


def side_by_side(problem: Problem, device: Device, worker: Worker, database: Database) -> dict[str, Any]:
    """One race of the best variant of each generator and everyone of torch's who takes the problem."""
    here = {"device": str(device), "problem": str(problem)}
    best: dict[str, Measurement] = {}  # backend -> its best final, or trial where none reached the final
    for m in database.measurements(status="ok", **here):
        backend = m.variant.partition(".")[0]
        if backend not in best or (m.stage == "final", m.ratio or 0) > (
            best[backend].stage == "final",
            best[backend].ratio or 0,
        ):
            best[backend] = m
    ours = [best[name] for name in GENERATORS if name in best]
    tuned = max(ours, key=lambda m: m.ratio or 0, default=None)
    served = next(iter(database.winners(**here)), None)
    racing, absent = [], {}
    spellings = [str(v) for v in Space.load("sdpa").variants(problem, device)] + [m.variant for m in ours]
    for spelling in spellings:
        one = contender(spelling, problem, device)
        try:
            verdict = worker.run(measure.check_shape, problem, one, one, timeout=300.0)
            if verdict.reason:
                absent[spelling] = f"wrong: {verdict.reason}"
            else:
                racing.append((one, verdict.error))
        except WorkerFailed as error:
            absent[spelling] = error.reason[:200]
    if not racing:
        return {"problem": str(problem), "absent": absent}
    samples = worker.run(measure.race, problem, [c for c, _ in racing], ROUNDS, 1.5, timeout=300.0).samples
    rows = {}
    for (one, error), own in zip(racing, samples, strict=True):
        seconds = statistics.median(own)
        rows[str(one.variant)] = {
            "milliseconds": 1e3 * seconds, "gflops": problem.flops / seconds / 1e9, "error": error,
            "arithmetic": ARITHMETIC.get(str(one.variant), problem.precision), "samples": list(own),
        }  # fmt: skip
    found: dict[str, Any] = {
        "problem": str(problem),
        "served_by": served and served.variant,
        "rows": rows,
        "absent": absent,
    }
    if tuned and tuned.variant in rows:
        own = rows[tuned.variant]["samples"]
        for name, row in rows.items():
            if name != tuned.variant and len(row["samples"]) > 2 and len(own) > 2:
                ratio = measure.ratio(row["samples"], own[: len(row["samples"])])
                row["tuned_is_faster_by"] = [ratio.median, ratio.low, ratio.high]
        found["tuned"] = tuned.variant
    return found


def show(line: dict[str, Any], peaks: dict[str, float]) -> None:
    print(f"{line['problem']}  served by {line.get('served_by')}", flush=True)
    peak = peaks.get("fp32") if Problem.parse(line["problem"]).precision == "strict" else None
    for name, row in sorted(line.get("rows", {}).items(), key=lambda item: item[1]["milliseconds"]):
        versus = row.get("tuned_is_faster_by")
        text = f"tuned is {versus[0]:.2f} [{versus[1]:.2f}, {versus[2]:.2f}] times as fast" if versus else ""
        text += f"  {row['gflops'] / peak:.2f} of the multiply-add peak" if peak else ""
        print(f"  {row['milliseconds']:9.3f} ms {row['gflops'] / 1e3:8.1f} TFLOP/s  {row['error']:.1e}  {name}  {text}")
    for name, why in line["absent"].items():
        print(f"  absent: {name}: {why}")


NETWORKS = (
    *(f"cuda.{scan}.t64.x8.r2.k2.w4" for scan in ("hillis_steele", "blelloch")),
    *(
        f"cuda.{scan}.t64.x8.r2.k2.s4.{how}"
        for scan in ("hillis_steele", "blelloch")
        for how in ("two_kernels", "last_block")
    ),
    *(f"cuda.hybrid.t64.x8.r2.k2.w2.s4.{how}" for how in ("two_kernels", "last_block")),
)
"""A variant for each scan and schedule of the CUDA C backend."""


def check_here(device: Device) -> None:
    """Every starting variant of every generator, and one for each scan and schedule; small problems, in this process: for
    compute-sanitizer (memcheck, racecheck)."""
    for name in GENERATORS:
        space, backend = Space.load(name), backends.get(name)
        for family in (
            "fp32.d64",
            "fp32.strict.d40.causal",
            "fp16.d80.causal",
            "bf16.d128",
            "fp16.d64.causal.backward",
        ):
            problem = Problem.parse(f"{family}@b2.h4.kv2.q300.k300")
            if backend.refusal(problem, device):
                continue
            for variant in map(space.parse, (*space.start, *(NETWORKS if name == "cuda" else ()))):
                if space.refusal(variant, problem, device) is None:
                    kernel = backend.load(backend.build(variant, problem, device), variant, problem)
                    verdict = check.check_family(
                        kernel, problem, [], device=device.torch, longest=check.longest(variant, problem, device)
                    )
                    print(f"{family} {variant}: {verdict.reason or f'error {verdict.error:.1e}'}", flush=True)


def toolchains(device: Device) -> dict[str, str]:
    """Versions of the generators that are here."""
    found: dict[str, str] = {}
    for name in GENERATORS if device.is_gpu else ():
        with suppress(CompilerMissing):
            found |= backends.get(name).toolchain(device)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--problem", action="append", help="only these problems; repeatable; nothing is written")
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything; half of it tunes")
    parser.add_argument("--out", type=Path, help="folder for both files instead of the checkout's")
    parser.add_argument("--check", action="store_true", help="only check kernels, in this process")
    options = parser.parse_args()
    start, device = time.monotonic(), detect(options.device)[0]
    print(f"{device} ({device.name}), torch {torch.__version__}", flush=True)
    if options.check:
        check_here(device)
        return
    chosen = options.problem or problems()
    report = tuning.tune(chosen, device=str(device), budget=30 * options.minutes)
    print(f"tuned {len(chosen)} problems in {report.seconds:.0f} s; {'; '.join(report.notes)}", flush=True)
    lines = []
    with Database.for_reading(places.database()) as database, Worker(memory=0 if device.is_gpu else None) as worker:
        peaks = {**worker.run(measure.peak, device, timeout=120.0), **worker.run(measure.state, device, timeout=60.0)}
        print(json.dumps(peaks), flush=True)
        for text in chosen:
            if time.monotonic() - start > 60 * options.minutes - 10:
                lines.append({"problem": text, "absent": {"everyone": "not measured: out of time"}})
                continue
            lines.append(side_by_side(Problem.parse(text), device, worker, database))
            show(lines[-1], peaks)
        trials = database.measurements(device=str(device))
        winners = database.winners(device=str(device))
        shipped = [w.measurement for w in winners if w.ratio_low > 1 and w.measurement.error is not None]
    if options.problem and not options.out:
        return
    name = str(device).replace(":", "-", 1)
    results, cache = (options.out, options.out) if options.out else (ROOT / "benchmarks" / "results", ROOT / "cache")
    content = {
        "device": str(device), "name": device.name, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"),
        "toolchain": toolchains(device), "peaks": peaks, "lines": lines,
    }  # fmt: skip
    (results / f"{name}.json").write_text(json.dumps(content, indent=1))
    layers.write_lines([m for m in shipped if not m.variant.startswith("sdpa.")], cache / f"{name}.jsonl")
    if options.out:  # every trial, refused ones too: a lent machine's database is gone with it
        layers.write_lines(trials, results / f"{name}.trials.jsonl")
    print(f"written: {name}.json, {name}.jsonl{f', {name}.trials.jsonl' if options.out else ''}")


if __name__ == "__main__":
    main()
