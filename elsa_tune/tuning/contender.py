"""A contender: a variant built for a device. How one is built and checked, each a job for a worker."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from elsa_tune.device import Device
from elsa_tune.generate import backends
from elsa_tune.generate.backends import Built, Gradients, Kernel
from elsa_tune.problem import Problem
from elsa_tune.prove import check, reference
from elsa_tune.prove.check import Verdict
from elsa_tune.tuning.workbench import workbench
from elsa_tune.variant import Variant


@dataclass(frozen=True, slots=True)
class Contender:
    """A variant built for a device, in a race."""

    variant: Variant
    built: Built
    device: Device

    def load(self, problem: Problem) -> Kernel | Gradients:
        """Its kernel, or gradients, in this process."""
        return backends.get(self.variant.backend).load(self.built, self.variant, problem)


def build(variant: Variant, problem: Problem, device: Device) -> Built:
    """Build apart from the caller's process: a compiler that crashes takes nobody with it."""
    os.environ.pop("TRITON_INTERPRET", None)  # whoever asks for a device means its compiler
    return backends.get(variant.backend).build(variant, problem, device)


def check_family(problem: Problem, candidate: Contender, peers: Sequence[Contender]) -> Verdict:
    """Hostile inputs; see elsa_tune.prove.check."""
    kernels = [peer.load(problem) for peer in peers]
    longest = check.longest(candidate.variant, problem, candidate.device)
    return check.check_family(candidate.load(problem), problem, kernels, device=candidate.device.torch, longest=longest)


def check_shape(problem: Problem, candidate: Contender, incumbent: Contender) -> Verdict:
    """The problem at its own size, against float64 rows and the incumbent's error."""
    made = workbench(problem, candidate.device)

    def error_of(contender: Contender) -> tuple[reference.Error, str]:
        kernel = contender.load(problem)
        if not isinstance(kernel, Kernel):
            return check.gradient_error(kernel, problem, made.inputs[0]), ""
        out, stray = check.run(kernel, made.inputs[0])
        return reference.measure_error(problem, made.inputs[0], made.rows, out, made.truth), stray

    name, (error, stray) = str(incumbent.variant), error_of(candidate)
    if candidate.variant == incumbent.variant:
        made.peer_errors[name] = error.relative
    elif name not in made.peer_errors:
        made.peer_errors[name] = error_of(incumbent)[0].relative
    return check.judge(problem, f"{problem.shape}", error, stray, made.peer_errors[name])
