"""Laws that hold in every language."""

from __future__ import annotations

from elsa_tune import places
from elsa_tune.parts import mask as masks
from elsa_tune.parts import score as scores
from elsa_tune.parts.mask import NONE
from elsa_tune.problem import Problem

SCRATCH_BYTES = 256 << 20
"""At most this much of a GPU's memory for the states of splits."""


LARGEST_DIM = 256
"""Of heads and values, that kernels are generated for."""


def mask_has_text(problem: Problem) -> str | None:
    """Why what knows no score and no mask but causal (gradients, headers, kits) cannot serve the problem, or None."""
    if problem.score != scores.NONE:
        return f"no text for the score {problem.score}"
    return None if problem.mask in (NONE, "causal") else f"no text for the mask {problem.mask}"


def gradients_are_written(problem: Problem) -> str | None:
    """Why no gradients of the problem are generated, or None: those of scores and of masks with tensors are not."""
    if problem.score != scores.NONE:
        return f"no gradients of the score {problem.score}"
    return f"no gradients of a mask with tensors, {problem.mask}" if masks.get(problem.mask).arrays else None


def parts_have_text(language: str, problem: Problem) -> str | None:
    """Why a language cannot serve the problem's scores and tests of pairs, or None: each has a text of its name."""
    wanted = [("score", one.name) for one in scores.get(problem.score).ones]
    wanted += [("mask", one.name) for one in masks.get(problem.mask).tested]
    for kind, name in wanted:
        if not (places.data("templates") / language / kind / f"{name}.j2").is_file():
            return f"no text for the {kind} {name}: templates/{language}/{kind}/{name}.j2 is missing"
    return None


def dims_are_generated(problem: Problem) -> str | None:
    """Why a problem's dimensions are too large for generated kernels, or None."""
    largest = max(problem.head_dim, problem.value_dim)
    return f"dimensions up to {LARGEST_DIM} are generated, not {largest}" if largest > LARGEST_DIM else None


def scan_has_states(scan: str, workers: int, splits: int) -> str | None:
    """Nothing is called a scan that is a fold, and no scan a fold."""
    if scan == "serial" and workers * splits > 1:
        return "a fold has one state; several need a scan to merge them"
    if scan == "hybrid" and (workers == 1 or splits == 1):
        return "hybrid needs states on both levels, workers and splits"
    if scan != "serial" and workers * splits == 1:
        return f"with one state nothing is merged, and {scan} would be a fold under another name"
    return None


def schedule_has_splits(schedule: str, splits: int) -> str | None:
    if schedule == "fold" and splits > 1:
        return f"{splits} splits leave states that somebody must merge"
    return "one split leaves nothing to merge" if schedule != "fold" and splits == 1 else None


def scratch_is_bounded(splits: int, problem: Problem) -> str | None:
    rows = problem.q_len * problem.group
    size = 4 * splits * rows * (problem.value_dim + 2) if splits > 1 else 0
    return (
        f"states of one head take {size >> 20} MiB, more than {SCRATCH_BYTES >> 20}" if size > SCRATCH_BYTES else None
    )


def longest_is_causal(order: str, problem: Problem) -> str | None:
    mask = masks.get(problem.mask)
    grows = "position" in mask.high.names and not mask.cuts_front
    return None if order != "longest" or grows else "all tiles are equally long"


RUNNING_KEYS = 4096
"""Keys of a state whose values may be added one by one to all before."""


def running_sum_is_short(accumulate: str, workers: int, splits: int, problem: Problem) -> str | None:
    """The error of a running sum grows with its keys where that of leaves summed apart grows with their number. Classes that
    round weights to halves do not see it."""
    each, exact = problem.kv_len // (workers * splits), problem.precision in ("strict", "fp32")
    if accumulate == "running" and each > RUNNING_KEYS and exact and problem.direction == "forward":
        return f"a running sum over {each} keys errs more than {problem.precision} allows; sum leaves apart"
    return None
