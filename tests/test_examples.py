"""The examples, on small models: they run, and what they print is so."""

from __future__ import annotations

import re
import runpy
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from elsa_tune.dispatch import ledger
from tests.absent_torchvision import standing_in

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.mark.parametrize(("name", "needs"), [("vit", "transformers"), ("swin", "timm")])
def test_an_example_compares(
    name: str, needs: str, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with standing_in() if needs == "timm" else nullcontext():
        pytest.importorskip(needs, reason=f"{needs} is not installed")
    ledger.forget()
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--small"])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    printed = capsys.readouterr().out
    difference, before, after, times = (
        float(x) for x in re.findall(r"(?:outputs: |before: |after: | s, )(\d[\d.e+-]*)", printed)
    )
    assert difference < 1e-5 and times == pytest.approx(before / after, rel=0.03) and min(before, after) > 0
    calls = [int(n) for n in re.findall(r"(\d+) calls of fp32\.d16", printed)]
    layers = {"vit": 2, "swin": 4}[name]
    assert sum(calls) == 5 * layers, "a first one, three rounds, one for the difference"
