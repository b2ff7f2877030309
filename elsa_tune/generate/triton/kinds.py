"""What Triton compiles a kernel anew for: kinds of launches, of which a call of the problem is one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from elsa_tune.parts import mask as masks
from elsa_tune.problem import Problem
from elsa_tune.variant import Variant


def known(variant: Variant, problem: Problem) -> dict[str, Any]:
    """What Triton compiles a kernel anew for, beside types, as a launch of the problem has it: one query head for each KV head,
    and whole leaves alone."""
    axes = variant.axes
    whole = problem.kv_len % _iteration(variant) == 0
    mask = masks.get(problem.mask)
    even = (
        whole
        and not (mask.cuts_front or mask.cuts_back)
        and axes["edges"] == "peeled"
        and problem.direction == "forward"
    )
    return {"group": min(problem.group, 2), "EVEN": even}


def _iteration(variant: Variant) -> int:
    """Keys that all splits take in one iteration of their loops."""
    axes = variant.axes
    return int(axes["block_n"]) * int(axes["workers"]) * int(axes["splits"])


def kinds(variant: Variant, problem: Problem) -> Iterator[Problem]:
    """The problem, then one of its family and group of each other kind: lengths that leaves divide, or do not. Checks and other
    shapes ask for all of them."""
    yield problem
    for kv_len in (problem.kv_len + 1, -(-problem.kv_len // _iteration(variant)) * _iteration(variant)):
        posed = problem.reshaped(kv_len=kv_len)
        if known(variant, posed) != known(variant, problem):
            yield posed
            return
