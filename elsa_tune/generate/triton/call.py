"""Calling Triton kernels with tensors."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from elsa_tune.generate.backends import Call, Operands
from elsa_tune.generate.gpu.counters import cleared
from elsa_tune.generate.operands import named
from elsa_tune.generate.received import room, summed
from elsa_tune.generate.tensors import check_dims, kernel_arguments, new_output, rows_contiguous
from elsa_tune.parts import score as scores
from elsa_tune.problem import Problem


def _on(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current GPU: make it the tensor's."""
    here = not x.is_cuda or x.device.index == torch.cuda.current_device()
    return nullcontext() if here else torch.cuda.device(x.device)


class TritonKernel:
    """A family's module: call it with any shape."""

    def __init__(self, module: ModuleType, problem: Problem) -> None:
        self._launch, self._problem = module.attention, problem
        self._declared = bool(problem.declared)
        if torch.cuda.is_available():
            module.cleared = cleared  # type: ignore[attr-defined]

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
        more = [kernel_arguments(self._problem, operands, query, key)] if operands or self._declared else []
        with _on(query):
            made: Tensor = self._launch(query, key, value, scale, out, lse, *more)
        return made

    def bind(self, query: Tensor, key: Tensor, value: Tensor) -> Call:
        """Nothing can be computed beforehand."""
        return self


class TritonGradients:
    """A backward family's module."""

    def __init__(self, module: ModuleType, problem: Problem) -> None:
        self._launch, self._problem = module.gradients, problem
        self._arrays = scores.get(problem.score).differentiable

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
        rows = [rows_contiguous(x) for x in (query, key, value, output)]
        given = [kernel_arguments(self._problem, operands, query, key)] if self._problem.declared else []
        own, more = named(self._problem, operands), dict[str, Any]()
        grads = [
            room(a, query, own[a.name]) if wanted else None
            for a, wanted in zip(self._arrays, (*asked[3:], *[False] * len(self._arrays)), strict=False)
        ]
        if grads:
            more = {"more": grads}
        with _on(query):
            made: tuple[Tensor, ...] = self._launch(
                *rows, lse.contiguous(), rows_contiguous(grad), scale, *given, grad_lse=grad_lse, **more
            )
        received = (summed(a, x, own[a.name]) for a, x in zip(self._arrays, grads, strict=True))
        return (*(x if wanted else None for x, wanted in zip(made, asked, strict=False)), *received)
