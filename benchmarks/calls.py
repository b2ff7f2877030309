"""What a call costs on its way, and what decoding gains: torch's operator overridden, by the extension and by Python, beside torch's own.

Run it with `make bench`, on a quiet machine. Everything is interleaved in one process and printed with its spread, losses like wins;
writes benchmarks/results/calls-<device>.json.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import elsa_tune
from _side_by_side import results_file, shown, tune_first, version
from elsa_tune.device import host_cpu
from elsa_tune.dispatch import serving
from elsa_tune.generate import incumbent
from elsa_tune.integrations import override
from elsa_tune.tuning import race

ROUNDS, PROCESSES, IMPORTS = 40, 11, 15
MOST = {"extension": 3.0, "Python": 9.0, "recording": 1.0, "recording, of a growing cache": 3.0}
"""Microseconds that a call may take more than torch's own; of a growing cache each token of twelve layers poses a new problem."""

DECODING = {
    f"{dtype} {length >> 10}K": f"{dtype}.d64@b1.h32.kv8.q1.k{length}"
    for dtype in ("fp32", "bf16")
    for length in (8192, 32768)
}
AT_LEAST = {"fp32": 1.5, "bf16": 2.5}
"""Of ``enable_gqa``, how many times as fast."""


def spread(samples: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(samples, n=4)
    return {"median": middle, "low": low, "high": high}


CALL = """
import os, statistics, sys, time
way = sys.argv[1]
if way.startswith("recording"):
    os.environ["ELSA_TUNE_RECORD"] = os.devnull
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa
if way.startswith("recording"):
    import elsa_tune_autoload
    elsa_tune_autoload.load()
elif not way.startswith("torch"):
    from elsa_tune.generate import cpp
    from elsa_tune.integrations import override
    if way == "Python":
        cpp.interposer = lambda: None
    override.enable()
x, cache, ends = torch.randn(1, 2, 8, 16), torch.randn(1, 2, 20000, 16), iter(range(16 * 12, 20000 * 12))
def seconds(times):
    if way.endswith("cache"):
        grown = [cache[:, :, : next(ends) // 12] for _ in range(times)]
        calls = [(x, past, past) for past in grown]
    else:
        calls = [(x, x, x)] * times
    start = time.perf_counter()
    for q, k, v in calls:
        sdpa(q, k, v)
    return (time.perf_counter() - start) / times
with torch.inference_mode():
    seconds(200)
    print(1e6 * (statistics.median if way.endswith("cache") else min)(seconds(500) for _ in range(20)))
"""
"""Microseconds of a call that torch serves, whose tensors are so small that nothing else is measured."""


def beside_torch() -> dict[str, dict[str, float]]:
    """Microseconds of torch's own call, and more than that by each way: of processes that take turns, since what was registered stays."""
    samples: dict[str, list[float]] = {way: [] for way in ("torch", "torch, of a growing cache", *MOST)}
    for _ in range(PROCESSES):
        for way, found in samples.items():
            done = subprocess.run([sys.executable, "-c", CALL, way], capture_output=True, text=True, check=True)
            found.append(float(done.stdout))
    beside = {way: "torch, of a growing cache" if way.endswith("cache") else "torch" for way in MOST}
    more = {
        way: spread([x - y for x, y in zip(samples[way], samples[its], strict=True)]) for way, its in beside.items()
    }
    return {"torch": spread(samples["torch"]), **more}


def importing() -> dict[str, float]:
    """Milliseconds that `import torch` takes more with this package's entry point, the variable unset: the module and its function."""
    program = "import time, torch\nt = time.perf_counter()\nimport elsa_tune_autoload\nelsa_tune_autoload.load()\nprint(time.perf_counter() - t)"
    environment = {k: v for k, v in os.environ.items() if k != "ELSA_TUNE"}
    runs = [
        subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
        for _ in range(IMPORTS)
    ]
    return spread([1e3 * float(done.stdout) for done in runs])


@torch.inference_mode()
def decoding(problem: str) -> dict[str, Any]:
    """One token's attention under the override, against torch's `enable_gqa`, and against torch with the group folded into the queries, as
    a program may do by hand."""
    posed = elsa_tune.Problem.parse(problem)
    dtype = torch.bfloat16 if problem.startswith("bf16") else torch.float32
    q = torch.randn(posed.batch, posed.heads, 1, posed.head_dim, dtype=dtype)
    # as many caches as do not fit into the processor's
    caches = [
        [torch.randn(posed.batch, posed.kv_heads, posed.kv_len, posed.head_dim, dtype=dtype) for _ in "kv"]
        for _ in range(4)
    ]
    folded = q.view(posed.batch, posed.kv_heads, posed.group, posed.head_dim)
    override.enable()
    for _ in range(2):
        scaled_dot_product_attention(q, *caches[0], enable_gqa=True)
        elsa_tune.load(problem, "cpu")
        while serving.current()._builder is not None:
            time.sleep(0.01)

    def by_torch(k: Tensor, v: Tensor) -> Tensor:
        with incumbent.aside():
            return scaled_dot_product_attention(q, k, v, enable_gqa=True)

    def by_hand(k: Tensor, v: Tensor) -> Tensor:
        with incumbent.aside():
            return scaled_dot_product_attention(folded, k, v)

    ways: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "elsa-tune": lambda k, v: scaled_dot_product_attention(q, k, v, enable_gqa=True), "enable_gqa": by_torch, "folded": by_hand,
    }  # fmt: skip
    samples: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(ROUNDS):
        for name in random.Random(number).sample(list(ways), len(ways)):
            start = time.perf_counter()
            for k, v in caches:
                ways[name](k, v)
            samples[name].append((time.perf_counter() - start) / len(caches))
            time.sleep(0.003)
    override.disable()
    kernel = next((r.kernel for r in elsa_tune.served() if r.problem == problem and r.kernel != "torch"), "torch")
    ratios = {name: asdict(race.ratio(samples[name], samples["elsa-tune"])) for name in ("enable_gqa", "folded")}
    return {"kernel": kernel, **ratios, "seconds": samples}


def main() -> None:
    tune_first(DECODING.values(), 15.0)
    found: dict[str, Any] = {"import": importing()}
    print(
        f"import torch, the variable unset: {found['import']['median']:.3f} ms more{' SHORT' * (found['import']['median'] > 1)}",
        flush=True,
    )
    found["call"] = times = beside_torch()
    torchs = times["torch"]["median"]
    for way, most in MOST.items():
        more = times[way]
        print(
            f"a call, {way}, beside torch's {torchs:.2f} us: {more['median']:.2f} [{more['low']:.2f}, {more['high']:.2f}]"
            f" us more{' SHORT' * (more['median'] > most)}", flush=True,
        )  # fmt: skip
    for name, problem in DECODING.items():
        found[name] = ratios = decoding(problem)
        gqa, folded = ratios["enable_gqa"], ratios["folded"]
        short = gqa["median"] < AT_LEAST[name[:4]] or folded["high"] < 1
        print(
            f"a token after {name}: {gqa['median']:.2f} [{gqa['low']:.2f}, {gqa['high']:.2f}] of enable_gqa, {folded['median']:.2f}"
            f" [{folded['low']:.2f}, {folded['high']:.2f}] of folded groups, by {ratios['kernel']}{' SHORT' * short}", flush=True,
        )  # fmt: skip
    path = results_file("calls-")
    versions = {p: version(p) for p in ("elsa-tune", "torch")}
    content = {
        "device": str(host_cpu()),
        "name": host_cpu().name,
        "date": time.strftime("%Y-%m-%d"),
        "versions": versions,
        "asked": {"import": 1.0, **MOST, **AT_LEAST},
        "results": found,
    }
    path.write_text(json.dumps(content, indent=1))
    print(f"written to {shown(path)}")


if __name__ == "__main__":
    main()
