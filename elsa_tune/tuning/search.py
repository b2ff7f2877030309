"""Which variant to try next: Optuna's ask and tell over one space."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from itertools import islice

import optuna

from elsa_tune.device import Device
from elsa_tune.errors import BadVariant, CompilerMissing, ElsaTuneError, shown
from elsa_tune.generate import backends, lawful
from elsa_tune.measurement import Measurement
from elsa_tune.problem import Problem
from elsa_tune.space import Space
from elsa_tune.tuning.fleet import Axes, Board, Fleet
from elsa_tune.variant import Value, Variant

optuna.logging.set_verbosity(optuna.logging.WARNING)
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
warnings.filterwarnings("ignore", "Target and region quantiles", UserWarning)  # of few ratios that are all alike

SAMPLERS: dict[str, tuple[float, Callable[[int], optuna.samplers.BaseSampler]]] = {
    "local": (0.8, lambda seed: optuna.samplers.TPESampler(seed=seed, multivariate=True, n_startup_trials=4)),
    "tpe": (0.0, lambda seed: optuna.samplers.TPESampler(seed=seed, multivariate=True, n_startup_trials=8)),
    "random": (0.0, lambda seed: optuna.samplers.RandomSampler(seed=seed)),
}
"""Name -> share of proposals that are a step from the best variant so far, and the sampler of the others.

A problem affords ten trials, too few for a model of thirteen axes: rehearsed on recorded timings (tests/test_search.py),
a step from the best reaches 94 % of the best recorded ratio in 10 trials and 98 % in 30; TPE 87 % and 96 %; random 87 %
and 90 %.
"""

_STEPPED_AXES = 2
_FARTHEST_STEP = 2

WORTHLESS = math.log(0.05)
"""What the sampler is told of a variant that is wrong, fails or is pruned: far slower than SDPA."""

_NEIGHBOURS = 200


class Search:
    """Proposes valid variants of one space for one problem, none twice.

    ``valid`` yields valid variants nearest to given axis values first; ``name`` names what a variant would build, so
    that two spellings of the same code are tried once. The objective is the logarithm of the ratio to the incumbent.
    ``join`` finds the board on which a fleet shares this search.
    """

    def __init__(
        self,
        space: Space,
        valid: Callable[[Mapping[str, Value] | None, random.Random | None], Iterator[Variant]],
        name: Callable[[Variant], str],
        sampler: str = "local",
        seed: int = 0,
        exhaustive: bool = False,
        join: Callable[[Space, Axes], Board] | None = None,
    ) -> None:
        if sampler not in SAMPLERS:
            raise ElsaTuneError(f"sampler {sampler!r} is unknown; use one of {', '.join(SAMPLERS)}")
        if not 0 <= seed < 1 << 32:
            raise ElsaTuneError(f"seed {shown(seed)} is none; use an integer from 0 to {(1 << 32) - 1}")
        self.backend, self._space, self._axes = space.backend, space, _distributions(space)
        self._valid, self._name = valid, name
        self._seen: set[str] = set()
        self._first: list[Variant] = []
        self._local, make = SAMPLERS[sampler]
        self._study = optuna.create_study(direction="maximize", sampler=make(seed))
        self._rng = random.Random(seed)
        self._best: tuple[float, Variant] | None = None
        self._every = valid(None, random.Random(seed)) if exhaustive else None
        self._board = join(space, self._axes) if join else None
        self._known: set[str] = set()  # of a fleet's results, those that were read or written here
        self.heard = 0
        """Results that others of the fleet told."""
        self.results = 0
        """Results that anyone told."""

    def enqueue(self, variants: Iterable[Variant]) -> None:
        """Try these before anything the sampler thinks of."""
        self._first += variants

    def tell(self, variant: Variant, ratio: float | None) -> None:
        """Learn a ratio, or None for a variant that cannot be used; in a fleet, everyone does."""
        self._learn(variant, ratio)
        if self._board is not None and str(variant) not in self._known:
            self._known.add(str(variant))
            self._board.tell(variant, ratio, math.log(ratio) if ratio else WORTHLESS)

    def _learn(self, variant: Variant, ratio: float | None) -> None:
        self._seen.add(self._name(variant))
        self.results += 1
        value = math.log(ratio) if ratio else WORTHLESS
        if ratio and (self._best is None or value > self._best[0]):
            self._best = (value, variant)
        self._study.add_trial(
            optuna.trial.create_trial(params=dict(variant.values), distributions=self._axes, value=value)
        )

    def ask(self, count: int) -> list[Variant]:
        """Up to ``count`` variants not asked or told before; fewer only when the space is exhausted."""
        asked: list[Variant] = []
        self._catch_up()
        while len(asked) < count and (variant := self._next()) is not None:
            if self._board is None or self._board.claim(variant):
                asked.append(variant)
        return asked

    def take(self, variants: Iterable[Variant]) -> list[Variant]:
        """Those of some variants, built for another shape, that were not asked or told here: they are now."""
        fresh = [variant for variant in variants if self._new(variant)]
        return fresh if self._board is None else [variant for variant in fresh if self._board.claim(variant)]

    @property
    def best(self) -> Variant | None:
        """The best variant that anyone told of."""
        return self._best[1] if self._best else None

    def _catch_up(self) -> None:
        """Learn what others of the fleet found, leave what they are trying, and try again what was lost with its worker."""
        if self._board is None:
            return
        news = self._board.news()
        for spelling, ratio in news.results:
            if spelling not in self._known:
                self._known.add(spelling)
                self.heard += 1
                for variant in self._read([spelling]):
                    self._learn(variant, ratio)
        lost = self._read(news.lost)
        self._seen -= {self._name(variant) for variant in lost}
        self._seen |= {self._name(variant) for variant in self._read(news.taken)}
        self._first = lost + self._first

    def _read(self, spellings: Iterable[str]) -> list[Variant]:
        """What others spelled; a storage that anyone may write to may hold anything."""
        found = []
        for spelling in spellings:
            with suppress(BadVariant):
                found.append(self._space.parse(spelling))
        return found

    def _next(self) -> Variant | None:
        while self._first:
            if self._new(variant := self._first.pop(0)):
                return variant
        if self._every is not None:
            return next((v for v in self._every if self._new(v)), None)
        wanted = self._step() if self._best and self._rng.random() < self._local else self._sample()
        near = islice(self._valid(wanted, None), _NEIGHBOURS)
        return next((v for v in near if self._new(v)), None) or next(
            (v for v in self._valid(None, self._rng) if self._new(v)), None
        )

    def _sample(self) -> dict[str, Value]:
        trial = self._study.ask(self._axes)
        self._study.tell(trial, state=optuna.trial.TrialState.FAIL)  # what is told later is its valid neighbour
        return dict(trial.params)

    def _step(self) -> dict[str, Value]:
        """The best variant with two axes moved a little: a number by one or two places, a word to any other."""
        assert self._best is not None
        values = dict(self._best[1].values)
        for axis in self._rng.sample([a for a in self._space.axes if len(a.values) > 1], _STEPPED_AXES):
            at = axis.values.index(values[axis.name])
            reach = _FARTHEST_STEP if isinstance(axis.values[0], int) else len(axis.values)
            near = [v for i, v in enumerate(axis.values) if 0 < abs(i - at) <= reach]
            values[axis.name] = self._rng.choice(near)
        return values

    def _new(self, variant: Variant) -> bool:
        name = self._name(variant)
        fresh = name not in self._seen
        self._seen.add(name)
        return fresh


def searches(
    problem: Problem, device: Device, notes: list[str], sampler: str = "local", seed: int = 0, exhaustive: bool = False,
    fleet: Fleet | None = None,
) -> list[Search]:  # fmt: skip
    """A search for every backend that generates code and can serve the problem here; ``notes`` learn of missing compilers."""
    found = []
    for name in backends.candidates():
        backend, space = backends.get(name), Space.read(name)
        try:
            if backend.refusal(problem, device):
                continue
            backend.toolchain(device)
        except CompilerMissing as error:
            if str(error) not in notes:
                notes.append(str(error))
            continue
        search = Search(
            space,
            partial(lawful.variants, space, problem, device),
            partial(_digest, name, problem, device),
            sampler,
            seed,
            exhaustive,
            partial(fleet.join, problem) if fleet else None,
        )
        search.enqueue(lawful.starts(space, problem, device))
        found.append(search)
    return found


def _digest(backend: str, problem: Problem, device: Device, variant: Variant) -> str:
    return backends.get(backend).digest(variant, problem, device)


def _distributions(space: Space) -> dict[str, optuna.distributions.BaseDistribution]:
    return {axis.name: optuna.distributions.CategoricalDistribution(axis.values) for axis in space.axes}


FEWEST = 8
"""Measurements that say which axes mattered."""


def study(space: Space, measurements: Iterable[Measurement]) -> optuna.Study:
    """What was measured of a space as a study of Optuna's, in the order given: a trial a measurement, its value the ratio to the
    incumbent, its stage and the interval beside it; of a variant that cannot be used a failed trial. What the space does not have any more is
    left out."""
    found, axes = optuna.create_study(direction="maximize"), _distributions(space)
    for m in measurements:
        if not m.variant.startswith(f"{space.backend}."):
            continue
        with suppress(BadVariant):
            params = dict(space.parse(m.variant).values)
            state = optuna.trial.TrialState.COMPLETE if m.ratio else optuna.trial.TrialState.FAIL
            value = m.ratio or None  # a foreign ratio may be 0
            beside = {"stage": m.stage, "low": m.ratio_low or 0.0, "high": m.ratio_high or value}
            found.add_trial(
                optuna.trial.create_trial(
                    state=state, value=value, params=params, distributions=axes, user_attrs=beside
                )
            )
    return found


def mattered(found: optuna.Study) -> dict[str, float]:
    """How much each axis mattered among the trials of a study (PED-ANOVA, Watanabe et al. 2023), most first; empty if too few."""
    if len(found.get_trials(deepcopy=False, states=[optuna.trial.TrialState.COMPLETE])) < FEWEST:
        return {}
    shares = optuna.importance.get_param_importances(found, evaluator=optuna.importance.PedAnovaImportanceEvaluator())
    return {name: float(share) for name, share in shares.items()}


def importances(space: Space, measurements: Iterable[Measurement]) -> dict[str, float]:
    """How much each axis mattered among measured variants; empty if too few."""
    return mattered(study(space, measurements))
