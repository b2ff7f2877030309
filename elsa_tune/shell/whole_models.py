"""What whole models gain by their attention, at most: their other layers cannot be faster than the device's measured peaks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache

from elsa_tune import places
from elsa_tune.problem import Problem
from elsa_tune.space import read_toml
from elsa_tune.tuning.report import Outcome


@dataclass(frozen=True, slots=True)
class Model:
    """A model with so many layers that each pose ``problem``; ``weights`` are the parameters that every token meets."""

    name: str
    problem: Problem
    layers: int
    weights: int

    def other_seconds(self, peaks: Mapping[str, str | float]) -> float | None:
        """The least that everything but attention takes in float32, or None where the peaks are unknown."""
        gflops, gbytes = (float(peaks.get(f"peak_{name}", 0)) for name in ("gflops", "gbytes"))
        if not gflops or not gbytes:
            return None
        return max(2 * self.weights * self.problem.batch * self.problem.q_len / gflops, 4 * self.weights / gbytes) / 1e9


@dataclass(frozen=True, slots=True)
class Gain:
    """How many times faster a model's attention is than by torch, and the whole model at most."""

    model: Model
    attention: float
    whole: float


@cache
def models() -> tuple[Model, ...]:
    """Those of search_spaces/models.toml."""
    found = read_toml(places.data("search_spaces") / "models.toml")["model"]
    return tuple(Model(m["name"], Problem.parse(m["problem"]), m["layers"], m["weights"]) for m in found)


def gains(outcomes: Iterable[Outcome]) -> list[Gain]:
    """What each model gains whose problem was tuned: where torch's own kernel won, nothing."""
    won = {o.problem: o.winner for o in outcomes if o.winner and not o.device.is_gpu}
    found = []
    for model in models():
        winner = won.get(model.problem)
        if winner is None or not winner.measurement.seconds:
            continue
        ours = model.layers * winner.measurement.seconds
        other = model.other_seconds(winner.measurement.provenance)
        if other is not None:
            found.append(Gain(model, winner.ratio, (other + ours * winner.ratio) / (other + ours)))
    return found
