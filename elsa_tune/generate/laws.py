"""Laws that hold in every language."""

from __future__ import annotations

import inspect
from functools import cache

from elsa_tune import places
from elsa_tune.generate.backends import Law
from elsa_tune.parts import element as elements
from elsa_tune.parts import mask as masks
from elsa_tune.parts import operator as operators
from elsa_tune.parts import scan as scans
from elsa_tune.parts import schedule as schedules
from elsa_tune.parts import score as scores
from elsa_tune.parts import state as states
from elsa_tune.parts.bound import EVERY_KEY, Bound
from elsa_tune.problem import Problem

SCRATCH_BYTES = 256 << 20
"""At most this much of a GPU's memory for the states of splits."""


LARGEST_DIM = 256
"""Of heads and values, that kernels are generated for."""


@cache
def has_text(language: str, kind: str, value: str) -> bool:
    """Whether a language has a text of a part: templates/<language>/<kind>/<value>.j2."""
    return (places.data("templates") / language / kind / f"{value}.j2").is_file()


def only_text(language: str, kind: str) -> str:
    """The one part of a kind that a language has a text of. Raises ValueError where it has more: an axis must choose."""
    (path,) = (places.data("templates") / language / kind).glob("*.j2")
    return path.stem


def family_has_text(language: str, problem: Problem) -> str | None:
    """Why a language cannot say what the problem's family is of, or None. What it has no text of is never taken for another."""
    wanted = [("operator", problem.operator), ("element", problem.dtype)]
    wanted += [("score", one.name) for one in scores.get(problem.score).ones]
    wanted += [("mask", one.name) for one in masks.get(problem.mask).tested]
    for kind, value in wanted:
        if not has_text(language, kind, value):
            return f"no text for the {kind} {value} in templates/{language}"
    return None


def axis_has_text(language: str, kind: str) -> Law:
    """The law that a language has a text of the axis' value, whose parts are a kind."""

    def law(**known: str) -> str | None:
        value = known[kind]
        return None if has_text(language, kind, value) else f"no text for the {kind} {value} in templates/{language}"

    law.__name__ = f"{kind}_has_text"
    law.__doc__ = "A value that the language has no text of could only be taken for another."
    parameter = inspect.Parameter(kind, inspect.Parameter.KEYWORD_ONLY)
    law.__signature__ = inspect.Signature([parameter])  # type: ignore[attr-defined]
    return law


def state_is_of_operator(state: str, problem: Problem) -> str | None:
    """A state of another operator carries what this one cannot be computed from."""
    operator = operators.get(problem.operator)
    return (
        None
        if state in operator.states
        else f"{operator.name} is computed with {', '.join(operator.states)}, not {state}"
    )


def exp_errs_little(error: float, problem: Problem) -> str | None:
    """Why a 2^x of that relative error is no part of the problem's class, or None."""
    if error > 8 * elements.precision(problem.precision).unit:
        return f"2^x errs by {error:.1e}; {problem.precision} allows 8 units in the last place"
    return None


def mask_has_text(problem: Problem) -> str | None:
    """Why what knows no score and no mask but causal (headers, kits) cannot serve the problem, or None."""
    if problem.score != scores.NONE:
        return f"no text for the score {problem.score}"
    mask = masks.get(problem.mask)
    told = not mask.cuts_front and mask.high in (EVERY_KEY, Bound("position + 1"))
    return None if told else f"no text for the mask {problem.mask}"


@cache
def slopes_have_text(language: str, problem: Problem) -> str | None:
    """Why a language whose gradients have scores cannot say those of the problem's, or None: beside what becomes of a score, the text of one
    that does more than add says how that grows with it (<score>_slope_of), and how it grows with an array that rows share of
    (<score>_rate_of_<array>)."""
    for one in scores.get(problem.score).ones:
        wanted = [f"{one.name}_slope_of("] if one.bends else []
        wanted += [
            f"{one.name}_rate_of_{a.name}(" for a in one.arrays if a.is_float and not a.over_keys and a.name != one.term
        ]
        text = (places.data("templates") / language / "score" / f"{one.name}.j2").read_text()
        if any(name not in text for name in wanted):
            return f"no gradients of the score {one.name} in templates/{language}"
    return None


def reliable(problem: Problem) -> float:
    """The log-sum-exp, as a float of the states, from which on its rounding is no longer negligible beside what else is rounded."""
    element = elements.get(problem.dtype)
    return min(32.0 * elements.precision(problem.precision).unit / element.unit, 1024.0)


def dims_are_generated(problem: Problem) -> str | None:
    """Why a problem's dimensions are too large for generated kernels, or None."""
    largest = max(problem.head_dim, problem.value_dim)
    return f"dimensions up to {LARGEST_DIM} are generated, not {largest}" if largest > LARGEST_DIM else None


def scan_has_states(scan: str, workers: int, splits: int) -> str | None:
    """Nothing is called a scan that is a fold, and no scan a fold."""
    strategy = scans.get(scan)
    if strategy.folds and workers * splits > 1:
        return "a fold has one state; several need a scan to merge them"
    if strategy.of_two_levels and (workers == 1 or splits == 1):
        return f"{scan} needs states on both levels, workers and splits"
    if not strategy.folds and workers * splits == 1:
        return f"with one state nothing is merged, and {scan} would be a fold under another name"
    return None


def schedule_has_splits(schedule: str, splits: int) -> str | None:
    """States of splits must be merged by somebody, and where one worker has all keys nobody has anything to merge."""
    merges = schedules.get(schedule).splits
    if not merges and splits > 1:
        return f"{splits} splits leave states that somebody must merge"
    return "one split leaves nothing to merge" if merges and splits == 1 else None


def scratch_is_bounded(splits: int, problem: Problem) -> str | None:
    """The states of one head's splits must fit SCRATCH_BYTES: fewer than a head's are never launched."""
    rows = problem.q_len * problem.group
    each = max(states.get(name).floats(problem.value_dim) for name in states.names())
    size = 4 * splits * rows * each if splits > 1 else 0
    return (
        f"states of one head take {size >> 20} MiB, more than {SCRATCH_BYTES >> 20}" if size > SCRATCH_BYTES else None
    )


def longest_is_causal(order: str, problem: Problem) -> str | None:
    """An order by length is the order of heads under another name, where no tile sees more keys than another."""
    mask = masks.get(problem.mask)
    grows = "position" in mask.high.names and not mask.cuts_front
    return None if order != "longest" or grows else "all tiles are equally long"


RUNNING_KEYS = 4096
"""Keys of a state whose values may be added one by one to all before."""


def running_sum_is_short(accumulate: str, workers: int, splits: int, problem: Problem) -> str | None:
    """The error of a running sum grows with its keys where that of leaves summed apart grows with their number. Classes that
    round weights to halves do not see it."""
    each, exact = problem.kv_len // (workers * splits), elements.precision(problem.precision).exact
    if accumulate == "running" and each > RUNNING_KEYS and exact and problem.direction == "forward":
        return f"a running sum over {each} keys errs more than {problem.precision} allows; sum leaves apart"
    return None
