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
    kv_heads, kv_len = key.shape[1:3]
    wide, own = lse_dtype(query), named(family, operands)
    mask, chain = masks.get(family.mask), scores.get(family.score)
    of_batch, of_head, of_key = (torch.arange(n, device=query.device) for n in (batch, heads, kv_len))
    found = query.new_full((batch, heads, q_len), float("-inf"), dtype=wide)
    if found.numel() and key.numel():
        parts = []
        group = heads // kv_heads
        shape = {"batch": batch, "heads": heads, "kv_heads": kv_heads, "q_len": q_len, "kv_len": kv_len}
        posed = family.reshaped(**shape, integers=tuple(own[name] for name in mask.integers))
        keys = key.to(wide).unsqueeze(2).transpose(-1, -2)  # [batch, kv_heads, 1, head_dim, kv_len]
        place: dict[str, Any] = {"batch": of_batch[:, None, None, None], "head": of_head[:, None, None], "key": of_key}
        place["behind"], place["kv_head"] = kv_len - q_len, place["head"] // group
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
            parts.append(torch.logsumexp(logits, -1))
        found = torch.cat(parts, 2)
    for term in chain.terms:
        at = {"batch": of_batch[:, None, None], "head": of_head[:, None]}
        found = torch.logaddexp(found, term.at(own[term.name], at).to(wide))
    return found
