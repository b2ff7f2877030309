"""Backends: what each must offer, and which there are. A backend is a file or folder here with a search space of its name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any, Protocol, cast

from elsa_tune import places
from elsa_tune.device import Device
from elsa_tune.errors import BadVariant
from elsa_tune.problem import Problem
from elsa_tune.variant import Variant

if TYPE_CHECKING:
    from torch import Tensor

    from elsa_tune.generate.render import Source
    from elsa_tune.space import Law


Operands = tuple[int, ...]
"""What a family takes beside its tensors: the integers of its mask, in its order."""


class Call(Protocol):
    """Computes attention of [batch, heads, length, dim] tensors into a new output, or into ``out`` where it can.

    ``lse`` [batch, heads, q_len], float32 and contiguous, receives the logarithm of each row's sum of exponentials.
    """

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None = None,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        operands: Operands = (),
    ) -> Tensor: ...


class Kernel(Call, Protocol):
    """A built variant: computes one family for any shape."""

    def bind(self, query: Tensor, key: Tensor, value: Tensor) -> Call:
        """A call for tensors of exactly these shapes and strides, with everything that can be computed beforehand done."""


class Gradients(Protocol):
    """Computes dQ, dK, dV of a backward family from what the forward pass saved: output, log-sum-exp (float32), and the
    gradient of the output."""

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
    ) -> tuple[Tensor, ...]: ...


@dataclass(frozen=True, slots=True)
class Built:
    """What building left behind. ``path`` is None where nothing needs building; resources are the compiler's report, and
    ``flaw`` is what in it speaks against ever using the kernel."""

    digest: str
    path: Path | None = None
    resources: Mapping[str, int] = field(default_factory=dict)
    flaw: str = ""


class Backend(Protocol):
    """The one protocol that tuning, checking and dispatch talk to."""

    LAWS: tuple[Law, ...]
    generated: bool  # renders code; torch's own kernels are not

    def refusal(self, problem: Problem, device: Device) -> str | None:
        """Why this backend cannot serve the problem on the device, or None."""

    def source(self, variant: Variant, problem: Problem) -> Source | None:
        """The rendered code, or None for a backend that renders nothing."""

    def command(self, variant: Variant) -> list[str]:
        """The compile command, without input and output; empty where nothing is compiled."""

    def digest(self, variant: Variant, problem: Problem, device: Device | None = None) -> str:
        """Names what would be built: equal digests are the same kernel."""

    def build(self, variant: Variant, problem: Problem, device: Device | None = None) -> Built:
        """Compile for the device (None: this machine's), or find in the kernel cache. Raises BuildFailed, CompilerMissing, KernelCacheUnsafe."""

    def find(self, digest: str) -> Built | None:
        """What was built before under a digest, or None. Never compiles. Raises KernelCacheUnsafe."""

    def load(self, built: Built, variant: Variant, problem: Problem) -> Any:
        """A Kernel, or for a backward problem Gradients."""

    def toolchain(self, device: Device | None = None) -> dict[str, str]:
        """Names and versions that decide what is built for the device (None: this machine's): provenance of every measurement.
        Raises CompilerMissing where nothing can be built or run."""


@cache
def names() -> tuple[str, ...]:
    """Every backend's name: what is in this folder and has a search space."""
    spaces = places.data("search_spaces")
    return tuple(
        sorted(m.name for m in iter_modules([str(Path(__file__).parent)]) if (spaces / f"{m.name}.toml").is_file())
    )


@cache
def get(name: str) -> Backend:
    """The backend called ``name``. Raises BadVariant."""
    if name not in names():
        raise BadVariant(f"backend {name!r} is unknown; use one of {', '.join(names())}")
    backend: Backend = cast(Any, import_module(f"elsa_tune.generate.{name}"))
    return backend
