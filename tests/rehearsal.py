"""A device that answers from recorded timings: its valid variants are the recorded ones. As a program, one worker of a fleet."""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from elsa_tune.space import Space
from elsa_tune.tuning.search import Search
from elsa_tune.variant import Value, Variant

RECORDED: dict[str, dict[str, float | None]] = json.loads(
    (Path(__file__).parent / "recorded" / "cpu.json").read_text()
)["problems"]
SPACE = Space.read("cpp")


class Rehearsal:
    """One recorded problem, and searches over its variants."""

    def __init__(self, problem: str) -> None:
        self.ratios = RECORDED[problem]
        self.variants = {name: SPACE.parse(name) for name in self.ratios}

    def valid(self, prefer: Mapping[str, Value] | None, rng: random.Random | None) -> Iterator[Variant]:
        def far(variant: Variant) -> float:
            return sum(
                abs(axis.values.index(variant.axes[axis.name]) - axis.values.index((prefer or {})[axis.name]))
                / len(axis.values)
                + 0.1 * (variant.axes[axis.name] != (prefer or {})[axis.name])
                for axis in SPACE.axes
            )

        every = list(self.variants.values())
        yield from sorted(every, key=far) if prefer else (rng or random.Random(0)).sample(every, len(every))

    def search(self, **options: object) -> Search:
        return Search(SPACE, self.valid, str, **options)  # type: ignore[arg-type]

    def started(self, **options: object) -> Search:
        """A search that begins, as tuning does, with the space's starting variants."""
        search = self.search(**options)
        search.enqueue(self.variants[name] for name in SPACE.start if name in self.variants)
        return search

    def run(self, search: Search, trials: int) -> list[float]:
        """The best ratio after each trial."""
        best = [0.0]
        for variant in (v for _ in range(trials) for v in search.ask(1)):
            ratio = self.ratios[str(variant)]
            search.tell(variant, ratio)
            best.append(max(best[-1], ratio or 0))
        return best[1:]


def work(storage: str, worker: str, problem: str, seconds: float, seed: int) -> None:
    """Try variants until none is left, each lasting ``seconds``; print every one with the time and the best known ratio."""
    from elsa_tune.device import Device
    from elsa_tune.problem import Problem
    from elsa_tune.tuning import fleet

    fleet.HEARTBEAT, fleet.GRACE = 1, 3
    rehearsal = Rehearsal(problem)
    with fleet.Fleet(storage, worker, Device("cpu", "recorded", "zen5", 2)) as mine:
        search = rehearsal.search(join=partial(mine.join, Problem.parse(problem)), seed=seed)
        print("ready", flush=True)
        sys.stdin.readline()
        while asked := search.ask(1):
            time.sleep(seconds)
            search.tell(asked[0], rehearsal.ratios[str(asked[0])])
            print(json.dumps([time.time(), str(asked[0])]), flush=True)


if __name__ == "__main__":
    work(sys.argv[1], sys.argv[2], sys.argv[3], float(sys.argv[4]), int(sys.argv[5]))
