"""The search, rehearsed on recorded timings: no clock, no compiler."""

from __future__ import annotations

import pytest
from rehearsal import RECORDED, SPACE, Rehearsal

from elsa_tune.errors import ElsaTuneError
from elsa_tune.measurement import Measurement
from elsa_tune.tuning.search import SAMPLERS, Search, importances

PREFILL = "fp32.d64@b1.h16.q577.k577"


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("problem", RECORDED)
def test_never_the_same_twice_and_the_whole_space_in_the_end(sampler: str, problem: str) -> None:
    device = Rehearsal(problem)
    search = device.search(sampler=sampler)
    asked = [str(v) for _ in range(40) for v in search.ask(2)]
    assert len(asked) == len(set(asked)) == 80
    everything = asked + [str(v) for v in search.ask(10_000)]
    assert sorted(everything) == sorted(device.ratios) and search.ask(1) == []


@pytest.mark.parametrize("problem", RECORDED)
def test_exhaustive_walks_everything(problem: str) -> None:
    device = Rehearsal(problem)
    assert sorted(map(str, device.search(exhaustive=True).ask(10_000))) == sorted(device.ratios)


def test_the_default_finds_nearly_the_best_in_ten_trials() -> None:
    """Mean over seeds of the best ratio after ten trials, as a share of the best recorded one."""
    device = Rehearsal(PREFILL)
    top = max(r for r in device.ratios.values() if r)

    def reached(sampler: str) -> float:
        return sum(device.run(device.started(sampler=sampler, seed=seed), 10)[-1] for seed in range(8)) / 8 / top

    assert reached("local") > 0.92
    assert reached("local") > reached("random") + 0.03


def test_a_seed_repeats_a_search() -> None:
    device = Rehearsal(PREFILL)
    first, second = (device.run(device.search(seed=5), 15) for _ in range(2))
    assert first == second


def test_what_is_enqueued_comes_first_unless_known() -> None:
    device = Rehearsal(PREFILL)
    names = list(device.ratios)[:3]
    search = device.search()
    search.tell(device.variants[names[0]], 1.0)
    search.enqueue([device.variants[n] for n in names])
    assert [str(v) for v in search.ask(2)] == names[1:]


def test_equal_code_is_tried_once() -> None:
    device = Rehearsal(PREFILL)
    search = Search(SPACE, device.valid, lambda variant: str(variant.axes["scan"]))
    assert len(search.ask(100)) == len({v.axes["scan"] for v in device.variants.values()})


def test_unknown_sampler() -> None:
    with pytest.raises(ElsaTuneError, match="local, tpe, random"):
        Rehearsal(PREFILL).search(sampler="annealing")


def test_importances_name_axes() -> None:
    rows = [
        Measurement(device="d", problem=PREFILL, variant=v, status="ok", ratio=r)
        for v, r in RECORDED[PREFILL].items()
        if r
    ]
    found = importances(SPACE, rows)
    assert set(found) <= {axis.name for axis in SPACE.axes} and abs(sum(found.values()) - 1) < 1e-6
    assert importances(SPACE, rows[:3]) == {}
