"""What templates are told of a family's mask and scores."""

from __future__ import annotations

from typing import Any

from elsa_tune.parts import mask as masks
from elsa_tune.parts import score as scores
from elsa_tune.parts.operand import Array, arguments
from elsa_tune.problem import Problem

C_TYPES = {"int64": "int64_t", "int32": "int32_t", "float32": "float", "float64": "double", "bool": "unsigned char"}
"""What C calls torch's dtypes, of what arrays hold."""


def of_family(problem: Problem) -> dict[str, Any]:
    """The mask, the scores, whether anything is done to scores, or to weights, and asks where they are, and the arguments of operands."""
    mask, chain = masks.get(problem.mask), scores.get(problem.score)
    altered = bool(mask.tested) or any(one.alters for one in chain.ones)
    bounds = {limit.name for limit in mask.limits}
    reads = [one for one in problem.declared if isinstance(one, Array) and one.placed and one.name not in bounds]
    return {
        "direction": problem.direction,
        "bends": [one for one in chain.ones if one.bends] if problem.direction == "backward" else [],
        "row_gradients": [one for one in chain.differentiable if not one.over_keys],
        "dense_gradients": [one for one in chain.differentiable if one.over_keys],
        "mask": mask,
        "scores": chain,
        "weighing": chain.weighing,
        "altered": altered,
        "scored": altered or chain.weighing is not None,
        "placed": chain.placed or any(one.placed for one in mask.tested),
        "reads": reads,
        "arguments": arguments(problem.declared),
        "elements": C_TYPES,
    }
