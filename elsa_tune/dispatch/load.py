"""load(problem): the kernel that serves a problem, as an object to call and to ask."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from elsa_tune.device import Device, detect
from elsa_tune.dispatch import meaning, serving
from elsa_tune.errors import ElsaTuneError, KernelMissing, WrongArguments
from elsa_tune.generate import backends, lawful
from elsa_tune.generate.backends import Kernel, Operands
from elsa_tune.generate.render import Source
from elsa_tune.generate.tensors import described, lse_dtype, needs_grad, number
from elsa_tune.masks import NONE, AttnMask, of_tensor, told_by
from elsa_tune.parts import element as elements
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
        attn_mask: Tensor | AttnMask | None = None,
    ) -> Tensor:
        """Attention for any shape of the problem's family; ``lse`` [batch, heads, q_len], float32 (for float64 float64) and contiguous,
        receives the log-sum-exp. ``attn_mask`` is the problem's mask and scores with the operands of this call, of which what takes
        numbers alone may be left out: they are the problem's own. Raises WrongArguments for other tensors."""
        self._check(query, key, value, lse)
        scale = None if scale is None else number("scale", scale)
        given = self._operands(attn_mask, query, key) if attn_mask is not None or self.problem.declared else ()
        if torch.is_grad_enabled() and needs_grad(query, key, value, *given):
            raise WrongArguments("a loaded kernel keeps no gradients; use elsa_tune.attention, or torch.no_grad()")
        return self._kernel(query, key, value, scale, None, lse, given)

    def _operands(self, attn_mask: Tensor | AttnMask | None, query: Tensor, key: Tensor) -> Operands:
        problem, given = self.problem, meaning.own(attn_mask, query.shape[2], key.shape[2])
        if given is None:
            given = NONE
        elif isinstance(given, Tensor):
            given = of_tensor(given)
        elif not isinstance(given, AttnMask):
            raise WrongArguments(f"attn_mask is {described(given)}; it must be a tensor, or of elsa_tune.masks")
        wanted = given & told_by(problem, given)
        if (wanted.mask, wanted.score) != (problem.mask, problem.score):
            raise WrongArguments(
                f"attn_mask is {given}; this kernel is of {problem.family}, whose tensors it must bring"
            )
        operands = wanted.in_order(query, key)
        if (
            backends.role(str(self.variant)) == "rival"
        ):  # torch's kernels remember what they made of a tensor: this one is new
            return tuple(x.view_as(x) if isinstance(x, Tensor) else x for x in operands)
        return operands

    def _check(self, query: Tensor, key: Tensor, value: Tensor, lse: Tensor | None) -> None:
        """Raise WrongArguments unless these are what a kernel of the family reads and writes."""
        named = {"query": query, "key": key, "value": value}
        family, dtype = self.problem.family, getattr(torch, elements.get(self.problem.dtype).torch)
        place = torch.device(self.device.torch).type
        for name, x in named.items():
            if not (isinstance(x, Tensor) and x.dtype is dtype and x.device.type == place):
                raise WrongArguments(f"{name} is {described(x)}; {family} takes {dtype} tensors, on {place} as loaded")
        posed = serving.problem_of(query, key, value, enable_gqa=True)
        if posed is None or (posed.head_dim, posed.value_dim) != (self.problem.head_dim, self.problem.value_dim):
            shapes, d, v = (
                ", ".join(str(list(x.shape)) for x in named.values()),
                self.problem.head_dim,
                self.problem.value_dim,
            )
            raise WrongArguments(
                f"query, key, value are {shapes}; {family} takes [batch, heads, q_len, {d}], [batch, kv_heads, kv_len, {d}], "
                f"[batch, kv_heads, kv_len, {v}], of one device, none of them empty"
            )
        wanted, of_lse = query.shape[:3], lse_dtype(query)
        if lse is not None and not (
            isinstance(lse, Tensor)
            and (lse.dtype, lse.shape, lse.device) == (of_lse, wanted, query.device)
            and not (lse.is_neg() or lse.requires_grad)
            and lse.is_contiguous()
        ):
            expected = f"{of_lse} {list(wanted)}, contiguous, on {query.device}"
            raise WrongArguments(f"lse is {described(lse)}; it must be {expected}")

    @property
    def source(self) -> Source | None:
        """The rendered code; None if torch's own kernel serves."""
        return backends.get(self.variant.backend).source(self.variant, self.problem)


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
    wanted = problem if isinstance(problem, Problem) else Problem.parse(problem)
    found = detect(device)
    here = next((d for d in found if not elements.get(wanted.dtype).narrow or d.is_gpu), found[0])
    shelf = serving.current()
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
