"""What contenders are called with in a worker: inputs in the problem's memory order, kept between jobs, and the truth of one."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from elsa_tune.device import Device
from elsa_tune.problem import Problem
from elsa_tune.prove import gradients, reference
from elsa_tune.prove.reference import Inputs, Rows


@dataclass
class Workbench:
    """Inputs of a problem in the worker, in its memory order: enough sets to outgrow the last-level cache, and the truth for
    one of them."""

    problem: Problem
    inputs: list[Inputs]
    rows: Rows
    truth: Tensor
    peer_errors: dict[str, float]
    last_cache: int

    @property
    def bytes(self) -> int:
        """What the inputs take."""
        return len(self.inputs) * self.problem.bytes

    def written(self) -> list[Callable[[], object]]:
        """For each set, what writes it as a model does just before attention: projections write all of it, and a cache that
        grows is copied as a whole. What no cache could hold is in memory either way: then only the query is written."""
        many = 3 if self.problem.bytes < 2 * self.last_cache else 1
        return [partial(_write, x.tensors[:many]) for x in self.inputs]


def _write(tensors: Sequence[Tensor]) -> None:
    for x in tensors:
        x.mul_(1.0)  # every value again, in place


_workbenches: dict[tuple[Problem, Device], Workbench] = {}
"""Those made last: shapes of a family are raced in turns, and making inputs takes longer than checking a kernel on them."""

MEMORY_FOR_INPUTS = 1 / 8
"""Share of the device's memory that the inputs of several problems may take."""


def workbench(problem: Problem, device: Device) -> Workbench:
    name = (problem, device)
    if name in _workbenches:
        _workbenches[name] = _workbenches.pop(name)
        return _workbenches[name]
    count = min(
        1024, math.ceil(1.25 * device.last_cache / problem.bytes) + device.is_gpu
    )  # a GPU writes nothing in between
    while (
        _workbenches
        and count * problem.bytes + sum(b.bytes for b in _workbenches.values()) > MEMORY_FOR_INPUTS * device.memory
    ):
        del _workbenches[next(iter(_workbenches))]
        gc.collect()
    _workbenches[name] = _made(problem, device, count)
    return _workbenches[name]


def _made(problem: Problem, device: Device, count: int) -> Workbench:
    generator = torch.Generator().manual_seed(0)
    first = reference.random_inputs(problem, generator).to(device.torch)
    if problem.direction == "backward":
        first = gradients.with_forward(problem, first, generator)
    copies = [first.ordered(problem.orders) for _ in range(count)]
    rows = reference.sample_rows(problem, generator)
    return Workbench(problem, copies, rows, reference.attention_rows(problem, first, rows), {}, device.last_cache)
