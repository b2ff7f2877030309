"""A call of torch's function for each run of rows that see the same keys: what a program writes by hand for sequences without padding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from elsa_tune.generate import incumbent
from elsa_tune.generate.backends import Call, Operands
from elsa_tune.generate.logsumexp import logsumexp
from elsa_tune.generate.posed import Posed
from elsa_tune.generate.sdpa.block_masks import bounds_at
from elsa_tune.generate.sdpa.derived import Derived
from elsa_tune.generate.tensors import new_output
from elsa_tune.problem import Problem


def runs(posed: Posed) -> list[list[list[int]]]:
    """Of each batch entry, or of all: rows from where to where that see keys from where to where."""
    rows = torch.arange(posed.problem.q_len, device=posed.device)
    found = []
    for low, high in zip(*bounds_at(posed, rows), strict=True):
        begins = torch.ones_like(rows, dtype=torch.bool)
        begins[1:] = (low.diff() != 0) | (high.diff() != 0)
        first = rows[begins]
        end = torch.cat([first[1:], first.new_tensor([len(rows)])])
        found.append(torch.stack([first, end, low[first], high[first]], 1).tolist())
    return found


_runs = Derived(runs, 4)


@dataclass(frozen=True)
class RunsKernel:
    """torch's function, run by run."""

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
        made, grouped = new_output(query, value.shape[3]), query.shape[1] != key.shape[1]
        known = _runs.of(self._family, operands, query, key)
        for b in range(len(query)):
            for first, end, low, high in known[b % len(known)]:
                if low < high:
                    tensors = query[b : b + 1, :, first:end], key[b : b + 1, :, low:high], value[b : b + 1, :, low:high]
                    made[b, :, first:end] = incumbent.attention(*tensors, scale=scale, enable_gqa=grouped)[0]
                else:
                    made[b, :, first:end] = 0
        return made

    def bind(self, query: Tensor, key: Tensor, value: Tensor) -> Call:
        """Nothing can be computed beforehand."""
        return self
