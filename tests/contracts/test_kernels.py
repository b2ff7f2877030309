"""The contract of kernels over a covering array: every two values of languages, parts and shapes meet in a kernel that runs."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from contracts import covering, kernels, running
from elsa_tune.generate import laws
from elsa_tune.parts import element, mask, scan, score
from elsa_tune.prove import reference
from elsa_tune.variant import Value, Variant

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # Triton's interpreter where a row sees no key


def holds(row: Mapping[str, Value], variant: Variant, folder: Path) -> None:
    """Right in the row's shape and memory order; the same bits again, whatever order an emulator's threads run in; all hostile
    inputs where the language is fast enough here."""
    problem = covering.family_of(row)
    kernel = running.kernel(str(row["language"]), variant, problem, folder)
    order = "bhsd" if row["layout"] == "unaligned" else str(row["layout"])
    shape = {"q_len": {"many": 29, "one": 1}[str(row["query"])], "group": {"alone": 1, "grouped": 2}[str(row["heads"])]}
    answers = []
    for _ in running.seeds(kernel):
        out, lse, error = kernels.compute(kernel, problem, row["layout"] != "unaligned", order, **shape)
        assert error < 1
        answers.append((out, lse))
    assert all(torch.equal(x, y) for other in answers for x, y in zip(answers[0], other, strict=True)), "a race"
    if row["language"] == "cpp":
        if problem.score == score.NONE:
            kernels.far_logits(kernel, problem)
        slow = element.get(problem.dtype).state == "float64"  # whose truth has twice its digits
        longest = reference.LONG // 16 if slow else reference.LONG
        kernels.obeys(kernel, problem.reshaped(heads=4, kv_heads=2, q_len=64, kv_len=64), [], longest=longest)
    elif row["language"] == "opencl":
        kernels.obeys(kernel, problem.reshaped(heads=4, kv_heads=2, q_len=64, kv_len=64), [], keys=200, longest=301)


def _case(row: Mapping[str, Value], variant: Variant) -> object:
    return pytest.param(row, variant, id="-".join(map(str, row.values())), marks=running.marks(str(row["language"])))


@pytest.mark.parametrize(("row", "variant"), [_case(*kernel) for kernel in covering.kernels()])
def test_every_two_values_meet(row: Mapping[str, Value], variant: Variant, tmp_path: Path) -> None:
    holds(row, variant, tmp_path)


SHARES = 12


@pytest.mark.slow
@pytest.mark.opencl
@pytest.mark.parametrize("share", range(SHARES))
@pytest.mark.parametrize("language", covering.LANGUAGES)
def test_every_two_values_meet_in_each_language(language: str, share: int, tmp_path: Path) -> None:
    for number, (row, variant) in enumerate(covering.kernels(2, language)[share::SHARES]):
        holds(row, variant, tmp_path / str(number))


def test_what_is_not_covered_is_refused_with_a_reason() -> None:
    """Every pair is drawn or refused; a language that lacks an axis is no reason against masks and scans, which every language has, and
    elements that every language has a text of."""
    rows, refused = covering.drawn(2, "")
    parameters = covering.parameters()
    pairs = sum(len(parameters[a]) * len(parameters[b]) for a, b in itertools.combinations(parameters, 2))
    met = {pair for row in rows for pair in itertools.combinations(row.items(), 2)}
    assert len(met) + len(refused) == pairs and all(refused.values())
    everywhere = {("mask", name) for name in mask.names()} | {("scan", name) for name in scan.names()}
    written = [
        {name for name in element.names() if laws.has_text(one.backend, "element", name)}
        for one in covering.LANGUAGES.values()
    ]
    everywhere |= {("arithmetic", name) for name in set.intersection(*written)}
    assert not [pair for pair in refused if pair[0][0] == "language" and pair[1] in everywhere]
    assert not {value for values in refused for value in values} - {value for pair in met for value in pair}, (
        "never run"
    )
