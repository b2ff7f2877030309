"""What a check compares with what: float64 truths, bounds of outputs and of log-sum-exps, the floor of the rule about torch."""

from __future__ import annotations

import math

import pytest
import torch

from elsa_tune import space
from elsa_tune.device import Device, host_cpu
from elsa_tune.generate import cpp, sdpa
from elsa_tune.generate.backends import Kernel
from elsa_tune.parts.element import UNIT
from elsa_tune.problem import Problem
from elsa_tune.prove import check, reference

NATIVE = host_cpu().isas[0]
LANES = cpp.ISAS[NATIVE].lanes


@pytest.mark.parametrize("family", ["fp32.d16.v8", "fp32.d16.causal"])
def test_truth_in_pieces_is_the_whole_truth(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem.parse(f"{family}@b2.h4.kv2.q37.k53")
    inputs, rows = reference.random_inputs(problem, torch.Generator().manual_seed(0)), reference.every_row(problem)
    monkeypatch.setattr(reference, "KEYS_AT_ONCE", 7)
    out, lse = reference.attention_rows_with_lse(problem, inputs, rows)
    q, k, v = (x.double() for x in (inputs.query, inputs.key, inputs.value))
    scores = q @ k.repeat_interleave(2, 1).mT / 4
    if problem.mask == "causal":
        scores = scores.masked_fill(torch.ones_like(scores[0, 0]).triu(1).bool(), -math.inf)
    assert torch.allclose(out, (scores.softmax(-1) @ v.repeat_interleave(2, 1)).flatten(0, 2), atol=1e-13)
    assert torch.allclose(lse, scores.logsumexp(-1).flatten(), atol=1e-13)


@pytest.mark.parametrize(
    ("change", "right"),
    [
        (lambda x: x, True),
        (lambda x: x * (1 + 2**-23), True),
        (lambda x: x / math.log(2), False),
        (lambda x: x + 1e-4, False),
        (lambda x: torch.full_like(x, math.nan), False),
        (lambda x: torch.full_like(x, -math.inf), False),
    ],
)
def test_log_sum_exps_are_compared(change: object, right: bool) -> None:
    problem = Problem.parse("fp32.d16@b1.h2.q5.k70")
    inputs, rows = reference.random_inputs(problem, torch.Generator().manual_seed(0)), reference.every_row(problem)
    truth = reference.attention_rows_with_lse(problem, inputs, rows)[1]
    lse = change(truth).float().view(1, 2, 5)  # type: ignore[operator]
    assert (reference.lse_trouble(problem, inputs, rows, lse, truth) == "") == right


def test_a_row_that_sees_no_key_has_minus_infinity_and_nothing_else() -> None:
    problem = Problem.parse("fp32.d16@b1.h1.q2.k7")
    inputs, rows = reference.random_inputs(problem, torch.Generator().manual_seed(0)), reference.every_row(problem)
    truth = torch.tensor([1.5, -math.inf], dtype=torch.float64)
    for last, right in ((-math.inf, True), (-1e30, False), (math.inf, False), (math.nan, False), (0.0, False)):
        lse = torch.tensor([[[1.5, last]]])
        assert (reference.lse_trouble(problem, inputs, rows, lse, truth) == "") == right, last


def test_the_floor_of_the_rule_about_torch_is_the_rounding_of_the_result() -> None:
    """An output rounded once errs by at most the floor, and comes near it; where torch errs less, thrice the floor may serve."""
    problem = Problem.parse("fp32.d16.v64@b1.h4.q64.k9")
    inputs, rows = reference.random_inputs(problem, torch.Generator().manual_seed(0)), reference.every_row(problem)
    truth = reference.attention_rows(problem, inputs, rows)
    out = truth.float().view(1, 4, 64, 64)
    error = reference.measure_error(problem, inputs, rows, out, truth)
    assert 0.4 * error.rounding < error.relative <= error.rounding
    assert error.rounding == UNIT * float(truth.abs().max()) / float(inputs.value.abs().max())

    def reason(times: float, peer: float) -> str:
        return check.judge(
            problem, "", reference.Error(times * error.rounding, 0.1, True, error.rounding), "", peer
        ).reason

    assert not reason(2.9, 0.0) and "torch's" in reason(3.1, 0.0)
    assert not reason(5.9, 2 * error.rounding) and "torch's" in reason(6.1, 2 * error.rounding)


def test_running_sums_are_checked_as_long_as_they_may_serve() -> None:
    gpu, problem = Device("cuda", "some", "sm_90", 132), Problem.parse("fp32.d64@b1.h8.q4096.k4096")
    for spelled, problem_of_it, longest in (
        ("triton.serial.ieee.m32.n32.warps8.stages1", problem, 4096),
        ("triton.serial.ieee.m32.n32.warps8.stages1.apart", problem, reference.LONG),
        ("triton.serial.half.m64.n64.warps4.stages3", Problem.parse("fp16.d64@b1.h8.q4096.k4096"), reference.LONG),
    ):
        assert check.longest(space.parse(spelled), problem_of_it, gpu) == longest


def kernel_of(spelled: str, problem: Problem) -> Kernel:
    variant = space.parse(spelled.format(f"{NATIVE}.l{LANES}"))
    return cpp.load(cpp.build(variant, problem), variant, problem)


@pytest.mark.slow
@pytest.mark.parametrize("spelled", ["cpp.blelloch.{}.c4.q2.k4.v4.n32.s16", "cpp.hybrid.{}.q2.k4.v4.n16.w4.s16"])
def test_a_tree_over_a_million_keys_stays_within_the_bound(spelled: str) -> None:
    problem = Problem.parse("fp32.d16@b1.h2.q1.k64")
    assert not check.check_family(kernel_of(spelled, problem), problem, [], longest=(1 << 20) + 1).reason


@pytest.mark.slow
@pytest.mark.parametrize("spelled", ["cpp.serial.{}.c4.q2.k4.v4.n32", "cpp.serial.{}.q2.k4.v4.n192"])
def test_a_fold_over_a_million_keys_errs_no_more_than_torch(spelled: str) -> None:
    """Tens of thousands of leaves in a row may take it beyond the bound, which torch's kernel exceeds further."""
    problem = Problem.parse("fp32.d16@b1.h2.q1.k64")
    kernel, torchs = kernel_of(spelled, problem), sdpa.SdpaKernel(sdpa.BACKENDS["flash"], problem)
    for posed, inputs in reference.hostile(problem, torch.Generator().manual_seed(0), (1 << 20) + 1):
        if posed.kv_len > 1 << 20:
            rows = reference.every_row(posed)
            truth = reference.attention_rows(posed, inputs, rows)
            ours, theirs = (
                reference.measure_error(posed, inputs, rows, check.run(k, inputs)[0], truth).relative
                for k in (kernel, torchs)
            )
            assert ours <= theirs, inputs.name
