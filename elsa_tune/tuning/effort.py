"""How hard a run looks: the trials that a problem deserves, and what its finals take."""

from __future__ import annotations

from dataclasses import dataclass

GPU_TRIALS = 2
"""Trials on a GPU for each that a CPU would be given."""

FINAL_SECONDS, FASTEST = 0.6, 0.002
"""What calls that are faster than FASTEST seconds are raced for in a final, whose rounds would be over within a neighbour's breath."""


@dataclass(frozen=True, slots=True)
class Effort:
    """How hard to look: trials a problem gets, at most and at least; the seconds they may take; rounds of a final.

    ``call`` is what a problem's incumbent takes, in seconds.
    """

    trials: int
    fewest: int
    seconds: float
    final_rounds: int

    def target(self, call: float, is_gpu: bool, weight: float = 1.0) -> int:
        """Trials a problem deserves: fewer where one takes long, ``weight`` times as many as one of weight 1."""
        affordable, most = int(self.seconds / (1.0 + 8 * call)), self.trials
        if is_gpu:  # a trial takes a fraction of a second, and the space has more corners
            affordable, most = GPU_TRIALS * affordable, GPU_TRIALS * most
        return max(self.fewest, round(weight * min(most, affordable)))

    def rounds(self, call: float) -> int:
        """Rounds of a final: more of fast calls."""
        return max(self.final_rounds, round(FINAL_SECONDS / (4 * max(call, FASTEST))))

    def final(self, call: float) -> float:
        """Seconds of a final of four contenders, checks included: many rounds if a call is fast, a few if it is slow."""
        rounds = 4 * self.rounds(call) * max(call, FASTEST)
        return 0.5 + 4 * call + min(rounds, max(1.2, 14 * call))


EFFORTS = {"quick": Effort(12, 4, 60.0, 25), "full": Effort(150, 20, 600.0, 60)}
