"""Backends: what each must offer and what it may be asked, and which there are.

A backend is a file or folder here with a search space of its name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from types import MethodType
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

from elsa_tune import places
from elsa_tune.device import Device
from elsa_tune.errors import BadVariant
from elsa_tune.parts.operand import Operands as Operands
from elsa_tune.problem import Problem
from elsa_tune.variant import Variant

if TYPE_CHECKING:
    from torch import Tensor

    from elsa_tune.generate.gpu.work import Work
    from elsa_tune.generate.portable import Portable
    from elsa_tune.generate.render import Source


Law = Callable[..., str | None]
"""A named rule: takes axis values by name (and ``problem``, ``device`` if it asks); returns a reason to refuse, or None."""


class Call(Protocol):
    """Computes attention of [batch, heads, length, dim] tensors into a new output, or into ``out`` where it can.

    ``lse`` [batch, heads, q_len], float32 (for float64 float64) and contiguous, receives the logarithm of each row's sum of exponentials.
    ``operands`` are what the family declares beside its tensors, in its order. Raises WrongArguments for others.
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


@runtime_checkable
class Kernel(Call, Protocol):
    """A built variant: computes one family for any shape."""

    def bind(self, query: Tensor, key: Tensor, value: Tensor) -> Call:
        """A call for tensors of exactly these shapes and strides, with everything that can be computed beforehand done."""
        ...


class Gradients(Protocol):
    """Computes dQ, dK, dV of a backward family, and what each array of its scores receives, from what the forward pass saved: output,
    log-sum-exp [batch, heads, q_len] (float32, for float64 float64), and the gradient of the output; where the log-sum-exp is a result
    too, also from its gradient. ``asked``: which of them are wanted, in that order, those of arrays not unless it says so; the
    others are None. Unlike a Kernel it has nothing to bind."""

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
    ) -> tuple[Tensor | None, ...]: ...


@dataclass(frozen=True, slots=True)
class Built:
    """What building left behind. ``path`` is None where nothing needs building; resources are the compiler's report, and
    ``flaw`` is what in it speaks against ever using the kernel."""

    digest: str
    path: Path | None = None
    resources: Mapping[str, int] = field(default_factory=dict)
    flaw: str = ""


@dataclass(frozen=True, slots=True)
class Finding:
    """One fact about this machine; ``remedy`` says what to do where something is lacking."""

    topic: str
    good: bool
    detail: str
    remedy: str = ""


class Counts(Protocol):
    """How many calls somebody answered, and in how many seconds: called, it says."""

    number: int

    def __call__(self) -> tuple[int, float]: ...


class Interposer(Protocol):
    """Answers torch's CPU operator for attention in its place, without Python, by kernels of a backend. What it cannot answer it asks the
    operator ``elsa_tune::decide`` of, which must be registered."""

    def enable(self, name: str) -> None:
        """Answer from now on, registered under a name. Raises BuildFailed."""

    def disable(self) -> None:
        """Answer no more."""

    def forget(self) -> None:
        """Who answers what."""

    def ask(self, always: int) -> None:
        """Whether from now on every call is asked about."""

    def aside(self, by: int) -> None:
        """Let torch's own kernel answer this thread, ``aside(1)``, until ``aside(-1)``."""

    def fail(self, why: str) -> None:
        """The call of this thread that is asked about fails, and this is to be said of it."""

    def counts(self) -> Counts:
        """Of somebody new who answers."""
        ...

    def bind(
        self, tensors: tuple[Tensor, Tensor, Tensor], is_causal: bool, mask: Tensor | None, counts: Counts,
        kernel: Kernel | None = None, results: tuple[Tensor, Tensor] | None = None, operands: Operands = (),
    ) -> None:  # fmt: skip
        """Let a kernel, or torch's own where none is given, answer calls with such query, key, value and mask from now on, counted in
        ``counts``; ``results`` are an output and a log-sum-exp of such a call. Nothing happens where only Python can."""

    def bind_roughly(
        self, tensors: tuple[Tensor, Tensor, Tensor], is_causal: bool, mask: Tensor | None, counts: Counts
    ) -> None:
        """Let torch's own kernel also answer calls that nobody is bound to and that differ from such in their length of keys alone, where
        it is served alike (Problem.nearby), counted in ``counts``."""


class Asked(Protocol):
    """What a backend may be asked, and what one answers that says nothing else."""

    def examine(self) -> Iterator[Finding]:
        """What this machine has and lacks of the tools that the backend needs."""
        return iter(())

    def begin_worker(self) -> None:
        """The first thing in a process whose parent loads code and never computes."""

    def peak(self, device: Device, seconds: float) -> dict[str, float]:
        """Measured peaks of the device, where a kernel of the backend measures them: ``gflops`` and ``gbytes`` a second."""
        return {}

    def interposer(self) -> Interposer | None:
        """What answers torch's operator without Python by kernels of this backend; None where there is nothing such. Raises BuildFailed,
        CompilerMissing, KernelCacheUnsafe, OSError."""
        return None

    def slow_to_start(self, variant: Variant) -> bool:
        """Whether a kernel is compiled for every shape, for many seconds, so that it is raced only where there is time."""
        return False

    def work(self, variant: Variant, problem: Problem, resources: Mapping[str, int]) -> Work | None:
        """What a kernel with such a compiler's report does, for a prediction of its time on a GPU; None where nothing tells."""
        return None

    def speaks(self, device: Device) -> str:
        """The language of ``templates/kit`` in which its kernels can be headers for the device; nothing where there is none."""
        return ""

    def no_header(self, problem: Problem) -> str | None:
        """Why a header's function cannot compute the problem, in any language, or None."""
        return "its kernels need Python"

    def portable(self, variant: Variant, problem: Problem) -> Portable | None:
        """A kernel for programs without Python: its text and its launch; None for a variant that has no header."""
        return None

    def spills(self, variant: Variant, problem: Problem, device: Device) -> bool:
        """Whether a compiler that is here says that the kernel spills on the device, which need not be here."""
        return False


class Backend(Asked, Protocol):
    """The one protocol that tuning, checking, shipping and dispatch talk to."""

    LAWS: tuple[Law, ...]

    def refusal(self, problem: Problem, device: Device) -> str | None:
        """Why this backend cannot serve the problem on the device, or None."""
        ...

    def source(self, variant: Variant, problem: Problem) -> Source | None:
        """The rendered code, or None for a backend that renders nothing."""
        ...

    def command(self, variant: Variant) -> list[str]:
        """The compile command, without input and output; empty where nothing is compiled."""
        ...

    def digest(self, variant: Variant, problem: Problem, device: Device | None = None) -> str:
        """Names what would be built: equal digests are the same kernel."""
        ...

    def build(self, variant: Variant, problem: Problem, device: Device | None = None) -> Built:
        """Compile for the device (None: this machine's), or find in the kernel cache. Raises BuildFailed, CompilerMissing, KernelCacheUnsafe."""
        ...

    def find(self, digest: str) -> Built | None:
        """What was built before under a digest, or None. Never compiles. Raises KernelCacheUnsafe."""
        ...

    def load(self, built: Built, variant: Variant, problem: Problem) -> Kernel | Gradients:
        """A Kernel, or for a backward problem Gradients."""
        ...

    def toolchain(self, device: Device | None = None) -> dict[str, str]:
        """Names and versions that decide what is built for the device (None: this machine's): provenance of every measurement.
        Raises CompilerMissing where nothing can be built or run."""
        ...


@cache
def names() -> tuple[str, ...]:
    """Every backend's name: what is in this folder and has a search space."""
    spaces = places.data("search_spaces")
    return tuple(
        sorted(m.name for m in iter_modules([str(Path(__file__).parent)]) if (spaces / f"{m.name}.toml").is_file())
    )


@cache
def get(name: str) -> Backend:
    """The backend called ``name``, with an answer to everything that it may be asked. Raises BadVariant."""
    if name not in names():
        raise BadVariant(f"backend {name!r} is unknown; use one of {', '.join(names())}")
    backend: Backend = cast(Any, import_module(f"elsa_tune.generate.{name}"))
    for question, answer in vars(Asked).items():
        if inspect.isfunction(answer) and not question.startswith("_") and not hasattr(backend, question):
            setattr(backend, question, MethodType(answer, backend))
    return backend


def candidates() -> tuple[str, ...]:
    """Those whose kernels are ours: what searches propose, and what ships."""
    return tuple(name for name in names() if _role(name) == "candidate")


def rivals() -> tuple[str, ...]:
    """Those whose kernels are not ours: what is raced against, and what serves where nothing of ours does."""
    return tuple(name for name in names() if _role(name) == "rival")


def role(variant: str) -> str:
    """Who a spelled variant is in a race, as the search space of its backend says: ``rival``, torch's own, or ``candidate``,
    which those of backends that only another version has are too. Imports no backend."""
    return _role(variant.partition(".")[0])


@cache
def _role(name: str) -> str:
    """What the search space of a backend says; a candidate's where it says nothing, or is not here."""
    found = places.read_toml(places.data("search_spaces") / f"{name}.toml") if name in names() else {}
    return str(found.get("role", "candidate"))
