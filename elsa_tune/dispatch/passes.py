"""The two passes of attention apart from each other, by whoever serves: forward with a log-sum-exp, and backward from it."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter

import torch
from torch import Tensor

from elsa_tune.dispatch import derivatives, fallback, serving, torchs
from elsa_tune.errors import WrongArguments
from elsa_tune.generate import incumbent
from elsa_tune.generate.logsumexp import logsumexp
from elsa_tune.generate.tensors import lse_dtype, needs_grad
from elsa_tune.masks import NONE, AttnMask
from elsa_tune.parts import score as scores
from elsa_tune.problem import Problem


def forward(
    query: Tensor, key: Tensor, value: Tensor, wanted: AttnMask, scale: float | None, enable_gqa: bool,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The output [batch, heads, q_len, value_dim], in ``out`` where a kernel of ours serves, and the log-sum-exp [batch, heads, q_len],
    -inf of a row that sees no key; without gradients. Raises WrongArguments."""
    query, key, value = query.detach(), key.detach(), value.detach()
    lse = torch.empty(query.shape[:3], dtype=lse_dtype(query), device=query.device)
    output = serving.by_kernel(query, key, value, wanted, scale, enable_gqa, out, lse)
    if output is not None:
        return output, lse
    with serving.left_to_torch(query, key, value, wanted, enable_gqa), incumbent.aside():
        if torchs.takes(query, key, value, wanted, scale, enable_gqa):
            return torchs.forward(query, key, value, torchs.form(query, key, wanted), scale)
        output = attend(query, key, value, wanted, scale, enable_gqa)
    query, key = query.expand(*output.shape[:2], -1, -1), key.expand(output.shape[0], -1, -1, -1)
    family = wanted.of(Problem(head_dim=max(1, query.shape[3])))
    return output, logsumexp(query, key, family, wanted.in_order(query, key), scale)


def attend(
    query: Tensor, key: Tensor, value: Tensor, wanted: AttnMask, scale: float | None, enable_gqa: bool
) -> Tensor:
    """The output by torch."""
    return fallback.attend(query, key, value, None if wanted is NONE else wanted, 0.0, False, scale, enable_gqa)


def keeps(
    query: Tensor, key: Tensor, value: Tensor, wanted: AttnMask, scale: float | None, enable_gqa: bool, served: bool
) -> bool:
    """Whether what the forward pass keeps is all that gradients need: where a kernel of ours computes them; where one serves on a CPU, those
    too that torch's fused kernel computes from it. Others are torch's from the beginning, and cost what they cost without us."""
    if serving.backward_for(query, key, value, wanted, enable_gqa).gradients is not None:
        return True
    learns = needs_grad(*wanted.operands.values())
    return served and query.is_cpu and not learns and torchs.takes(query, key, value, wanted, scale, enable_gqa)


def backward(
    grad: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor,
    wanted: AttnMask, scale: float | None, enable_gqa: bool, asked: Sequence[bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The gradients of query, key, value and each tensor of ``wanted``, where ``asked`` for: by a kernel of ours or torch's from the same
    output and log-sum-exp, or by operations."""
    names = derivatives.names(wanted)
    of_tensors = dict(zip(names, asked[3:], strict=True))
    served, begin = serving.backward_for(query, key, value, wanted, enable_gqa), perf_counter()
    arrays = scores.get(wanted.score).differentiable
    if (gradients := served.gradients) is not None:
        wants = (*asked[:3], *(of_tensors[array.name] for array in arrays))
        try:
            found = gradients(query, key, value, output, lse, grad, scale, wanted.in_order(query, key), grad_lse, wants)
            by_name = dict(zip((array.name for array in arrays), found[3:], strict=False))
            given = {name: wanted.operands[name] for name in names}
            rest = (None if (x := by_name.get(name)) is None else x.to(given[name].dtype) for name in names)
            result = (*found[:3], *rest)
            served.row.count(begin)
            return result
        except WrongArguments:
            raise
        except Exception as error:  # no memory, a failed launch
            serving.hand_over(error, query, key, value, wanted, enable_gqa)
    plain = grad_lse is None and not any(asked[3:])
    if plain and torchs.takes(query, key, value, wanted, scale, enable_gqa):
        with incumbent.aside():
            by_torch = torchs.backward(grad, query, key, value, output, lse, torchs.form(query, key, wanted), scale)
        result = (*by_torch, *[None] * len(names))
    else:
        result = by_operations(grad, grad_lse, query, key, value, wanted, scale, asked)
    if gradients is None:
        served.row.count(begin)
    return result


def by_operations(
    grad: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, wanted: AttnMask,
    scale: float | None, asked: Sequence[bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The same from query, key and value alone."""
    blocked = derivatives.attention(query, key, value, wanted, scale, grad_lse is not None)
    wants = derivatives.flags(wanted, asked[:3], asked[3:], False)
    results = (grad,) if grad_lse is None else (grad, grad_lse)
    found = iter(blocked.pulled(wants)(*derivatives.given(query, key, value, wanted), *results))
    return tuple(next(found) if one else None for one in asked)
