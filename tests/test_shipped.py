"""The winners this version ships: readable, of this version's spaces, lawful on the device that measured them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from elsa_tune import space
from elsa_tune.device import Device
from elsa_tune.generate import lawful
from elsa_tune.problem import Problem
from elsa_tune.remember import layers
from elsa_tune.remember.winners import Database

CACHE = Path(__file__).resolve().parent.parent / "cache"
FILES = sorted(CACHE.glob("*.jsonl"))


def test_something_is_shipped() -> None:
    assert FILES


def test_contributions_are_reviewed_files_and_a_table(tmp_path: Path) -> None:
    """The script turns what was exported into exactly what is shipped, and the page says what is there."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "cache").mkdir()
    exported = tmp_path / "export.jsonl"
    exported.write_text("".join(path.read_text() for path in FILES) + "not sound\n")
    script = CACHE.parent / "benchmarks" / "contribute.py"
    done = subprocess.run(
        [sys.executable, str(script), str(exported), "--into", str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "left out 1" in done.stdout
    for path in FILES:
        assert (tmp_path / "cache" / path.name).read_bytes() == path.read_bytes()
    assert (tmp_path / "docs" / "devices.md").read_text() == (CACHE.parent / "docs" / "devices.md").read_text()


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_shipped_winners(path: Path, tmp_path: Path) -> None:
    rows = list(layers.read_lines(path))
    layers.write_lines(rows, tmp_path / path.name)
    assert (tmp_path / path.name).read_bytes() == path.read_bytes(), "written by the program, not edited by hand"
    devices = {m.device for m in rows}
    assert devices == {path.stem.replace("-", ":", 1)}
    device = Device.parse(devices.pop())
    for m in rows:
        variant = space.parse(m.variant)
        assert lawful.refusal(variant, Problem.parse(m.problem), device) is None
        assert m.status == "ok" and m.stage == "final" and (m.ratio_low or 0) > 1 and m.error is not None
    problems = [m.problem for m in Database.in_memory(rows, "shipped").winners()]
    assert sorted(problems) == sorted(m.problem for m in rows), "one winner a problem"
