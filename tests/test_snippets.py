"""What README and docs show runs: Python page by page, in one namespace; commands are understood, and those that cost nothing run.

What a page needs and does not show stands in a comment before the block, ``<!-- given``: Python too. Blocks of ``text`` are output; right
below Python it is compared. Nothing is left out but what another
test follows: files that how-tos say to write, and the commands for them.
"""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

import elsa_tune
from elsa_tune.dispatch import ledger
from elsa_tune.shell import cli
from tests import test_how_to
from tests.absent_torchvision import standing_in
from tests.contracts import test_added_parts

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    path.relative_to(ROOT).as_posix(): path for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
}
MOST_SECONDS = 1.5
"""Of a budget that a page names, here."""

BLOCK = re.compile(
    r"^<!-- given\n(?P<given>.*?)^-->$|^(?P<indent> *)```(?P<language>[^\n]*)\n(?P<text>.*?)^(?P=indent)```$",
    re.M | re.S,
)
COMMAND = re.compile(r"^\s*(?:RUN )?(?:[A-Z_]+=\S+ )*elsa-tune(?: (?P<rest>.*))?$")
NEEDS = {"docs/how-to/serve-models-of-libraries.md": ("timm", "transformers", "diffusers")}
"""What blocks import that the program does not need."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page, or what is given before one."""

    page: str
    line: int
    language: str
    text: str


@cache
def blocks(page: str) -> list[Block]:
    """Those of a page, in its order."""
    text, found = PAGES[page].read_text(), []
    for match in BLOCK.finditer(text):
        language, content = (
            ("python", match["given"]) if match["given"] is not None else (match["language"], match["text"])
        )
        found.append(Block(page, text.count("\n", 0, match.start()) + 1, language, textwrap.dedent(content)))
    return found


@cache
def followed(page: str) -> tuple[dict[str, str], list[str]]:
    """Files and commands of a page that another test follows."""
    name = Path(page).name
    files, typed = test_how_to.steps(name) if name in test_how_to.DONE else ({}, [])
    if name in {one for one, *_ in test_added_parts.PAGES}:
        files = {**files, **test_added_parts.shown(name)}
    return files, typed


def programs(page: str) -> list[Block]:
    """Python that nothing else runs."""
    return [
        block for block in blocks(page) if block.language == "python" and block.text not in followed(page)[0].values()
    ]


def printed_by(block: Block) -> str | None:
    """What a page says that a block prints: the text right below it."""
    below = block.line + block.text.count("\n") + 3
    return next((one.text for one in blocks(block.page) if one.line == below and one.language == "text"), None)


WITH_PYTHON = [page for page in PAGES if programs(page)]


def capped(tune: Any, *problems: Any, budget: float, **options: Any) -> Any:
    """Tuning as a page says, for less long."""
    return tune(*problems, budget=min(budget, MOST_SECONDS), **options)


@pytest.mark.filterwarnings("ignore")  # what libraries say of each other
@pytest.mark.parametrize("page", WITH_PYTHON)
def test_what_a_page_shows_runs(
    page: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(elsa_tune, "tune", partial(capped, elsa_tune.tune))
    ledger.forget()
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for library in NEEDS.get(page, ()):
        with standing_in() if library == "timm" else nullcontext():
            pytest.importorskip(library)
    for block in programs(page):
        exec(compile("\n" * block.line + block.text, page, "exec", dont_inherit=True), namespace)
        for name, shape in re.findall(r"^(\w+) = .*# \[([\d, ]+)\]", block.text, re.M):
            assert list(namespace[name].shape) == list(map(int, shape.split(","))), f"{page}: {name}"
        printed = capsys.readouterr().out
        assert printed_by(block) in (None, printed), f"{page}:{block.line}"


def test_pages_have_python() -> None:
    assert any(printed_by(block) for block in programs("docs/tutorial.md"))
    assert {"README.md", "docs/tutorial.md", "docs/reference/masks.md", *NEEDS} <= set(WITH_PYTHON)
    every = [block for page in PAGES for block in blocks(page) if block.language == "python"]
    left = [block for block in every if block not in programs(block.page)]
    assert len(left) < 10 and all(block.page.startswith("docs/how-to/add-a-") for block in left)


def lines(page: str) -> Iterator[tuple[int, str, bool]]:
    """Each line of code of a page that is no Python, and each word of code in its text: where, what, and whether it may leave out what a
    command needs."""
    text = PAGES[page].read_text()
    for block in blocks(page):
        if block.language in ("", "sh"):
            yield from ((block.line + 1 + n, line, False) for n, line in enumerate(block.text.splitlines()))
    prose = BLOCK.sub(lambda match: "\n" * match[0].count("\n"), text)
    for number, line in enumerate(prose.splitlines(), 1):
        if line.startswith("    "):
            yield number, line, False
        yield from ((number, code, True) for code in re.findall(r"`([^`]+)`", line))


def commands(page: str) -> Iterator[tuple[str, list[str], bool]]:
    """Commands of ours: where, arguments, and whether it may leave out what it needs."""
    for number, line, brief in lines(page):
        for part in line.split(" && "):
            if (match := COMMAND.match(part)) and part.strip() not in followed(page)[1]:
                rest = re.split(r"\s{2,}", match["rest"] or "")[0]  # a description follows in a table of commands
                first, *others = re.sub(r"\$\([^)]*\)", "x", rest).split(" | ")
                alternatives = [f"{first.rpartition(' ')[0]} {other}" for other in others]
                for words in (first, *alternatives):
                    arguments = shlex.split(words.replace("[", "").replace("]", ""), comments=True)
                    yield f"{page}:{number}", arguments, brief or bool(alternatives)


def every_command(group: click.Group) -> Iterator[click.Command]:
    for command in group.commands.values():
        yield from every_command(command) if isinstance(command, click.Group) else (command,)


def test_every_command_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the program's own parser: commands, options and values that there are, as many arguments as it takes."""
    called: list[str] = []
    for command in every_command(cli.main):
        monkeypatch.setattr(command, "callback", lambda name=command.name, **_: called.append(name))
    for page in PAGES:
        for where, arguments, brief in commands(page):
            try:
                cli.main.main(arguments, prog_name="elsa-tune", standalone_mode=False)
            except click.MissingParameter as error:
                assert brief, f"{where}: elsa-tune {shlex.join(arguments)}: {error.format_message()}"
            except click.ClickException as error:
                pytest.fail(f"{where}: elsa-tune {shlex.join(arguments)}: {error.format_message()}")
    assert len(called) > 50 and set(called) >= {"tune", "run", "show", "explain", "fleet", "export"}


CHEAP = {"show": 2, "explain": 2, "winners": 1}
"""Commands that take no time, and of how many words at least they are whole."""


def is_cheap(arguments: list[str]) -> bool:
    """Whether it is one of them, about something that there is."""
    placeholders = [word for word in arguments if re.fullmatch("[A-Z]+", word)]
    return len(arguments) >= CHEAP.get(next(iter(arguments), ""), 99) and not placeholders


def test_commands_that_only_show_run(home: Path) -> None:
    cheap = {(where, tuple(words)) for page in PAGES for where, words, _ in commands(page) if is_cheap(words)}
    assert len(cheap) >= 4
    for where, words in cheap:
        result = CliRunner().invoke(cli.main, words)
        assert result.exit_code == 0 and result.output, f"{where}: {result.output}"


def test_other_programs_that_pages_name_are_there() -> None:
    makefiles = [ROOT / "Makefile", ROOT / "templates" / "kit" / "Makefile.j2"]
    targets = {target for path in makefiles for target in re.findall(r"^([a-z-]+):", path.read_text(), re.M)}
    for page in PAGES:
        files, typed = followed(page)
        for number, line, _ in lines(page):
            if line not in typed:
                for path in re.findall(r"\b((?:benchmarks|examples|tests)/[\w/]+\.(?:py|ipynb))\b", line):
                    assert (ROOT / path).exists() or path in files, f"{page}:{number}: {path}"
                for module in re.findall(r"python -m (elsa_tune[\w.]*)", line):
                    assert find_spec(module), f"{page}:{number}: {module}"
                assert set(re.findall(r"^\s*make ([a-z-]+)", line)) <= targets, f"{page}:{number}: {line}"
