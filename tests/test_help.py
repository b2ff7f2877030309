"""Help, examples, completion and versions: what a person reads before anything runs."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import click
import pytest
from click.shell_completion import BashComplete
from click.testing import CliRunner

from elsa_tune import places, space
from elsa_tune.device import Device, host_cpu
from elsa_tune.generate import backends
from elsa_tune.measurement import Measurement
from elsa_tune.problem import Problem
from elsa_tune.remember.database import Database
from elsa_tune.shell import cli, manual
from elsa_tune.tuning import offline

ROOT = Path(__file__).parent.parent


def contexts(context: click.Context) -> Iterator[click.Context]:
    """Every command's context, the program's own first."""
    yield context
    if isinstance(context.command, click.Group):
        for name in context.command.list_commands(context):
            below = context.command.get_command(context, name)
            assert below is not None
            yield from contexts(below.context_class(below, parent=context, info_name=name))


PAGES = {one.command_path: one for one in contexts(manual._Context(cli.main, info_name="elsa-tune"))}


def understood(words: list[str]) -> click.Context:
    """The context of the command that words mean, as click reads them; nothing runs."""
    context = cli.main.make_context("elsa-tune", words)
    while isinstance(context.command, click.Group):
        group, rest = context.command, [*context._protected_args, *context.args]
        name, command, rest = group.resolve_command(context, rest)
        assert command is not None
        context = command.make_context(name, rest, parent=context)
    return context


@pytest.mark.parametrize("path", PAGES)
def test_every_example_is_a_command_that_is_understood(path: str) -> None:
    lines = manual.examples_of(PAGES[path].command)
    assert lines, f"{path} has no example; give it one: epilog=manual.examples(...)"
    for line in lines:
        program, *words = shlex.split(line, comments=True)
        context = understood(words)
        told = context.params
        assert program == "elsa-tune"
        if len(PAGES[path].command.params) and path != "elsa-tune" and not isinstance(PAGES[path].command, click.Group):
            assert context.command is PAGES[path].command, f"{line} is an example of another command"
        for problem in (*told.get("problems", ()), *([told["problem"]] if told.get("problem") else [])):
            assert problem in (str(Problem.parse(problem)), Problem.parse(problem).family)
        if told.get("variant"):
            assert str(space.parse(told["variant"])) == told["variant"]
        if told.get("offline") or context.command.name == "compile":
            assert offline.target(told["device"])


def test_an_example_that_rots_is_seen() -> None:
    for words in (["--budgets", "3"], ["winners", "--jason"], ["db", "exports"], ["export"], ["--budget", "soon"]):
        with pytest.raises(click.UsageError):
            understood(words)


@pytest.mark.parametrize("columns", [40, 80])
def test_help_fits_a_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    for path, page in PAGES.items():
        text = page.command.get_help(page)
        wide = [line for line in text.splitlines() if len(line) > columns and " " in line.strip(" \\")]
        assert not wide, (path, wide)
        assert not re.search(r"[a-z]\.\.\.$", text, re.M), "no sentence is cut short"
        pasted = re.sub(r" \\\n\s+", " ", text.partition("Examples:\n")[2])
        typed = [line.strip() for line in pasted.splitlines() if line.strip().startswith("elsa-tune")]
        assert [shlex.split(line, comments=True) for line in typed] == [
            shlex.split(line, comments=True) for line in manual.examples_of(page.command)
        ], "what was folded is the same command"


def test_main_help_tells_statuses_files_and_every_variable_that_is_read() -> None:
    text = CliRunner().invoke(cli.main, ["--help"]).output
    read = {
        name
        for path in [*(ROOT / "elsa_tune").rglob("*.py"), ROOT / "elsa_tune_autoload.py"]
        for name in re.findall(r"environ(?:\.get\(|\[)\"(ELSA_TUNE\w*|CXX)\"", path.read_text())
    }
    internal = {"ELSA_TUNE_TELLER"}  # that processes tell each other
    assert read - internal == set(manual.VARIABLES)
    for name in (*manual.VARIABLES, *manual.FILES, *manual.STATUS):
        assert re.search(rf"^  {re.escape(name)}\s", text, re.M), name
    assert places.database().name in manual.FILES and f"{places.kernels().name}/" in manual.FILES
    assert places.settings().name in manual.FILES and f"{places.layers().name}/" in manual.FILES


def completed(line: str) -> list[str]:
    """What a shell offers for the last word of a line."""
    *words, last = line.split(" ")
    return [one.value for one in BashComplete(cli.main, {}, "elsa-tune", "X").get_completions(words[1:], last)]


def test_values_are_completed(home: Path) -> None:
    assert "winners" in completed("elsa-tune w") and "--budget" in completed("elsa-tune --b")
    assert str(host_cpu()) in completed("elsa-tune --device cpu")
    assert "sm_90" in completed("elsa-tune --device sm_") and completed("elsa-tune compile --for gfx94")
    assert completed("elsa-tune --workload m") == ["masks"]
    assert completed("elsa-tune tune --effort f") == ["full"]
    assert "fp32.d64@b8.h12.q197.k197.bshd" in completed("elsa-tune --problem fp32.d64@")
    assert "fp32.d64.causal" in completed("elsa-tune show cpp.x fp32.d64.c")
    assert set(completed("elsa-tune show ")) >= {
        start for name in space.names() for start in space.Space.read(name).start
    }
    assert completed("elsa-tune db mer") == ["merge"] and completed("elsa-tune completion f") == ["fish"]
    assert not home.exists()

    device, problem = "cpu:some_model-zen4-c2", "fp32.d48@b1.h1.q7.k7"
    with Database.for_writing() as database:
        database.record(
            Measurement(
                device=device, problem=problem, variant="cpp.serial.portable.l4.q1.k1.v1.n24", status="ok", stage="final",
                role="candidate", seconds=1.0, ratio=2.0, ratio_low=1.9, ratio_high=2.1, samples=(1.0,), incumbent="sdpa.flash", incumbent_samples=(2.0,),
            )
        )  # fmt: skip
    assert device in completed("elsa-tune winners --device cpu:some")
    assert problem in completed("elsa-tune explain fp32.d48") and Device.parse(device)
    places.database().write_bytes(b"garbage" * 1000)
    assert completed("elsa-tune winners --device cpu:some") == [], "a database that cannot be read completes nothing"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script_of_the_shell(shell: str) -> None:
    result = CliRunner().invoke(cli.main, ["completion", shell])
    assert result.exit_code == 0 and f"_ELSA_TUNE_COMPLETE={shell}_complete" in result.output
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=result.output, text=True, check=True)


def test_versions_are_the_doctors() -> None:
    result = CliRunner().invoke(cli.main, ["--version"])
    told = dict(line.split(" ", 1) for line in result.output.splitlines() if not line.startswith("backend"))
    assert (
        result.exit_code == 0
        and told["torch"] == version("torch")
        and told["Python"].startswith(sys.version.split()[0])
    )
    for name in backends.candidates():
        assert f"backend {name}: " in result.output
    findings = json.loads(CliRunner().invoke(cli.main, ["doctor", "--json"]).output)
    assert all(set(one) == {"topic", "good", "detail", "remedy"} for one in findings)
    (found,) = (one["detail"] for one in findings if one["topic"] == "versions")
    assert found == ", ".join(f"{name} {which}" for name, which in told.items())
