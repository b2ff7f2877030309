"""The examples, on small models: they run, and what they print is so."""

from __future__ import annotations

import json
import re
import runpy
import sys
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path

import pytest
import torch

import elsa_tune
from docs.macros import performance
from elsa_tune.dispatch import ledger, serving
from tests.absent_torchvision import standing_in
from tests.test_dispatch import record, won
from tests.test_gradients import HOW, NATIVE, settle

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
NUMBER = r"(\d[\d.e+-]*)"
TIMED = re.compile(rf"before: {NUMBER} s, after: {NUMBER} s, {NUMBER} times")
TOKENS = re.compile(rf"tokens per second before: {NUMBER}, after: {NUMBER}")
COUNTED = re.compile(
    r"^ *(\d+) calls of (fp32\.d16\S*)(?: and (\d+) other shapes)? by torch   \(elsa-tune --problem \2\)", re.M
)

NEEDS = dict(
    vit="transformers", swin="timm", bert="transformers", llama_decode="transformers", training_step="transformers",
    offload="transformers", export_aoti="",
)  # fmt: skip
"""What each example imports beyond torch."""

CALLS = dict(
    vit=5 * 2, swin=5 * 4, bert=5 * 2, llama_decode=5 * 2 * 8, training_step=5 * 2, export_aoti=5 * 2,
    offload=2 * (16 * 5 + 4 * 6),
)  # fmt: skip
"""A first call, three rounds, one for the difference, of each layer and token; of an offloaded cache in five parts each, of which the last
four tokens meet a sixth."""

OTHER_SHAPES = dict(swin=1, llama_decode=7, offload=15)
"""Beside the shape called most of a family: of Swin's second stage, of every further token, of every length of the last part."""

TOKENS_OF = dict(llama_decode=8, offload=4)
"""Tokens of a call, of those that decode."""


def test_every_example_is_run() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*NEEDS, "finetune", "in_turns"}


@pytest.mark.filterwarnings(
    "ignore:.*deprecated:FutureWarning"
)  # what transformers 5.40 calls otherwise; torch's own export
@pytest.mark.parametrize("name", NEEDS)
def test_an_example_compares(
    name: str, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    needs = NEEDS[name]
    with standing_in() if needs == "timm" else nullcontext():
        pytest.importorskip(needs or "torch", reason=f"{needs} is not installed")
    ledger.forget()
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--small"])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    printed = capsys.readouterr().out
    (difference,) = re.findall(rf"largest difference of outputs: {NUMBER}", printed)
    ((before, after, times),) = (map(float, found) for found in TIMED.findall(printed))
    assert float(difference) < 1e-5 and times == pytest.approx(before / after, rel=0.03) and min(before, after) > 0
    rates = [float(x) for found in TOKENS.findall(printed) for x in found]
    expected = [TOKENS_OF[name] / seconds for seconds in (before, after)] if name in TOKENS_OF else []
    assert rates == pytest.approx(expected, rel=0.03)
    counted = COUNTED.findall(printed)
    assert sum(int(calls) for calls, _, _ in counted) == CALLS.get(name, 0)
    assert sum(int(others or 0) for _, _, others in counted) == OTHER_SHAPES.get(name, 0)


FINE_TUNED = "fp32.d16.causal{}@b2.h4.q256.k256.bshd"
METHODS = ("all weights", "checkpoints", "LoRA", "LoRA, checkpoints")


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells the memory of a process")
def test_finetuning_by_our_kernels_goes_as_by_torchs(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both passes are ours. Losses go alike; checkpoints attend twice as often; each method has its costs, on the docs' page too."""
    forward, backward = (FINE_TUNED.format(way) for way in ("", ".backward"))
    record(won(forward), won(backward, HOW["one pass"].format(isa=NATIVE)))
    elsa_tune.load(forward)
    x = torch.randn(2, 256, 4, 16, requires_grad=True).transpose(1, 2)
    elsa_tune.attention(x, x, x, is_causal=True).sum().backward()
    settle()
    ledger.forget()
    serving.refresh()
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.syspath_prepend(str(EXAMPLES.parent / "benchmarks"))
    monkeypatch.setattr(import_module("_side_by_side"), "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["finetune.py", "--small", "--write"])
    runpy.run_path(str(EXAMPLES / "finetune.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "problems first" not in printed
    curves = re.findall(r"^(.*): step, loss by torch and by elsa-tune\n((?:.*\n)+?)largest .*: (\S+)$", printed, re.M)
    assert [name for name, _, _ in curves] == [*METHODS]
    for _, lines, apart in curves:
        steps = [[float(word) for word in line.split()] for line in lines.splitlines()]
        assert [number for number, _, _ in steps] == [1, 5]
        assert float(apart) < 1e-4 and all(torchs == pytest.approx(ours, abs=1e-4) for _, torchs, ours in steps)
        assert all(3 < loss < 7 for _, *losses in steps for loss in losses)
    assert max(float(apart) for *_, apart in curves) > 0
    costs = re.findall(rf"^(.*) \| {NUMBER} \| {NUMBER} \| {NUMBER} \[.*\] \| {NUMBER} \| {NUMBER}$", printed, re.M)
    assert [name for name, *_ in costs] == [*METHODS] and all(float(cost) > 0 for _, *each in costs for cost in each)
    counted = {problem: calls for calls, problem in re.findall(r"^ *(\d+) calls of (\S+) by (?!torch)", printed, re.M)}
    for column in (-2, -1):  # MiB by torch and by ours: each way to save memory does
        everything, checkpoints, lora, both = (float(cost[column]) for cost in costs)
        assert everything > max(checkpoints, lora) and both < min(checkpoints, lora)
    (path,) = tmp_path.glob("finetune-*.json")
    monkeypatch.setattr(performance, "read", lambda _: json.loads(path.read_text()))
    rows = [line.strip("| ").split(" | ") for line in performance.fine_tuning("").splitlines()[2:]]
    assert [row[0] for row in rows] == [*METHODS] and [row[-1] for row in rows] == [apart for *_, apart in curves]
    assert counted == {forward: "72", backward: "48"}
