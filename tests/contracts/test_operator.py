"""What every operator promises: rows cut anywhere, weights that give the rows again, and gradients that finite differences give."""

from __future__ import annotations

import pytest
import torch

from elsa_tune.parts import operator

SCORES = torch.randn(4, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
VALUES = torch.randn(9, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.mark.parametrize("name", operator.names())
class TestContract:
    @pytest.mark.parametrize("size", [1, 4, 9])
    def test_rows_may_be_cut_anywhere_and_weights_give_them_again(self, name: str, size: int) -> None:
        one = operator.get(name)
        some = ((SCORES[:, i : i + size], VALUES[i : i + size]) for i in range(0, 9, size))
        output, sums = one.rows(some)
        weights = one.weights(SCORES, sums)
        assert torch.allclose(weights.sum(1), torch.ones(4, dtype=torch.float64))
        assert torch.allclose(weights @ VALUES, output, rtol=0, atol=1e-13)

    def test_gradients_are_finite_differences(self, name: str) -> None:
        one, step = operator.get(name), 1e-6
        grad = torch.randn(4, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        output, sums = one.rows([(SCORES, VALUES)])
        delta = (grad * output).sum(1, keepdim=True)
        found = one.score_gradient(one.weights(SCORES, sums), grad @ VALUES.T, delta)
        for key in range(9):
            moved = SCORES.clone()
            moved[:, key] += step
            change = ((one.rows([(moved, VALUES)])[0] - output) * grad).sum(1) / step
            assert torch.allclose(change, found[:, key], rtol=0, atol=1e-5)

    def test_states_and_torchs_function_are_there(self, name: str) -> None:
        one = operator.get(name)
        assert one.name == name and one.states and (not one.torchs or hasattr(torch.nn.functional, one.torchs))
        assert 0 < one.bound(1.0, 1) <= one.bound(1.0, 1 << 20)
