"""The how-tos say what one does: a copy of the tree in which exactly that was done passes what the page tells to run.

A page's numbered steps are read, not repeated here: a code block belongs to the file that the words before it say to write, and
every line of a block of shell is a command that must succeed.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "docs" / "how-to"
BLOCK = re.compile(r"^(?P<indent> *)```(?P<language>\w+)\n(?P<text>.*?)^(?P=indent)```$", re.M | re.S)
WRITES = re.compile(r"Write\s+`([^`]+)`")
PROGRAMS = {
    "pytest": [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"],
    "python": [sys.executable],
    "elsa-tune": [sys.executable, "-m", "elsa_tune.shell.cli"],
    "sed": ["sed"],
}
DONE = {
    "add-a-mask.md": ["elsa_tune/parts/mask/pairs.py"],
    "add-a-scan.md": ["elsa_tune/parts/scan/sklansky.py"],
    "add-a-state.md": ["elsa_tune/parts/state/lazy.py", "templates/cpp/state/lazy.j2"],
    "add-a-backend.md": ["elsa_tune/generate/plain.py", "search_spaces/plain.toml", "tests/test_plain.py"],
}
"""Pages that are followed, and the files that each says to write."""

LEFT_OUT = (".git", ".venv", "*cache*__", ".*_cache", ".hypothesis", "build", "dist", "site", ".wheels", "results")


def steps(page: str) -> tuple[dict[str, str], list[str]]:
    """Files that a page says to write, and the commands that it says to run, in its order."""
    text = (PAGES / page).read_text().partition("\n## ")[0]  # what is less plain has a test of its own
    files, commands, begin = dict[str, str](), list[str](), 0
    for block in BLOCK.finditer(text):
        content = textwrap.dedent(block["text"])
        if block["language"] == "sh":
            commands += content.splitlines()
        else:
            [*_, path] = WRITES.findall(text[begin : block.start()])
            assert path not in files, f"{page} writes {path} twice"
            files[path] = content
        begin = block.end()
    return files, commands


def done_in(copy: Path, page: str) -> list[str]:
    """Do what a page says; the files that were written."""
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*LEFT_OUT))
    files, commands = steps(page)
    for path, content in files.items():
        assert not (ROOT / path).exists(), f"{page} says to write {path}, which is there"
        (copy / path).parent.mkdir(parents=True, exist_ok=True)
        (copy / path).write_text(content)
    kept = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and Path(path) != ROOT]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(copy), *kept]),
        "ELSA_TUNE_HOME": str(copy.parent / "home"),
        "OMP_WAIT_POLICY": "passive",
    }
    for command in commands:
        program, *arguments = shlex.split(command)
        done = subprocess.run(
            [*PROGRAMS[program], *arguments], cwd=copy, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{page}: {command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        if program == "pytest":
            assert re.search(r"\d+ passed", done.stdout) and " failed" not in done.stdout, done.stdout[-2000:]
    return sorted(files)


SLOW = ("add-a-state.md", "add-a-scan.md", "add-a-mask.md")
"""Pages with the most kernels to run."""


@pytest.mark.parametrize(
    ("page", "touched"),
    [pytest.param(*one, marks=[pytest.mark.slow] if one[0] in SLOW else []) for one in DONE.items()],
)
def test_a_copy_in_which_it_was_done_passes(page: str, touched: list[str], tmp_path: Path) -> None:
    """A scan and a mask in closed form are one file, a state has a text beside it."""
    assert done_in(tmp_path / "copy", page) == touched
