"""What a CUDA C kernel does in an iteration of its loop, counted from its tiling."""

from __future__ import annotations

from collections.abc import Mapping

from elsa_tune.generate.cuda import wavefronts as _wavefronts
from elsa_tune.generate.cuda.tiling import Tiling
from elsa_tune.generate.gpu.work import Work
from elsa_tune.parts import exp as exps
from elsa_tune.parts import schedule as schedules
from elsa_tune.problem import Problem
from elsa_tune.variant import Variant

_MIX = 1.12
"""Instructions for each multiply-add of a kernel's hottest loop, where no disassembler reads it."""


def of(variant: Variant, problem: Problem, resources: Mapping[str, int]) -> Work:
    """The report counts the hottest of the inner loops alone: its mix is taken for the products, and what each score and each
    copied vector costs beside them is added."""
    axes, tiling = variant.axes, Tiling.of(variant.axes, problem)
    products = tiling.rows * (tiling.keys * tiling.head_columns + tiling.columns * tiling.block_n)
    products = products * tiling.stored_bytes // 4  # two at a time, if of halves
    scores, copied = tiling.rows * tiling.keys, 2 * tiling.copies * (tiling.head_slices + tiling.value_slices)
    hottest = resources.get("loop_fma", 0)
    mix = resources["loop_all"] / hottest if hottest else _MIX
    iteration = {
        "loop_fma": products + 2 * scores,
        "loop_all": round(products * mix) + (6 + exps.get(str(axes["exp"])).instructions) * scores + 6 * copied,
        "wavefronts": _wavefronts.of_iteration(tiling),
        "loop_exp": scores + tiling.rows,
        "loop_matrix": 0,
    }
    launches = schedules.get(str(axes["schedule"])).launches
    step = tiling.block_n * int(axes["workers"])
    return Work(tiling.block_m, step, int(axes["splits"]), tiling.stages, launches, 0.0, iteration)
