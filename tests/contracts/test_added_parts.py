"""The how-tos, followed to the letter in a copy of the tree: what they add is rendered, right and refused as they say."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


PAGES = [
    ("add-a-score.md", 4, "fp32.d16.causal.softcap+temperature"),
    ("add-a-mask.md", 4, "fp32.d16.causal+lengths+segments.softcap"),
]


def shown(page: str) -> dict[str, str]:
    """Every file that a page shows, and what is in it."""
    text = (ROOT / "docs/how-to" / page).read_text()
    found = re.findall(r"`((?:elsa_tune|templates)/[^`<]+)`[^`]*\n\n *```[a-z+]+\n(.*?)\n *```", text, re.S)
    return {name: textwrap.dedent(content) + "\n" for name, content in found}


def added(page: str, tree: Path) -> list[str]:
    """Write every file that a page shows into the tree."""
    for name, content in shown(page).items():
        path = tree / name
        assert not path.exists(), name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return list(shown(page))


@pytest.mark.parametrize(("page", "count", "family"), PAGES)
def test_followed_to_the_letter(page: str, count: int, family: str, tmp_path: Path) -> None:
    for name in ("elsa_tune", "templates", "search_spaces", "cache"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    names = added(page, tmp_path)
    assert len([name for name in names if Path(name).stem in ("temperature", "segments")]) == count, names
    path = os.pathsep.join([str(tmp_path), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": path, "ELSA_TUNE_HOME": str(tmp_path / "home")}
    command = [sys.executable, str(ROOT / "tests/contracts/added.py"), family]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 0 and done.stdout.count("agrees") >= 5 and "gradients agree" in done.stdout, (
        done.stdout + done.stderr[-3000:]
    )
