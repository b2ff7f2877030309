"""The ladder: rungs are climbed one by one, and what lies behind the answer is not read."""

from __future__ import annotations

from dataclasses import replace

import pytest
from test_dispatch import VARIANT

from elsa_tune.device import Device, host_cpu
from elsa_tune.dispatch import ladder
from elsa_tune.measurement import Evidence, Measurement, Winner
from elsa_tune.problem import Problem

HERE = host_cpu()
POSED = Problem.parse("fp32.d16@b2.h4.q50.k50")
NEAR = "fp32.d16@b2.h4.q60.k60"


def winner(problem: str, ratio: float = 2.0, rung: str = "exact", layer: str = "own", variant: str = VARIANT) -> Winner:
    m = Measurement(device=str(HERE), problem=problem, variant=variant, status="ok", ratio=ratio)
    return Winner(Evidence(m, ratio, ratio - 0.05, ratio + 0.05, 1), layer, rung)


class Books:
    """Known winners, and what was asked of them."""

    def __init__(
        self, problem: tuple[Winner, ...] = (), family: tuple[Winner, ...] = (), akin: tuple[Winner, ...] = (),
        masked: tuple[Winner, ...] = (),
    ):  # fmt: skip
        self.lists = {"of_problem": problem, "of_family": family, "akin": akin, "other_masks": masked}
        self.asked: list[str] = []

    def _read(self, what: str) -> list[Winner]:
        self.asked.append(what)
        return list(self.lists[what])

    def of_problem(self, problem: Problem, device: Device) -> list[Winner]:
        return self._read("of_problem")

    def of_family(self, problem: Problem, device: Device) -> list[Winner]:
        return self._read("of_family")

    def akin(self, problem: Problem, device: Device) -> list[Winner]:
        return self._read("akin")

    def other_masks(self, problem: Problem, device: Device) -> list[Winner]:
        return self._read("other_masks")

    def slower(self, device: Device) -> set[tuple[str, str]]:
        return set()


def test_what_lies_behind_the_answer_is_not_read() -> None:
    exact = Books((winner(str(POSED)),))
    assert ladder.climb(POSED, HERE, exact).rung == "exact" and exact.asked == ["of_problem"]
    near = Books((), (winner(NEAR),))
    assert ladder.climb(POSED, HERE, near).rung == "neighbour" and near.asked == ["of_problem", "of_family"]
    cousin = Books((), (), (winner("fp32.d20@b2.h4.q50.k50"),))
    assert ladder.climb(POSED, HERE, cousin).rung == "head_dim"
    assert cousin.asked == ["of_problem", "of_family", "akin"]
    masked = Books((), (), (), (winner("fp32.d16.causal@b2.h4.q50.k50"),))
    assert ladder.climb(POSED, HERE, masked).rung == "mask"
    assert masked.asked == ["of_problem", "of_family", "akin", "other_masks"]


def test_a_variant_won_under_another_mask_serves_where_its_advantage_was_large() -> None:
    """The nearest mask first; what never saw the mask's number of keys is farther away; below 1.3 torch serves."""
    posed = Problem.parse("fp32.d16.causal+window.softcap@b2.h4.q50.k50.left9.right0.softcap2")
    plain, window = winner("fp32.d16@b2.h4.q50.k50"), winner("fp32.d16.window@b2.h4.q50.k50.left9.right0")
    chosen = ladder.climb(posed, HERE, Books((), (), (), (plain, window)))
    assert chosen.rung == "mask" and chosen.winner is window and "fp32.d16.window" in chosen.steps[-1]
    assert chosen.variant is not None and chosen.problem == posed
    small = ladder.climb(posed, HERE, Books((), (), (), (winner("fp32.d16@b2.h4.q50.k50", ratio=1.34),)))
    assert small.by_sdpa and "too little to carry over" in small.steps[0]
    refused = ladder.climb(posed, HERE, Books((), (), (), (winner("fp32.d16@b2.h4.q50.k50", variant="sdpa.flash"),)))
    assert refused.by_sdpa


def test_a_window_of_another_width_is_farther_away() -> None:
    def windowed(left: int) -> Problem:
        return Problem.parse(f"fp32.d16.causal+window@b1.h4.q1000.k1000.left{left}.right0")

    near, far = (ladder.distance(windowed(99), windowed(n)) for n in (80, 9))
    assert 0 < near < 0.3 < 1.5 < far < 1.8


def test_what_a_backend_refuses_no_neighbour_serves() -> None:
    """A kernel of another dimension is not carried over to one that no backend generates kernels for."""
    large = POSED.reshaped(head_dim=257, value_dim=257)
    chosen = ladder.climb(large, HERE, Books((), (), (winner(str(POSED.reshaped(head_dim=256, value_dim=256))),)))
    assert chosen.by_sdpa and any("up to 256" in step for step in chosen.steps)


@pytest.mark.parametrize("layer", ["imported", "team"])
def test_a_layer_behind_one_whose_winner_is_refused_answers(layer: str) -> None:
    """The nearest layer's winner is of another version's space; the next layer knows another, and no doubt is told twice."""
    refused = winner(str(POSED), variant=VARIANT.replace("q2", "q999"))
    chosen = ladder.climb(POSED, HERE, Books((refused,), (refused, winner(str(POSED), layer=layer))))
    assert chosen.rung == "exact" and chosen.winner is not None and chosen.winner.layer == layer
    assert len(chosen.steps) == 2 and "q999" in chosen.steps[0]


def test_of_tf32_a_more_exact_answer_is_welcome() -> None:
    rough = replace(POSED, precision="tf32")

    class Exact(Books):
        def of_problem(self, problem: Problem, device: Device) -> list[Winner]:
            return super().of_problem(problem, device) if problem.precision == "fp32" else []

    known = Exact((winner(str(POSED)),))
    chosen = ladder.climb(rough, HERE, known)
    assert chosen.rung == "exact" and chosen.problem == POSED
    none = ladder.climb(rough, HERE, Books())
    assert none.by_sdpa and none.steps[0].startswith(f"nothing is known of {POSED.family}")
