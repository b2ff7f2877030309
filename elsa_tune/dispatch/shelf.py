"""Winners of this device, read once per process, and the kernels loaded or being built because of them."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

from elsa_tune.device import Device
from elsa_tune.dispatch import exactness, handovers, recording
from elsa_tune.dispatch.ladder import Choice, climb, climb_as_exact
from elsa_tune.errors import KernelMissing
from elsa_tune.generate import backends, lawful
from elsa_tune.generate import kernel_cache as _kernel_cache
from elsa_tune.generate.backends import Built, Gradients, Kernel
from elsa_tune.measurement import Winner
from elsa_tune.problem import Problem
from elsa_tune.prove import check
from elsa_tune.remember import layers
from elsa_tune.variant import Variant

MOST_SHAPES = 4096
"""Shapes remembered before a table starts anew: a growing key cache makes a new one at every step."""

Ready = Callable[[str, Kernel | Gradients], object]
"""Is told of a variant, spelled, whose kernel was built beside the calls."""

lock = threading.RLock()
"""Held while something is read or loaded, and while everything is forgotten."""


def _after_fork() -> None:
    """Whoever held it is not in this child."""
    global lock
    lock = threading.RLock()


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_after_fork)

BUILDER = "elsa-tune-build"
"""The name of threads that build beside calls."""

HANGS = 60.0
"""Seconds after which a build that is waited for is taken to hang."""

_ending = threading.Event()


@atexit.register
def end() -> None:
    """Begin no build any more, and wait for one that has begun, unless it hangs: a thread inside torch must not outlive the interpreter."""
    _ending.set()
    for thread in threading.enumerate():
        if thread.name == BUILDER:
            thread.join(HANGS)


class _Known:
    """Winners, read from the layers when a rung of the ladder asks for them, then kept in memory."""

    def __init__(self, beside: Callable[[Callable[[], object]], None]) -> None:
        self._beside = beside  # runs a job beside the calls
        self._opened: list[layers.Layer] = []
        self._others = iter(()) if recording.active else layers.nearest_first()
        self._sees_all = recording.active
        self._winners: dict[tuple[object, ...], list[Winner]] = {}
        self._slower: dict[Device, set[tuple[str, str]]] = {}

    def of_problem(self, problem: Problem, device: Device) -> list[Winner]:
        def read() -> list[Winner]:
            found = layers.winners_of(problem, device, self.nearest_first())
            if not found or found[0].layer != "own":
                self._every_layer()  # a team's database that was not read yet may know better
            return found

        return self._once((str(device), problem), read)

    def of_family(self, problem: Problem, device: Device) -> list[Winner]:
        wanted = problem.family.__eq__
        return self._once(
            (str(device), problem.family), lambda: layers.known_winners(device, self._every_layer(), wanted)
        )

    def akin(self, problem: Problem, device: Device) -> list[Winner]:
        kind = (problem.dtype, problem.mask, problem.score, problem.precision, problem.direction)
        return self._once((str(device), *kind), lambda: layers.known_winners(device, self._every_layer(), problem.akin))

    def other_masks(self, problem: Problem, device: Device) -> list[Winner]:
        kind = (
            problem.operator,
            problem.dtype,
            problem.precision,
            problem.direction,
            problem.head_dim,
            problem.value_dim,
        )
        return self._once(
            (str(device), *kind), lambda: layers.known_winners(device, self._every_layer(), problem.but_for_its_mask)
        )

    def slower(self, device: Device) -> set[tuple[str, str]]:
        with lock:
            if device not in self._slower:
                self._slower[device] = layers.slower_than_sdpa(device, self._every_layer())
            return self._slower[device]

    def nearest_first(self) -> Iterator[layers.Layer]:
        """The layers, each opened once and only where those before it did not answer."""
        yield from self._opened
        for layer in self._others:
            self._opened.append(layer)
            yield layer

    def troubles(self) -> list[str]:
        """What is wrong with the layers, as far as they were read."""
        with lock:
            return layers.troubles(self._opened)

    def _once(self, entry: tuple[object, ...], read: Callable[[], list[Winner]]) -> list[Winner]:
        with lock:
            if entry not in self._winners:
                if len(self._winners) >= MOST_SHAPES:
                    self._winners.clear()
                self._winners[entry] = read()
            return self._winners[entry]

    def _every_layer(self) -> list[layers.Layer]:
        """All layers, opened once; the team's that have changed are read again beside the calls."""
        if not self._sees_all:
            self._sees_all = True
            for source in layers.stale():
                self._beside(partial(_reread, source))
        return list(self.nearest_first())


def _advice(problem: Problem, device: Device) -> str:
    if reason := lawful.unserved(problem, [device], backends.candidates()):
        return f"no kernel can serve {problem.family} on {device}: {reason}"
    return f"elsa-tune --problem {problem} measures kernels for it"


def _reread(source: str) -> None:
    layers.refresh(source)
    for forget in layers.listeners:
        forget()


class Shelf:
    """Who serves what, and their kernels."""

    def __init__(self) -> None:
        self.troubles: dict[str, str] = {}
        self._known = _Known(self._later)
        self._measured: dict[tuple[str, Device], set[str]] = {}
        self._nearby: dict[tuple[Problem, Device], Choice] = {}
        self._exact: dict[tuple[Problem, Device, float], Choice] = {}
        self._kernels: dict[tuple[str, str], Kernel | Gradients] = {}  # (family, variant)
        self._hopeless: set[tuple[str, str]] = set()  # (family, variant) that could not be built or is wrong here
        self._waiting: deque[Callable[[], object]] = deque()
        self._builder: threading.Thread | None = None

    def explained(self, problem: Problem, device: Device) -> Choice:
        """The choice; among its steps what is wrong with the databases it was made from, and what can be done where nothing was
        found."""
        chosen = self.choice(problem, device)
        *before, last = chosen.steps
        advice = [_advice(problem, device)] if chosen.winner is None else []
        return replace(chosen, steps=(*self._known.troubles(), *before, *advice, last))

    def choice(self, problem: Problem, device: Device) -> Choice:
        """Who should serve a problem, and why."""
        if exactness.active and (times := exactness.asked()) is not None:
            return self._as_exact(problem, device, times)
        return climb(problem, device, self._known)

    def knows(self, problem: Problem, device: Device) -> bool:
        """Whether anybody is known to be the fastest for calls of a problem, be it torch's own kernel."""
        return self._choice_nearby(problem, device).winner is not None

    def knows_akin(self, problem: Problem, device: Device) -> bool:
        """Whether a kernel of ours won some problem of its kind, of whatever dimensions."""
        return any(not winner.measurement.is_rival for winner in self._known.akin(problem, device))

    def _choice_nearby(self, problem: Problem, device: Device) -> Choice:
        """The choice, or the one that was made for a length of keys within an eighth of its own: a growing key cache poses a new
        problem at every step, of which few were measured."""
        if exactness.active:
            return self.choice(problem, device)
        with lock:
            family = (problem.family, device)
            if family not in self._measured:
                self._measured[family] = {winner.problem for winner in self._known.of_family(problem, device)}
            if str(problem) in self._measured[family]:
                return self.choice(problem, device)
            rough = (problem.nearby, device)
            if rough not in self._nearby:
                if len(self._nearby) >= MOST_SHAPES:
                    self._nearby.clear()
                self._nearby[rough] = self.choice(problem, device)
            return replace(self._nearby[rough], problem=problem)

    def _as_exact(self, problem: Problem, device: Device, times: float) -> Choice:
        entry = (problem, device, times)
        with lock:
            if entry not in self._exact:
                if len(self._exact) >= MOST_SHAPES:
                    self._exact.clear()
                self._exact[entry] = climb_as_exact(problem, device, times, self._known.nearest_first())
            return self._exact[entry]

    def kernel(self, problem: Problem, device: Device, ready: Ready) -> tuple[str, Kernel | Gradients | None]:
        """A variant, spelled, whose kernel serves now, or None: then torch serves, until a build in the background calls ``ready``."""
        chosen = self._choice_nearby(problem, device)
        if chosen.variant is None or chosen.winner is None or chosen.by_sdpa:
            return "", None
        problem = chosen.problem
        name = (problem.family, str(chosen.variant))

        def attempt() -> None:
            if name in self._hopeless:  # another shape asked for it meanwhile, in vain
                return
            try:
                ready(name[1], self.obtain(problem, device, chosen))
            except Exception:
                self._hopeless.add(name)
                raise

        with lock:
            loaded = self._kernels.get(name)
            if loaded is None and (built := self._trusted(chosen)):
                loaded = self._load(chosen.variant, problem, built)
            if loaded is None and name not in self._hopeless:
                self._later(attempt)
        return name[1], loaded

    def obtain(self, problem: Problem, device: Device, chosen: Choice) -> Kernel | Gradients:
        """Compile the chosen variant if needed, and check it here unless it was measured here. Raises KernelMissing."""
        assert chosen.variant is not None
        with lock:
            loaded = self._kernels.get((problem.family, str(chosen.variant)))
        if loaded is not None:
            return loaded
        if built := self._trusted(chosen):
            return self._load(chosen.variant, problem, built)
        backend = backends.get(chosen.variant.backend)
        built = backend.build(chosen.variant, problem, device)
        if not _kernel_cache.checked(built.digest, str(device)):  # somebody else's winner, used here for the first time
            kernel = backend.load(built, chosen.variant, problem)
            longest = check.longest(chosen.variant, problem, device)
            verdict = check.check_family(kernel, problem, [], device=device.torch, longest=longest)
            if verdict.reason:
                raise KernelMissing(f"{chosen.variant} is wrong on this device: {verdict.reason}; torch's SDPA serves")
            _kernel_cache.note_checked(built.digest, str(device))
        return self._load(chosen.variant, problem, built)

    def _trusted(self, chosen: Choice) -> Built | None:
        """The very kernel that was checked and measured on this device for this family, if it is still built."""
        winner, variant = chosen.winner, chosen.variant
        if winner is None or variant is None or winner.layer != "own" or winner.rung != "exact":
            return None
        if winner.measurement.family != chosen.problem.family or winner.measurement.is_of_faulty_code:
            return None
        return backends.get(variant.backend).find(winner.measurement.digest)

    def _load(self, variant: Variant, problem: Problem, built: Built) -> Kernel | Gradients:
        kernel = backends.get(variant.backend).load(built, variant, problem)
        with lock:
            return self._kernels.setdefault((problem.family, str(variant)), kernel)

    def _later(self, job: Callable[[], object]) -> None:
        """Run it beside the calls, in a thread that ends when nothing waits."""
        with lock:
            self._waiting.append(job)
            if self._builder is None or not self._builder.is_alive():  # a fork leaves threads behind
                self._builder = threading.Thread(target=self._work, name=BUILDER, daemon=True)
                self._builder.start()

    def _work(self) -> None:
        while job := self._next():
            try:
                job()
            except Exception as error:
                self.troubles["background build"] = f"{type(error).__name__}: {error}"
                handovers.note("a kernel built beside the calls", error)

    def _next(self) -> Callable[[], object] | None:
        with lock:
            if self._waiting and not _ending.is_set():
                return self._waiting.popleft()
            self._builder = None
            return None
