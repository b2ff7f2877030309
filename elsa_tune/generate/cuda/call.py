"""Calling CUDA C kernels with tensors: what a memory layout decides of the launches is computed once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from elsa_tune.generate.backends import Call, Operands
from elsa_tune.generate.context import of_family
from elsa_tune.generate.cuda.launch import Launch, Runtime
from elsa_tune.generate.cuda.tiling import Tiling
from elsa_tune.generate.laws import SCRATCH_BYTES, only_text
from elsa_tune.generate.tensors import check_dims, kernel_arguments, new_output, rows_contiguous
from elsa_tune.parts import schedule as schedules
from elsa_tune.parts import state as states
from elsa_tune.parts.operand import arguments
from elsa_tune.problem import Problem
from elsa_tune.variant import Variant

FINISH_THREADS = 128
STATE = states.get(only_text("cuda", "state"))
_ATTEND, _FINISH = "pppppppff" + 12 * "q" + 9 * "i", "pppqqqiiiii"
_MOST_PLANS = 64


class Portion(NamedTuple):
    """Some heads of a call, as many as there is scratch for: blocks, tiles and plain arguments of the kernel, and of the second
    one, if there is one."""

    blocks: int
    tiles: int
    plain: tuple[Any, ...]
    finish_blocks: int
    finish_plain: tuple[Any, ...]


class Plan(NamedTuple):
    """What shapes, strides and scale decide of a call: floats of scratch, and its portions."""

    scratch: int
    portions: list[Portion]


class CudaKernel:
    """A compiled family: call it with any shape. What a memory layout decides is computed once."""

    def __init__(self, runtime: Runtime, variant: Variant, problem: Problem) -> None:
        self._runtime, self._problem = runtime, problem
        self._splits, self._schedule = int(variant.axes["splits"]), schedules.get(str(variant.axes["schedule"]))
        self._tiling = Tiling.of(variant.axes, problem)
        letters = {"integer": "q", "real": "f", "pointer": "p"}
        self._types = _ATTEND + "".join(letters[a.kind] for a in arguments(problem.declared))
        self._scored = bool(of_family(problem)["scored"])
        self._plans: dict[tuple[Any, ...], Plan] = {}

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None = None,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        operands: Operands = (),
    ) -> Tensor:
        check_dims(self._problem, query, key, value)
        if not query.stride(3) == key.stride(3) == value.stride(3) == 1:
            query, key, value = map(rows_contiguous, (query, key, value))
        if out is None:
            out = new_output(query, self._problem.value_dim)
        self._runtime.run(self._launches(query, key, value, scale, out, lse, operands))
        return out

    def bind(self, query: Tensor, key: Tensor, value: Tensor) -> Call:
        """The kernel itself: it remembers what it computed for shapes and strides."""
        return self

    def _launches(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, out: Tensor, lse: Tensor | None,
        operands: Operands = (),
    ) -> list[Launch]:  # fmt: skip
        """The kernels to start, in order; as many heads at a time as the states of splits have memory for."""
        width = self._tiling.vector * query.element_size()
        begins = tuple(x.data_ptr() % width == 0 for x in (query, key, value))
        strides = (query.stride(), key.stride(), value.stride(), out.stride())
        layout = (query.shape, value.shape, strides, scale, begins)
        plan = self._plans.get(layout)
        if plan is None:
            if len(self._plans) >= _MOST_PLANS:
                self._plans.clear()
            plan = self._plans[layout] = self._plan(*layout)
        more = kernel_arguments(self._problem, operands, query, key) if operands or self._types != _ATTEND else ()
        tiling, partial, arrivals, launches = self._tiling, None, None, []
        if plan.scratch:
            partial = self._runtime.floats(query, plan.scratch)
        for portion in plan.portions:
            if self._schedule.counts:
                arrivals = self._runtime.counters(query, portion.tiles)
            given = (query, key, value, out, lse, partial, arrivals, *portion.plain, *more)
            launches.append(Launch("attend", portion.blocks, tiling.threads, tiling.shared_bytes, self._types, given))
            if portion.finish_blocks:
                merged = (partial, out, lse, *portion.finish_plain)
                launches.append(Launch("finish", portion.finish_blocks, FINISH_THREADS, 0, _FINISH, merged))
        return launches

    def _plan(
        self, query_shape: Sequence[int], value_shape: Sequence[int], strides: Sequence[Sequence[int]],
        scale: float | None, begins: Sequence[bool],
    ) -> Plan:  # fmt: skip
        """Portions of as many heads as scratch holds states for, and the plain arguments of each."""
        tiling, splits = self._tiling, self._splits
        batch, heads, q_len, head_dim = query_shape
        _, kv_heads, kv_len, value_dim = value_shape
        factor = 1 / math.sqrt(head_dim) if scale is None else scale
        c, sign = (abs(factor), math.copysign(1.0, factor)) if factor else (1.0, 0.0)
        if factor and not self._scored:  # a score is of products times the scale, and meets log2(e) afterwards
            c *= math.log2(math.e)
        group, pairs = heads // kv_heads, batch * kv_heads
        rows = group * q_len
        tiles = -(-rows // tiling.block_m)
        floats = splits * rows * STATE.floats(value_dim) if splits > 1 else 0
        slots = max(1, min(pairs, SCRATCH_BYTES // (4 * floats))) if floats else pairs
        outer = [n for stride in strides for n in stride[:3]]
        shapes = (query_shape, (batch, kv_heads, kv_len), (batch, kv_heads, kv_len))
        aligned = [
            int(begin and _keeps_aligned(stride, shape, tiling.vector))
            for begin, stride, shape in zip(begins, strides[:3], shapes, strict=True)
        ]
        portions = []
        for first in range(0, pairs, slots):
            now = min(slots, pairs - first)
            plain = (c, sign, *outer, kv_heads, group, q_len, kv_len, first, now, *aligned)
            finish = -(-now * rows * value_dim // FINISH_THREADS) if self._schedule.launches > 1 else 0
            merged = (*strides[3][:3], kv_heads, group, q_len, first, now)
            portions.append(Portion(now * tiles * splits, now * tiles, plain, finish, merged))
        return Plan(slots * floats, portions)


def _keeps_aligned(strides: Sequence[int], shape: Sequence[int], vector: int) -> bool:
    """Whether, where the first vector of a tensor is aligned, those of every row are."""
    return all(stride % vector == 0 for stride, size in zip(strides[:3], shape, strict=False) if size > 1)
