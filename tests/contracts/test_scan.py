"""What every scan promises: right for every associative merge, rounds that say the truth about themselves, and in every language
the answer of a fold."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from contracts import covering, kernels, running
from elsa_tune.errors import BadVariant
from elsa_tune.parts import scan
from elsa_tune.parts.scan import Round
from elsa_tune.problem import Problem


def letters(n: int) -> list[str]:
    """Distinct letters: under concatenation, the free monoid, only the right network gives the right words."""
    return [chr(0x100 + i) for i in range(n)]


def in_place_downwards(rounds: list[Round], cells: list[str]) -> list[str]:
    """As the C++ templates execute rounds: one cell after the other, highest first, no second buffer."""
    x = list(cells)
    for r in rounds:
        for i in reversed(r.cells(len(x))):
            x[i] = x[i - r.step] + x[i]
    return x


@pytest.mark.parametrize("name", scan.names())
class TestContract:
    def test_prefixes_for_every_length(self, name: str) -> None:
        for n in range(1, 301):
            x = letters(n)
            words = ["".join(x[: i + 1]) for i in range(n)]
            rounds = scan.get(name).prefixes(n)
            assert scan.run(rounds, x, str.__add__) == words, n
            assert in_place_downwards(rounds, x) == words, n

    def test_total_without_dead_rounds(self, name: str) -> None:
        for n in range(1, 301):
            x = letters(n)
            rounds = scan.get(name).total(n)
            assert scan.run(rounds, x, str.__add__)[-1] == "".join(x), n
            assert in_place_downwards(rounds, x)[-1] == "".join(x), n
            assert len(rounds) <= len(scan.get(name).prefixes(n))

    def test_no_round_of_the_total_can_be_dropped(self, name: str) -> None:
        for n in (2, 3, 7, 8, 16, 31):
            rounds, x = scan.get(name).total(n), letters(n)
            for i in range(len(rounds)):
                assert scan.run(rounds[:i] + rounds[i + 1 :], x, str.__add__)[-1] != "".join(x), (n, i)

    def test_second_buffer_is_derived(self, name: str) -> None:
        """Where a round says it needs no second buffer, writing upwards in place gives the same cells."""
        for n in (2, 5, 8, 17, 64):
            x = letters(n)
            for r in scan.get(name).prefixes(n):
                upwards = list(x)
                for i in r.cells(n):
                    upwards[i] = upwards[i - r.step] + upwards[i]
                x = scan.run([r], x, str.__add__)
                if not r.reads_what_it_writes(n):
                    assert upwards == x

    def test_draws_itself(self, name: str) -> None:
        shown = subprocess.run(
            [sys.executable, "-m", f"elsa_tune.parts.scan.{name}"], capture_output=True, text=True, check=True
        )
        assert shown.stdout.startswith(f"{name}: ")


FAMILY = "fp32.d16.v8.causal_lower_right+lengths"
MERGING = [name for name in scan.names() if name != "serial"]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("language", running.cases((language,) for language in covering.LANGUAGES))
def test_a_kernel_answers_as_a_fold_does(language: str, tmp_path: Path) -> None:
    """Over the states of workers and of splits at once; some see no key."""
    problem, answers = Problem.parse(FAMILY), {}
    for name in ("serial", *MERGING):
        states = {"workers": 1, "splits": 1} if name == "serial" else {"workers": 4, "splits": 4}
        variant = covering.variant_with(language, FAMILY, scan=name, **states, **covering.summing(language))
        assert variant is not None
        kernel = running.kernel(language, variant, problem, tmp_path / name)
        answers[name] = kernels.of_exact_sums(kernel, problem, kv_len=130)
        assert kernels.compute(kernel, problem)[2] < 1, variant
        assert all(map(torch.equal, answers[name], answers["serial"])), variant


@pytest.mark.parametrize("k", range(1, 9))
def test_depths(k: int) -> None:
    n = 1 << k
    assert scan.depth(scan.get("serial").total(n), n) == n - 1
    for name in ("hillis_steele", "blelloch", "hybrid"):
        assert scan.depth(scan.get(name).total(n), n) == k


def test_blelloch_total_is_the_up_sweep() -> None:
    assert scan.get("blelloch").total(8) == [Round(1, 2, 1), Round(3, 4, 2), Round(7, 8, 4)]


def test_unknown_scan_names_the_known_ones() -> None:
    with pytest.raises(BadVariant, match="blelloch, hillis_steele"):
        scan.get("kogge_stone")
