"""load(problem): the kernel that serves a problem, as an object to call and to ask."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from elsa_tune.device import Device, detect
from elsa_tune.dispatch import attention as dispatch
from elsa_tune.errors import ElsaTuneError, KernelMissing, WrongArguments
from elsa_tune.generate import backends, lawful
from elsa_tune.generate.backends import Kernel
from elsa_tune.generate.render import Source
from elsa_tune.generate.tensors import by_name
from elsa_tune.parts import element as elements
from elsa_tune.parts import mask as masks
from elsa_tune.parts import score as scores
from elsa_tune.problem import Problem
from elsa_tune.space import Space
from elsa_tune.variant import Variant


@dataclass(frozen=True, slots=True)
class LoadedKernel:
    """A kernel chosen for a problem: call it, and ask what it is.

    ``rung`` is how it was chosen (see elsa_tune.dispatch.ladder), ``error`` the measured error relative to max|v| (None if
    it was measured for another shape or device), ``ratio`` its measured advantage over torch's SDPA.
    """

    problem: Problem
    device: Device
    variant: Variant
    rung: str
    error: float | None
    ratio: float | None
    _kernel: Kernel

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None = None,
        lse: Tensor | None = None,
        operands: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """Attention for any shape of the problem's family; ``lse`` [batch, heads, q_len], float32 and contiguous, receives
        the log-sum-exp. ``operands`` are those of its mask and scores by name: numbers, by default the problem's own, and tensors,
        like ``lengths``, int64 [batch]. Raises WrongArguments for other tensors."""
        if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
            raise WrongArguments("a loaded kernel keeps no gradients; use elsa_tune.attention, or torch.no_grad()")
        posed = dispatch.problem_of(query, key, value, is_causal=False, enable_gqa=True)
        if posed is None or posed.family != _posed_by_tensors(self.problem):
            shapes = ", ".join(str(tuple(x.shape)) for x in (query, key, value))
            raise WrongArguments(
                f"query, key, value {shapes} are not of family {self.problem.family}; use elsa_tune.attention"
            )
        if not self.problem.declared:
            return self._kernel(query, key, value, scale, None, lse)
        return self._kernel(query, key, value, scale, None, lse, by_name(self.problem, operands or {}))

    @property
    def source(self) -> Source | None:
        """The rendered code; None if torch's own kernel serves."""
        return backends.get(self.variant.backend).source(self.variant, self.problem)


@lru_cache(maxsize=1024)
def _posed_by_tensors(problem: Problem) -> str:
    """What its tensors alone say of a problem's family: neither mask nor scores."""
    return problem.reshaped(mask=masks.NONE, score=scores.NONE, integers=(), reals=()).family


def _rival(problem: Problem, device: Device) -> Variant:
    """The first kernel of torch's own that may serve a problem. Raises KernelMissing."""
    reasons = {name: backends.get(name).refusal(problem, device) for name in backends.rivals()}
    able = [name for name, reason in reasons.items() if not reason]
    if found := next((v for name in able for v in lawful.variants(Space.read(name), problem, device)), None):
        return found
    raise KernelMissing(f"nothing serves {problem}: {'; '.join(filter(None, reasons.values()))}")


def load(problem: Problem | str, device: str = "auto") -> LoadedKernel:
    """The best known kernel for a problem, built now if it must be. Raises BadProblem, BadDevice, KernelMissing.

    ``device`` auto is the CPU, or the first GPU for what only GPUs serve.
    """
    wanted = Problem.parse(problem) if isinstance(problem, str) else problem
    found = detect(device)
    here = next((d for d in found if not elements.get(wanted.dtype).narrow or d.is_gpu), found[0])
    shelf = dispatch.current()
    chosen = shelf.choice(wanted, here)
    measured = chosen.winner.measurement if chosen.winner else None
    if chosen.by_sdpa:
        variant = chosen.variant or _rival(wanted, here)
        backend = backends.get(variant.backend)
        kernel = backend.load(backend.build(variant, wanted, here), variant, wanted)
    else:
        assert chosen.variant is not None
        variant = chosen.variant
        try:
            kernel = shelf.obtain(chosen.problem, here, chosen)
        except ElsaTuneError as error:
            raise KernelMissing(f"{variant} cannot be built for {wanted}: {error}") from error
    if not isinstance(kernel, Kernel):
        raise KernelMissing(
            f"{wanted} poses gradients; elsa_tune.attention calls their kernel where torch differentiates"
        )
    here_exactly = chosen.rung == "exact"
    return LoadedKernel(
        wanted, here, variant, chosen.rung, measured.error if measured and here_exactly else None,
        measured.ratio if measured else None, kernel,
    )  # fmt: skip
