"""The log-sum-exp of attention beside an output that somebody else computed, and which keys a mask hides."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from elsa_tune.generate.operands import limits_at, named
from elsa_tune.generate.tensors import lse_dtype
from elsa_tune.parts import mask as masks
from elsa_tune.parts import score as scores
from elsa_tune.parts.mask import NONE
from elsa_tune.parts.operand import Operands
from elsa_tune.problem import Problem


def hidden(problem: Problem, position: Tensor, key: Tensor, limits: Mapping[str, Any]) -> Tensor:
    """Which keys lie outside the bounds of the queries at these positions [rows, 1], [rows, keys], or for limits shaped [..., 1 or rows, 1]
    [..., rows, keys]."""
    low, high = problem.seen(position, **limits)
    outside: Tensor = (key < low) | (key >= high)
    return outside


def logsumexp(
    query: Tensor, key: Tensor, family: Problem, operands: Operands, scale: float | None, rows: int = 256
) -> Tensor:
    """log of each row's sum of exponentials, [batch, heads, q_len], float32 (of a float64 query float64); scores of ``rows`` rows exist at
    a time."""
    batch, heads, q_len, head_dim = query.shape
    group, kv_len = heads // key.shape[1], key.shape[2]
    wide = lse_dtype(query)
    keys = key.to(wide).unsqueeze(2).transpose(-1, -2)  # [batch, kv_heads, 1, head_dim, kv_len]
    shape = {"batch": batch, "heads": heads, "kv_heads": key.shape[1], "q_len": q_len, "kv_len": kv_len}
    posed, mask, chain = family.reshaped(**shape), masks.get(family.mask), scores.get(family.score)
    own = named(posed, operands)
    posed = posed.reshaped(integers=tuple(own[name] for name in mask.integers))
    of_batch, of_head, of_key = (torch.arange(n, device=query.device) for n in (batch, heads, kv_len))
    place: dict[str, Any] = {"batch": of_batch[:, None, None, None], "head": of_head[:, None, None], "key": of_key}
    place["behind"], place["kv_head"] = kv_len - q_len, place["head"] // group
    heads_of = {"batch": of_batch[:, None, None], "head": of_head[:, None]}
    found = torch.empty(batch, heads, q_len, dtype=wide, device=query.device)
    for first in range(0, q_len, rows):
        some = query[:, :, first : first + rows].to(wide) * (head_dim**-0.5 if scale is None else scale)
        logits = (some.view(batch, -1, group, some.shape[2], head_dim) @ keys).flatten(1, 2)
        position = torch.arange(first, first + some.shape[2], device=query.device)[:, None]
        logits = chain.of(logits, own, position=position, **place)
        if family.mask != NONE:
            limits = limits_at(posed, own, batch=place["batch"], position=position)
            logits = logits.masked_fill(hidden(posed, position, of_key, limits), float("-inf"))
        if mask.tested:
            logits = logits.masked_fill(~mask.passes(own, position=position, **place), float("-inf"))
        sums = torch.logsumexp(logits, -1)
        for term in chain.terms:
            sums = torch.logaddexp(sums, term.at(own[term.name], heads_of).to(wide))
        found[:, :, first : first + rows] = sums
    return found
