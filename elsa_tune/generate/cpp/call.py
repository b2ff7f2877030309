"""Calling C++ kernels with tensors, on torch's own OpenMP pool."""

from __future__ import annotations

import ctypes
import math
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from elsa_tune.generate.backends import Call, Operands
from elsa_tune.generate.cpp import huge_pages
from elsa_tune.generate.cpp import pool as _pool
from elsa_tune.generate.cpp.pool import Pool
from elsa_tune.generate.operands import named
from elsa_tune.generate.received import summed
from elsa_tune.generate.tensors import check_dims, kernel_arguments, lse_dtype, new_output, rows_contiguous
from elsa_tune.parts import score as scores
from elsa_tune.parts.operand import Array, arguments
from elsa_tune.problem import Problem

# struct Call of templates/cpp/call.j2: five pointers that change with every call, then what a layout decides.
_POINTERS = struct.Struct("<5q").pack
_LAYOUT = struct.Struct("<17qdqq").pack
# The same of templates/cpp/gradients/call.j2.
_GRADIENTS = struct.Struct("<10q29qdqq").pack


class Whole(NamedTuple):
    """A call that is packed but for its pointers, scale and threads: the kernel's address, the text, the word of the text that is the
    address of its tensor among operands (-1: none), and the scale where none is given."""

    function: int
    text: bytes
    mask: int
    scale: float


class CppKernel:
    """A compiled family: call it with any shape, or bind a shape for repeated calls."""

    def __init__(self, library: Path, problem: Problem) -> None:
        function = ctypes.CDLL(str(library)).elsa_attention
        function.argtypes, function.restype = [ctypes.c_char_p], ctypes.c_int
        self._function, self._problem = function, problem
        # appended to the call where there are any
        letters = "".join("d" if a.kind == "real" else "q" for a in arguments(problem.declared))
        self._operands = struct.Struct(f"<{letters}").pack

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
        query, key, value = map(rows_contiguous, (query, key, value))
        return self.bind(query, key, value)(query, key, value, scale, out, lse, operands)

    def whole(self, query: Tensor, key: Tensor, value: Tensor, out: Sequence[int], operands: Operands) -> Whole | None:
        """The call for tensors of exactly these shapes and strides, for callers without Python; None for tensors whose rows are copied,
        and for operands that are changed or are more than one tensor."""
        if not query.stride(3) == key.stride(3) == value.stride(3) == 1:
            return None
        given = kernel_arguments(self._problem, operands, query, key)
        places = [n for n, x in enumerate(given) if isinstance(x, Tensor)]
        if len(places) > 1:
            return None
        text = _POINTERS(*[0] * 5) + self._layout(query, key, value, out, None, given)
        mask = (len(text) // 8 - len(given) + places[0]) if places else -1
        function = ctypes.cast(self._function, ctypes.c_void_p).value or 0
        return Whole(function, text, mask, 1 / math.sqrt(self._problem.head_dim))

    def _layout(
        self, query: Tensor, key: Tensor, value: Tensor, out: Sequence[int], scale: float | None, given: Sequence[Any]
    ) -> bytes:
        """What follows the pointers of a call: of the scale and of torch's threads as they are now."""
        batch, heads, q_len, head_dim = query.shape
        _, kv_heads, kv_len, _ = value.shape
        return _LAYOUT(
            batch, heads, kv_heads, q_len, kv_len, *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *out[:3],
            1 / math.sqrt(head_dim) if scale is None else scale, torch.get_num_threads(),
            _pool.openmp()[1] if Pool.usable else 0,
        ) + self._operands(*(x.data_ptr() if isinstance(x, Tensor) else x for x in given))  # fmt: skip

    def bind(self, query: Tensor, key: Tensor, value: Tensor) -> Call:
        """A call for exactly these shapes and strides. What the scale and torch's threads decide is computed when they change."""
        if not query.stride(3) == key.stride(3) == value.stride(3) == 1:
            return self  # rows are copied at every call
        function, threads, pool, empty_like = self._function, torch.get_num_threads, Pool, torch.empty_like
        value_dim = self._problem.value_dim
        alike = value_dim == self._problem.head_dim and empty_like(query, device="meta").stride(3) == 1
        batch, heads, q_len, _ = query.shape
        fresh = batch * heads * q_len * value_dim * query.element_size() >= huge_pages.FRESH
        known: tuple[object, bytes] = (None, b"")
        problem = self._problem
        has_arrays = any(isinstance(one, Array) for one in problem.declared)

        def call(
            query: Tensor,
            key: Tensor,
            value: Tensor,
            scale: float | None = None,
            out: Tensor | None = None,
            lse: Tensor | None = None,
            operands: Operands = (),
        ) -> Tensor:
            nonlocal known
            if query.is_neg() or key.is_neg() or value.is_neg():
                return self(query, key, value, scale, out, lse, operands)
            alike_always = out is None and not has_arrays  # in layout, call after call
            if out is None:
                out = empty_like(query) if alike else new_output(query, value_dim)
                if fresh:
                    huge_pages.ask_for(out)
            if alike_always:
                decided, settings = known, (scale, threads(), pool.usable, operands)
                if settings != decided[0]:
                    given = kernel_arguments(problem, operands, query, key)
                    decided = known = (settings, self._layout(query, key, value, out.stride(), scale, given))
                layout = decided[1]
            else:
                given = kernel_arguments(problem, operands, query, key)
                layout = self._layout(query, key, value, out.stride(), scale, given)
            sums = lse.data_ptr() if lse is not None else 0
            if function(_POINTERS(query.data_ptr(), key.data_ptr(), value.data_ptr(), out.data_ptr(), sums) + layout):
                raise MemoryError("the kernel could not allocate its split states; free memory or use splits=1")
            return out

        return call


class CppGradients:
    """A compiled backward family."""

    def __init__(self, library: Path, problem: Problem) -> None:
        function = ctypes.CDLL(str(library)).elsa_gradients
        function.argtypes, function.restype = [ctypes.c_char_p], ctypes.c_int
        self._function, self._problem = function, problem
        self._arrays = scores.get(problem.score).differentiable
        operands = "".join("d" if a.kind == "real" else "q" for a in arguments(problem.declared))
        along = [a for a in self._arrays if not a.over_keys]
        self._along, self._dense = along, [a for a in self._arrays if a.over_keys]
        self._rest = struct.Struct(f"<{operands}{'q' * len(along)}{'qqqqq' * len(self._dense)}").pack

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        lse: Tensor,
        grad: Tensor,
        scale: float | None = None,
        operands: Operands = (),
        grad_lse: Tensor | None = None,
        asked: Sequence[bool] = (True, True, True),
    ) -> tuple[Tensor | None, ...]:
        problem = self._problem
        check_dims(problem, query, key, value)
        inputs = query, key, value, output, grad = tuple(map(rows_contiguous, (query, key, value, output, grad)))
        batch, heads, q_len, head_dim = query.shape
        _, kv_heads, kv_len, _ = value.shape
        asked = (*asked, *[False] * (3 + len(self._arrays) - len(asked)))
        made = [
            new_output(x, x.shape[3]) if wanted else None for x, wanted in zip((query, key, value), asked, strict=False)
        ]
        for x in made:
            if x is not None and x.nbytes >= huge_pages.FRESH:
                huge_pages.ask_for(x)
        given = kernel_arguments(problem, operands, query, key)
        own = named(problem, operands)
        grads = {
            a.name: query.new_zeros(own[a.name].shape if a.over_keys else (batch, heads, q_len), dtype=lse_dtype(query))
            for a, wanted in zip(self._arrays, asked[3:], strict=True)
            if wanted
        }
        along = [_address(grads.get(a.name)) for a in self._along]
        dense = [word for a in self._dense for word in _place(grads.get(a.name))]
        lse = lse.contiguous()
        grad_lse = None if grad_lse is None else grad_lse.contiguous()
        strides = [n for x in (*inputs, *made) for n in (x.stride()[:3] if x is not None else (0, 0, 0))]
        call = _GRADIENTS(
            *(x.data_ptr() for x in (query, key, value, output, lse, grad)), *map(_address, (grad_lse, *made)),
            batch, heads, kv_heads, q_len, kv_len, *strides,
            1 / math.sqrt(head_dim) if scale is None else scale, torch.get_num_threads(),
            _pool.openmp()[1] if Pool.usable else 0,
        ) + self._rest(*(x.data_ptr() if isinstance(x, Tensor) else x for x in given), *along, *dense)  # fmt: skip
        if self._function(call):
            raise MemoryError("the kernel could not allocate its sums; free memory or use splits=1")
        return (*made, *(summed(a, grads.get(a.name), own[a.name]) for a in self._arrays))


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _place(x: Tensor | None) -> tuple[int, ...]:
    """Where a tensor of four axes lies: its address, and what is from one to the next along each axis, 0 where there is one."""
    if x is None:
        return (0,) * 5
    return (x.data_ptr(), *(step if n > 1 else 0 for step, n in zip(x.stride(), x.shape, strict=True)))
