"""Where the offline ranking puts the tiles that torch's authors found fastest by measuring.

FlexAttention ships a tile, warps and stages for each GPU, dtype and head dimension (torch/_inductor/template_heuristics), the fruit
of tuning on those GPUs: the one measurement of GPUs that a machine without any has. Each is ranked among all others of a grid
by what the compiler reports and the model says. What is not in the grid, splits and orders, is left alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch._inductor.template_heuristics import triton as inductor

from elsa_tune import space
from elsa_tune.device import host_cpu
from elsa_tune.generate import lawful, triton
from elsa_tune.problem import Problem
from elsa_tune.tuning import offline
from elsa_tune.tuning.contender import build
from elsa_tune.tuning.worker import Worker, WorkerFailed

ROOT = Path(__file__).resolve().parent.parent
GRID = {"m": (16, 32, 64, 128), "n": (32, 64, 128), "warps": (2, 4, 8), "stages": (1, 2, 3)}
SHAPE = "@b2.h16.q4096.k4096"
DIMS = (64, 128)
SECONDS = 120


def published() -> Iterator[tuple[str, int, tuple[int, int, int, int]]]:
    """Target, head dimension, and query rows, keys, warps and stages for bfloat16."""
    inductor.get_backend_num_stages = lambda: 2  # asks a driver for its GPU, for tables of matrix products
    cuda, rocm = inductor.CUDAConfigHeuristic(), inductor.ROCmConfigHeuristic()
    tables = {
        "sm_80": cuda.a100_default_flex_config,
        "sm_90": cuda.h100_default_flex_config,
        "sm_100": cuda.sm_100_default_flex_config,
        "sm_120": cuda.sm_120_default_flex_config,
        "gfx942": rocm.gfx942_default_flex_config,
    }
    for target, table in tables.items():
        for dim in DIMS:
            config = table[torch.bfloat16, dim]
            yield target, dim, (config.block_m, config.block_n, config.num_warps, config.num_stages)


def ranked(target: str, dim: int, workers: Worker, pool: ThreadPoolExecutor) -> dict[tuple[int, ...], float | None]:
    """Predicted seconds of every point of the grid; None for what laws, the compiler or its spills rule out."""
    goal, problem = offline.target(target), Problem.parse(f"bf16.d{dim}{SHAPE}")

    def predicted(point: tuple[int, ...]) -> float | None:
        m, n, warps, stages = point
        variant = space.parse(f"triton.serial.half.m{m}.n{n}.warps{warps}.stages{stages}")
        if lawful.refusal(variant, problem, goal.device):
            return None
        try:
            built = workers.run(build, variant, problem, goal.device, timeout=SECONDS)
        except WorkerFailed:
            return None
        return None if built.flaw else offline.predict(variant, problem, built.resources, goal)

    points = list(itertools.product(*GRID.values()))
    return dict(zip(points, pool.map(predicted, points), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "offline.json")
    out: Path = parser.parse_args().out
    rows: list[dict[str, Any]] = []
    print(
        f"{'target':8s} {'d':>4s}  {'published m, n, warps, stages':30s} {'rank':>9s}  {'over the best':>13s}  best predicted"
    )
    with Worker(count=host_cpu().cores) as workers, ThreadPoolExecutor(host_cpu().cores) as pool:
        for target, dim, chosen in published():
            times = {point: t for point, t in ranked(target, dim, workers, pool).items() if t}
            order = sorted(times, key=lambda point: times[point])
            own = times.get(chosen)
            rank = 1 + sum(t < own for t in times.values()) if own else None
            over = own / times[order[0]] if own else None
            rows.append(
                {"target": target, "head_dim": dim, "published": chosen, "rank": rank, "of": len(times), "over_best": over,
                 "best": order[0], "predicted": {" ".join(map(str, p)): t for p, t in times.items()}}
            )  # fmt: skip
            place = f"{rank}/{len(times)}" if rank else f"-/{len(times)}"
            print(
                f"{target:8s} {dim:4d}  {chosen!s:30s} {place:>9s}  {f'{over:.2f}' if over else 'refused':>13s}  {order[0]}",
                flush=True,
            )
    out.write_text(
        json.dumps({"shape": SHAPE, "torch": torch.__version__, **triton.toolchain(), "results": rows}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
