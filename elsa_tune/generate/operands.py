"""Operands of a case: the numbers of its problem, and arrays as a race or a hostile example has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from elsa_tune.parts import mask as masks
from elsa_tune.parts import score as scores
from elsa_tune.parts.operand import PLACES, Array, Operands
from elsa_tune.problem import Problem


def turns(problem: Problem) -> int:
    """How many examples its mask and scores have together."""
    mask, chain = masks.get(problem.mask), scores.get(problem.score)
    arrays = [len(array.hostile) for array in (*mask.arrays, *chain.arrays)]
    return max(len(mask.examples), chain.turns, *arrays, 1)


def with_example(problem: Problem, turn: int = 0) -> Problem:
    """The problem with numbers that one of its examples has."""
    mask, chain = masks.get(problem.mask), scores.get(problem.score)
    return problem.reshaped(integers=mask.integers_of(turn), reals=chain.reals_of(turn))


def typical(problem: Problem) -> Operands:
    """As a race has them."""
    numbers, sizes = problem.numbers, _sizes(problem)
    return tuple(
        _made(one, one.typical(sizes)) if isinstance(one, Array) else numbers[one.name] for one in problem.declared
    )


def example(problem: Problem, turn: int) -> Operands:
    """With arrays as an example has them; sequences of a batch have examples in turn."""
    mask, sizes, numbers = masks.get(problem.mask), _sizes(problem), problem.numbers

    def made(array: Array) -> Tensor:
        if array.name in mask.examples[0]:
            each = [mask.examples[(turn + i) % len(mask.examples)][array.name] for i in range(problem.batch)]
            return _made(array, each)
        return _made(array, (array.hostile[turn % len(array.hostile)] if array.hostile else array.typical)(sizes))

    return tuple(made(one) if isinstance(one, Array) else numbers[one.name] for one in problem.declared)


def _sizes(problem: Problem) -> dict[str, int]:
    """What the axes of arrays are called, and how long they are."""
    return {**{axis: getattr(problem, axis) for axis in PLACES}, **problem.names}


def _made(array: Array, content: Any) -> Tensor:
    """Content as a tensor of the array's dtype."""
    return torch.as_tensor(content, dtype=getattr(torch, array.dtype))


def named(problem: Problem, operands: Operands) -> dict[str, Any]:
    """Operands by name; what the problem says of numbers where there are none."""
    if not operands:
        return dict(problem.numbers)
    return {one.name: value for one, value in zip(problem.declared, operands, strict=True)}


def places(problem: Problem, device: torch.device) -> dict[str, Any]:
    """Where every pair of a problem is, for parts that ask: indices that broadcast to [batch, heads, q_len, kv_len]."""
    sizes = [(PLACES[axis], getattr(problem, axis)) for axis in ("batch", "heads", "q_len", "kv_len")]
    index = {name: torch.arange(n, device=device).view([-1, *[1] * (3 - i)]) for i, (name, n) in enumerate(sizes)}
    return {**index, "kv_head": index["head"] // problem.group, "behind": problem.kv_len - problem.q_len}


def limits_at(problem: Problem, own: Mapping[str, Any], **place: Any) -> dict[str, Any]:
    """What the mask's limits hold at places, batch= and position=: indices, or tensors of them that broadcast."""
    return {limit.name: limit.at(own[limit.name], place) for limit in masks.get(problem.mask).limits}
