"""The contract of kernels over a covering array: every two values of languages, parts and shapes meet in a kernel that runs."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import torch

from contracts import covering, kernels, running
from elsa_tune.generate import laws
from elsa_tune.generate.operands import with_example
from elsa_tune.generate.tensors import lse_dtype
from elsa_tune.parts import element, mask, scan, score
from elsa_tune.prove import check, gradients, reference
from elsa_tune.variant import Value, Variant

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # Triton's interpreter where a row sees no key


def holds(row: Mapping[str, Value], variant: Variant, folder: Path, hostile: bool = True) -> None:
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
    if not hostile:
        return
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
    """Every fourth with hostile inputs, the others among the slow tests."""
    holds(row, variant, tmp_path, hostile=crc32(str(variant).encode()) % 4 == 0)


@pytest.mark.slow
@pytest.mark.parametrize(("row", "variant"), [_case(*kernel) for kernel in covering.kernels()])
def test_every_two_values_meet_with_hostile_inputs(row: Mapping[str, Value], variant: Variant, tmp_path: Path) -> None:
    holds(row, variant, tmp_path)


SHARES = 12


@pytest.mark.slow
@pytest.mark.opencl
@pytest.mark.parametrize("share", range(SHARES))
@pytest.mark.parametrize("language", covering.LANGUAGES)
def test_every_two_values_meet_in_each_language(language: str, share: int, tmp_path: Path) -> None:
    for number, (row, variant) in enumerate(covering.kernels(2, language)[share::SHARES]):
        holds(row, variant, tmp_path / str(number))


def obeys_backward(row: Mapping[str, Value], variant: Variant, folder: Path, hostile: bool = True) -> None:
    """Gradients in the row's shape and memory order, of output and log-sum-exp; the same bits again; all hostile inputs."""
    problem = covering.family_of(row)
    kernel: Any = running.kernel(str(row["language"]), variant, problem, folder)
    group, q_len = {"alone": 1, "grouped": 2}[str(row["heads"])], {"many": 29, "one": 1}[str(row["query"])]
    shape = {"batch": 2, "heads": 2 * group, "kv_heads": 2, "q_len": q_len, "kv_len": 53}
    posed, generator = with_example(problem).reshaped(**shape), torch.Generator().manual_seed(3)
    case = gradients.with_forward(posed, reference.random_inputs(posed, generator), generator)
    if row["layout"] == "unaligned":
        case = case.with_tensors(lambda x: torch.nn.functional.pad(x, (1, 2))[..., 1:-2] if x.dim() == 4 else x)
    else:
        case = case.ordered([str(row["layout"])] * 3)
    grad_lse = torch.randn(case.query.shape[:3], generator=generator).to(lse_dtype(case.query))
    for given in (None, grad_lse):
        error = check.gradient_error(kernel, posed, case, given)
        assert error.allowed, error
    asked = (True,) * (3 + len(score.get(posed.score).differentiable))
    once, again = (kernel(*case.tensors, None, case.operands, asked=asked) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(once, again, strict=True)), "a race"
    if not hostile:
        return
    small = problem.reshaped(batch=2, heads=2 * group, kv_heads=2, q_len=29, kv_len=53)
    verdict = check.check_family(kernel, small, [], longest=128)
    assert not verdict.reason, verdict.reason


@pytest.mark.parametrize(("row", "variant"), [_case(*kernel) for kernel in covering.kernels(1, "cpp", "backward")])
def test_every_value_has_gradients(row: Mapping[str, Value], variant: Variant, tmp_path: Path) -> None:
    of_all = "+" in f"{row['mask']}{row['score']}"  # whose examples are many
    obeys_backward(row, variant, tmp_path, hostile=not of_all)


@pytest.mark.slow
@pytest.mark.parametrize("share", range(SHARES))
def test_every_two_values_meet_in_gradients(share: int, tmp_path: Path) -> None:
    for number, (row, variant) in enumerate(covering.kernels(2, "cpp", "backward")[share::SHARES]):
        obeys_backward(row, variant, tmp_path / str(number))


def _met(rows: list[dict[str, Value]], refused: Mapping[covering.Row, str], direction: str) -> set[covering.Row]:
    """Pairs that rows have, which with those that are refused are all."""
    parameters = covering.parameters(direction)
    pairs = sum(len(parameters[a]) * len(parameters[b]) for a, b in itertools.combinations(parameters, 2))
    met = {pair for row in rows for pair in itertools.combinations(row.items(), 2)}
    assert len(met) + len(refused) == pairs and all(refused.values())
    return met


@pytest.mark.slow
def test_what_has_no_gradients_is_refused_with_a_reason() -> None:
    """The arithmetics of GPUs, and what laws of C++ say: of every mask and score there are."""
    rows, refused = covering.drawn(2, "cpp", "backward")
    _met(rows, refused, "backward")
    of_gpus = {("arithmetic", name) for name in ("fp16.approx", "fp32.tf32")}
    assert not [pair for pair in refused if not of_gpus & {*pair} and {"mask", "score"} & {name for name, _ in pair}]


def test_what_is_not_covered_is_refused_with_a_reason() -> None:
    """Every pair is drawn or refused; a language that lacks an axis is no reason against masks and scans, which every language has, and
    elements that every language has a text of."""
    rows, refused = covering.drawn(2, "")
    met = _met(rows, refused, "forward")
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
