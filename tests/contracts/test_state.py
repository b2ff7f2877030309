"""What every state promises: any way to cut and merge the keys gives the same output and log-sum-exp; no keys are the identity."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from elsa_tune.parts import operator, scan, state

KEYS, ROWS, COLUMNS = 12, 5, 3


def posed() -> tuple[Tensor, Tensor]:
    """Scores, of which a row has none and another starts with none, and values."""
    generator = torch.Generator().manual_seed(7)
    scores = 30 * torch.randn(ROWS, KEYS, generator=generator, dtype=torch.float64)
    scores[1] = -torch.inf
    scores[2, :5] = -torch.inf
    scores[3] = torch.tensor([0.0, -120.0, 0.0] * 4)  # the printed recursion of FLASH-D loses a third of these
    return scores, torch.randn(KEYS, COLUMNS, generator=generator, dtype=torch.float64)


def truth() -> tuple[Tensor, Tensor]:
    scores, values = posed()
    return scores.softmax(1).nan_to_num() @ values, scores.logsumexp(1)


def same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> bool:
    return all(torch.allclose(a, b, rtol=1e-13, atol=1e-13) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", state.names())
class TestContract:
    def test_a_leaf_is_the_truth(self, name: str) -> None:
        one = state.get(name)
        assert one.name == name and same(one.total(one.leaf(*posed())), truth())

    @pytest.mark.parametrize("strategy", scan.names())
    @pytest.mark.parametrize("size", [1, 3, 4])
    def test_every_scan_of_its_leaves_is_the_truth(self, name: str, strategy: str, size: int) -> None:
        one, (scores, values) = state.get(name), posed()
        cells = [one.leaf(scores[:, i : i + size], values[i : i + size]) for i in range(0, KEYS, size)]
        rounds = scan.get(strategy).total(len(cells))
        assert same(one.total(scan.run(rounds, cells, one.merge)[-1]), truth())

    def test_no_keys_change_nothing_from_either_side(self, name: str) -> None:
        one, (scores, values) = state.get(name), posed()
        whole, nothing = one.leaf(scores, values), one.leaf(torch.full_like(scores, -torch.inf), values)
        for merged in (one.merge(whole, nothing), one.merge(nothing, whole)):
            assert same(one.total(merged), truth())
        output, sums = one.total(one.merge(nothing, nothing))
        assert not output.any() and bool(sums.isneginf().all())

    def test_its_floats_are_counted(self, name: str) -> None:
        one = state.get(name)
        cells = one.leaf(*posed())
        assert sum(x.numel() for x in cells) == ROWS * one.floats(COLUMNS) and len(cells) == one.scalars + 1

    def test_its_operator_admits_it(self, name: str) -> None:
        assert name in operator.get(state.get(name).operator).states
