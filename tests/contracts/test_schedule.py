"""What every schedule promises: the answer of one fold for any number of splits and workers, also where splits see no key, the same
bits whoever comes first, and launches and counters as it says."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from contracts import covering, kernels, running
from elsa_tune.generate.backends import Kernel
from elsa_tune.generate.laws import schedule_has_splits
from elsa_tune.parts import schedule
from elsa_tune.problem import Problem

FAMILY = "fp32.d16.v8.causal_lower_right+lengths"
SHAPES = ({"heads": 2, "kv_heads": 1, "q_len": 7, "kv_len": 300}, {"heads": 2, "kv_heads": 1, "q_len": 3, "kv_len": 2})
"""Keys for every split, and fewer than there are splits; some sequences see few keys, or none."""


def merging(language: str, name: str) -> list[tuple[int, int]]:
    """Numbers of workers and splits: the most of one, and the fewest of the other that leave something to merge."""
    workers, splits = (sorted(map(int, covering.offered(language, axis))) for axis in ("workers", "splits"))
    return [(workers[-1], splits[1]), (1, splits[-1])] if schedule.get(name).splits else [(workers[-1], 1)]


def offered() -> Iterator[tuple[str, str, str, str]]:
    for language in covering.LANGUAGES:
        for name in map(str, covering.offered(language, "schedule")):
            for workers, splits in merging(language, name):
                yield language, name, str(workers), str(splits)


def made(language: str, name: str, workers: int, splits: int, folder: Path) -> Kernel | None:
    """None where a law refuses the schedule."""
    for scan in covering.offered(language, "scan"):
        states = {"scan": scan, "schedule": name, "workers": workers, "splits": splits}
        variant = covering.variant_with(language, FAMILY, **states, **covering.summing(language))
        if variant is not None:
            return running.kernel(language, variant, Problem.parse(FAMILY), folder)
    return None


@pytest.fixture(scope="module")
def folds(tmp_path_factory: pytest.TempPathFactory) -> object:
    """Answers of one fold, by language."""

    @cache
    def answers(language: str) -> list[tuple[Tensor, Tensor]]:
        kernel = made(language, schedule.FOLD, 1, 1, tmp_path_factory.mktemp("fold"))
        assert kernel is not None
        return [kernels.of_exact_sums(kernel, Problem.parse(FAMILY), **shape) for shape in SHAPES]

    return answers


@pytest.mark.parametrize("name", schedule.names())
class TestContract:
    def test_its_facts_fit_together(self, name: str) -> None:
        one = schedule.get(name)
        assert one.name == name and one.launches >= 1
        assert one.splits or not (one.counts or one.launches > 1), "nothing is left to merge"
        assert not one.splits or one.counts == (one.launches == 1), (
            "somebody merges: a later kernel, or who knows to be last"
        )

    def test_it_is_asked_for_where_there_are_splits(self, name: str) -> None:
        merges = schedule.get(name).splits
        assert bool(schedule_has_splits(name, 1)) == merges and bool(schedule_has_splits(name, 2)) != merges

    def test_some_language_offers_it(self, name: str) -> None:
        assert name in {case[1] for case in offered()}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("language", "name", "workers", "splits"), running.cases(offered()))
def test_a_kernel_does_as_it_says(
    language: str, name: str, workers: str, splits: str, folds: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, problem = schedule.get(name), Problem.parse(FAMILY)
    kernel = made(language, name, int(workers), int(splits), tmp_path)
    if kernel is None:
        assert (language, one.counts) == ("opencl", True), "OpenCL 1.2 orders no memory between the blocks of a launch"
        return
    for shape, expected in zip(SHAPES, folds(language), strict=True):  # type: ignore[operator]
        found = kernels.of_exact_sums(kernel, problem, **shape)
        assert all(map(torch.equal, found, expected)), shape
    started, answers = running.starts(kernel, monkeypatch), []
    for seed in running.seeds(kernel):
        out, lse, error = kernels.compute(kernel, problem, q_len=9)
        answers.append((out, lse))
        assert error < 1 and len(started) == (seed + 1) * one.launches, started
        assert all(map(torch.equal, answers[0], answers[-1])), "who comes first changes the answer"
    counters = running.counters(kernel)
    assert bool(counters) == one.counts and not any(x.any() for x in counters), "the next launch finds them at 0"
