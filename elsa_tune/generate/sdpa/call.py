"""Calling torch's own kernels: its function with a backend chosen, FlexAttention, and gradients through either."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch._functorch import config as functorch
from torch.nn.attention import SDPBackend, sdpa_kernel

from elsa_tune.generate import incumbent
from elsa_tune.generate.backends import Call, Operands
from elsa_tune.generate.logsumexp import logsumexp
from elsa_tune.generate.posed import Posed, attn_mask, eager, posed
from elsa_tune.generate.sdpa.block_masks import block_mask
from elsa_tune.generate.sdpa.derived import Derived
from elsa_tune.parts import element as elements
from elsa_tune.parts import mask as masks
from elsa_tune.parts import score as scores
from elsa_tune.parts.mask import NONE
from elsa_tune.problem import Problem

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


_attn_masks = Derived(attn_mask, 4)


@dataclass(frozen=True)
class SdpaKernel:
    """torch's function with one of its backends chosen; it always allocates its own output. A mask comes in torch's own form, or
    dense where it has none."""

    _backend: SDPBackend
    _family: Problem

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
        if lse is not None:
            lse.copy_(logsumexp(query, key, self._family, operands, scale))
        is_causal, attn_mask = masks.get(self._family.mask).torchs == "is_causal", None
        if self._family.score != scores.NONE:
            is_causal = False
        if self._family.score != scores.NONE or (self._family.mask != NONE and not is_causal):
            attn_mask = _attn_masks.of(self._family, operands, query, key)
        grouped = query.shape[1] != key.shape[1]
        if grouped and self._backend is SDPBackend.EFFICIENT_ATTENTION:  # it takes no groups: what users do by hand
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
            grouped = False
        with sdpa_kernel(self._backend):
            return incumbent.attention(
                query, key, value, attn_mask, is_causal=is_causal, scale=scale, enable_gqa=grouped
            )

    def bind(self, query: Tensor, key: Tensor, value: Tensor) -> Call:
        """Nothing can be computed beforehand."""
        return self


@dataclass(frozen=True)
class EagerKernel:
    """What a program writes by hand for scores that no kernel of torch's knows: products, scores, mask, softmax, products."""

    _family: Problem

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
        if lse is not None:
            lse.copy_(logsumexp(query, key, self._family, operands, scale))
        hidden = None if self._family.mask == NONE else ~_attn_masks_dense.of(self._family, operands, query, key)
        there, factors = _as_posed.of(self._family, operands, query, key), None
        if scores.get(self._family.score).weighing is not None:
            factors = _factors.of(self._family, operands, query, key)  # drawn once: a race is with the rest
        return eager(there, query, key, value, scale, hidden, factors=factors)

    def bind(self, query: Tensor, key: Tensor, value: Tensor) -> Call:
        """Nothing can be computed beforehand."""
        return self


def _dense(posed: Posed) -> Tensor:
    """Which pairs are seen, written out."""
    return posed.dense()


def _score_mod(posed: Posed) -> Callable[..., Any]:
    """FlexAttention's function of a score."""
    chain, own, problem = scores.get(posed.problem.score), posed.own, posed.problem

    def scored(score: Tensor, batch: Tensor, head: Tensor, position: Tensor, key: Tensor) -> Any:
        place = {"batch": batch, "head": head, "kv_head": head // problem.group, "position": position, "key": key}
        return chain.of(score, own, **place, behind=problem.kv_len - problem.q_len)

    return scored


def _itself(posed: Posed) -> Posed:
    """What a call poses."""
    return posed


def _drawn(posed: Posed) -> Tensor | None:
    """What weights are multiplied by, in floats that states are of."""
    return posed.factors(getattr(torch, elements.get(posed.problem.dtype).state))


_as_posed, _attn_masks_dense, _factors = Derived(_itself, 4), Derived(_dense, 4), Derived(_drawn, 4)
_score_mods, _block_masks = Derived(_score_mod, 64), Derived(block_mask, 64)


class FlexKernel:
    """torch's FlexAttention, compiled for the problem."""

    def __init__(self, problem: Problem) -> None:
        self._family, self._compiled = problem, _compiled_flex(problem.reshaped(launch="eager"))

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
        mask = None if self._family.mask == NONE else _block_masks.of(self._family, operands, query, key)
        options = {"block_mask": mask, "scale": scale, "enable_gqa": query.shape[1] != key.shape[1]}
        if self._family.score != scores.NONE:
            options["score_mod"] = _score_mods.of(self._family, operands, query, key)
        terms = scores.get(self._family.score).terms
        if lse is None and not terms:
            made: Tensor = self._compiled(query, key, value, **options)
            return made
        made, sums = self._compiled(query, key, value, **options, return_lse=True)
        for term in terms:  # as models do: the sink takes its share of the weights afterwards
            sink = _as_posed.of(self._family, operands, query, key).own[term.name][:, None]
            made = made * (sums - sink).sigmoid().unsqueeze(-1)
            sums = torch.logaddexp(sums, sink)
        if lse is not None:
            lse.copy_(sums)
        return made

    def bind(self, query: Tensor, key: Tensor, value: Tensor) -> Call:
        """Nothing can be computed beforehand."""
        return self


class AutogradKernel:
    """Gradients by autograd through one of torch's kernels; the graph of each set of inputs is made once."""

    def __init__(self, forward: Call, family: Problem) -> None:
        self._family = family
        # what torch compiles may be differentiated only once otherwise; read both when it compiles and when it is called
        self._lasting = (
            partial(functorch.patch, donated_buffer=False) if isinstance(forward, FlexKernel) else nullcontext
        )
        self._forward, self._graphs = forward, dict[tuple[object, ...], tuple[Tensor, tuple[Tensor, ...]]]()

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
        if grad_lse is not None or any(asked[3:]):
            return _by_operations(self._family, query, key, value, grad, scale, operands, grad_lse, asked)
        name = (query.data_ptr(), scale, operands)
        with self._lasting():
            if name not in self._graphs:
                # their data alone: a race writes every value again in place, which a graph would notice
                q, k, v = (x.data.requires_grad_() for x in (query, key, value))
                self._graphs[name] = self._forward(q, k, v, scale, operands=operands), (q, k, v)
            made, leaves = self._graphs[name]
            found = torch.autograd.grad(made, leaves, grad, retain_graph=True)
        return tuple(x if wanted else None for x, wanted in zip(found, asked, strict=False))


def _by_operations(
    family: Problem, query: Tensor, key: Tensor, value: Tensor, grad: Tensor, scale: float | None, operands: Operands,
    grad_lse: Tensor | None, asked: Sequence[bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """What none of torch's kernels gives: gradients through the log-sum-exp, and of what scores are of."""
    of_scores = {array.name for array in scores.get(family.score).differentiable}
    own = [
        x.detach().requires_grad_() if one.name in of_scores else x
        for one, x in zip(family.declared, operands, strict=True)
    ]
    q, k, v = (x.detach().requires_grad_() for x in (query, key, value))
    there = posed(family, tuple(own), q, k)
    hidden = None if family.mask == NONE else ~there.dense()
    results, given = [eager(there, q, k, v, scale, hidden, factors=there.factors(q.dtype))], [grad]
    if grad_lse is not None:
        results, given = [*results, logsumexp(q, k, family, tuple(own), scale)], [grad, grad_lse]
    leaves = [q, k, v, *(x for one, x in zip(family.declared, own, strict=True) if one.name in of_scores)]
    found = torch.autograd.grad(results, leaves, given, allow_unused=True)
    return tuple(x if wanted else None for x, wanted in zip(found, asked, strict=False))


@lru_cache(maxsize=64)
def _compiled_flex(problem: Problem) -> Callable[..., Any]:
    """FlexAttention for torch.compile to compile in a code object of its own: one that was compiled for eight shapes is called
    eagerly from then on, and every problem is another shape."""
    from torch.nn.attention.flex_attention import flex_attention

    flex: Callable[..., Any] = flex_attention

    def attend(*tensors: Tensor, **options: Any) -> Any:
        return flex(*tensors, **options)

    alone = FunctionType(attend.__code__.replace(), attend.__globals__, closure=attend.__closure__)
    return torch.compile(alone, dynamic=False)
