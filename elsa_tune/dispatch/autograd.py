"""attention() as a differentiable operation: a forward kernel that saves the log-sum-exp, and a kernel for gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from elsa_tune.generate.backends import Call, Gradients, Operands
from elsa_tune.generate.tensors import lse_dtype


class _Attention(torch.autograd.Function):
    """Saves query, key, value, output and log-sum-exp: O(n) memory."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None,
        serve: Call,
        gradients: Gradients,
        operands: Operands,
    ) -> Tensor:
        lse = torch.empty(query.shape[:3], dtype=lse_dtype(query), device=query.device)
        output = serve(query, key, value, scale, None, lse, operands)
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.scale, ctx.gradients, ctx.operands = scale, gradients, operands
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        found = ctx.gradients(*ctx.saved_tensors, grad, ctx.scale, ctx.operands)
        wanted = (g if needed else None for g, needed in zip(found, ctx.needs_input_grad, strict=False))
        return (*wanted, None, None, None, None)


def differentiable(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None,
    serve: Call,
    gradients: Gradients,
    operands: Operands = (),
) -> Tensor:
    """Attention by ``serve`` whose gradients ``gradients`` computes. Differentiable once."""
    output: Tensor = _Attention.apply(query, key, value, scale, serve, gradients, operands)  # type: ignore[no-untyped-call]
    return output
