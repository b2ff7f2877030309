"""What a program will gain by winners: attention's seconds before and after, and by Amdahl's law the program's."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from elsa_tune.device import Device
from elsa_tune.problem import Problem
from elsa_tune.traffic import Traffic, merged, wall_of
from elsa_tune.tuning.race import Ratio
from elsa_tune.tuning.report import Outcome

NO_GAIN = Ratio(1.0, 1.0, 1.0)


@dataclass(frozen=True, slots=True)
class Gain:
    """A problem's calls: ``before`` are their seconds by torch, ``ratio`` how many times faster they will be, with its interval."""

    problem: Problem
    calls: int
    before: float
    ratio: Ratio

    @property
    def saved(self) -> float:
        """Seconds."""
        return self.before - self.before / self.ratio.median


@dataclass(frozen=True, slots=True)
class Forecast:
    """What traffic will gain on a device, problems of most seconds first; ``wall`` are the programs' own seconds, 0 where they say nothing of
    this device."""

    device: Device
    gains: list[Gain]
    wall: float

    @property
    def before(self) -> float:
        """Seconds of attention by torch."""
        return sum(gain.before for gain in self.gains)

    @property
    def after(self) -> Ratio:
        """Seconds of attention by the winners: expected, at least, at most."""
        return Ratio(
            sum(gain.before / gain.ratio.median for gain in self.gains),
            sum(gain.before / gain.ratio.high for gain in self.gains),
            sum(gain.before / gain.ratio.low for gain in self.gains),
        )

    @property
    def attention(self) -> Ratio:
        """How many times faster attention will be."""
        return _times(self.before, self.after)

    @property
    def whole(self) -> Ratio | None:
        """How many times faster the programs will be; None where nobody knows how long they took, or calls ran side by side for longer."""
        other, after = self.wall - self.before, self.after
        if other < 0:
            return None
        return _times(self.wall, Ratio(other + after.median, other + after.low, other + after.high))


def _times(before: float, after: Ratio) -> Ratio:
    if not before:
        return NO_GAIN
    return Ratio(before / after.median, before / after.high, before / after.low)


def forecast(traffic: Iterable[Traffic], outcomes: Iterable[Outcome], device: Device, wall: float = 0.0) -> Forecast:
    """Of traffic and what tuning established for it on the device. On the CPU that the traffic was recorded on, seconds are those recorded,
    and ``wall`` seconds went by, or what the processes say if that is more; elsewhere, and on GPUs, whose calls return before they are done,
    seconds are calls times what torch's kernel took in the race."""
    found = list(traffic)
    at_home = not device.is_gpu and all(one.device == device for one in found)
    won = {o.problem: o for o in outcomes if o.device == device}
    gains = []
    for problem, calls, seconds in merged(one.asked for one in found):
        outcome = won.get(problem)
        winner = outcome.winner if outcome else None
        ratio = NO_GAIN
        if winner is not None and not winner.is_rival:
            ratio = Ratio(winner.ratio, winner.ratio_low, winner.ratio_high)
        if not at_home:
            each = winner.measurement.seconds if winner else None
            seconds = calls * (each or 0.0) * ratio.median
        gains.append(Gain(problem, calls, seconds, ratio))
    gains.sort(key=lambda gain: -gain.before)
    return Forecast(device, gains, max(wall, wall_of(found)) if at_home else 0.0)
