"""What whole models gain: Amdahl's law over the least that their other layers take."""

from __future__ import annotations

import pytest

from elsa_tune import workload
from elsa_tune.device import host_cpu
from elsa_tune.measurement import Evidence, Measurement
from elsa_tune.problem import Problem
from elsa_tune.shell import whole_models
from elsa_tune.tuning.report import Outcome

PEAKS = {"peak_gflops": 200.0, "peak_gbytes": 20.0}


def won(problem: Problem, seconds: float, ratio: float, **peaks: float) -> Outcome:
    measured = Measurement(
        device=str(host_cpu()), problem=str(problem), variant="cpp.some", status="ok", seconds=seconds, ratio=ratio,
        provenance=peaks,
    )  # fmt: skip
    return Outcome(problem, host_cpu(), Evidence(measured, ratio, ratio, ratio, 1))


def test_every_model_poses_a_problem_of_the_default_workload() -> None:
    assert {m.problem for m in whole_models.models()} <= set(workload.read("default", host_cpu()))


@pytest.mark.parametrize("model", whole_models.models(), ids=lambda m: m.name)
def test_a_gain_is_amdahls(model: whole_models.Model) -> None:
    tokens = model.problem.batch * model.problem.q_len
    other = max(2 * model.weights * tokens / 200e9, 4 * model.weights / 20e9)
    (gain,) = whole_models.gains([won(model.problem, 0.01, 3.0, **PEAKS)])
    attention = model.layers * 0.01
    assert gain.attention == 3.0
    assert gain.whole == pytest.approx((other + 3 * attention) / (other + attention))
    share = 3 * attention / (other + 3 * attention)
    assert gain.whole == pytest.approx(1 / (1 - share + share / 3))


def test_nothing_is_said_of_what_is_unknown() -> None:
    model = whole_models.models()[0]
    assert not whole_models.gains([won(model.problem, 0.01, 3.0)]), "no peaks, no estimate"
    assert not whole_models.gains([Outcome(model.problem, host_cpu(), None)])
    assert not whole_models.gains([won(model.problem.reshaped(batch=3), 0.01, 3.0, **PEAKS)])
