"""Help as a manual page: what a command does, its options, files, variables and examples, at any width of a terminal."""

from __future__ import annotations

import shlex
import shutil
import textwrap
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

if TYPE_CHECKING:  # where it says nothing of its types
    from click import Group as DefaultGroup
else:
    from click_default_group import DefaultGroup

_EXAMPLES = "Examples:\n\n\b\n"
"""What click keeps lines after as they are."""

STATUS = {
    "0": "done",
    "1": "ended, but not everything was found, sound or equal; the command says what",
    "2": "a mistake, or what this machine lacks, told in one line with its remedy",
    "70": "a fault of ours; the line says where its trace is",
    "130": "stopped from the keyboard, by another signal 128 and its number; what was measured is kept",
}
FILES = {
    "measurements.db": "every measurement, SQLite, append-only; in ELSA_TUNE_HOME or the platform's cache folder",
    "kernels/": "built kernels, each with its source; beside it",
    "layers/": "copies of a team's databases; beside it",
    "tuning.lock": "held by who times on this machine; beside it",
    "traceback.txt": "of the last error that nobody foresaw; beside it",
    "handovers.jsonl": "why torch answered calls in a kernel's place; beside it",
    "config.toml": "`databases` of a team and `trusted` keys; in ELSA_TUNE_HOME or the platform's configuration folder",
}
VARIABLES = {
    "ELSA_TUNE": "1: any program that imports torch is served",
    "ELSA_TUNE_TRACE": "1: say at exit who was served; 0: say nothing",
    "ELSA_TUNE_RECORD": "a file to which each process adds what it asked of torch, which answers everything",
    "ELSA_TUNE_HOME": "the folder of the database and built kernels",
    "ELSA_TUNE_DB": "databases that a team shares",
    "ELSA_TUNE_KERNELS": "folders of kernels built elsewhere, which are only read",
    "ELSA_TUNE_TRACEBACK": "1: show the whole trace of an error of the command line",
    "CXX": "the C++ compiler to use before all others",
}
"""What a person may set."""


def examples(*lines: str) -> str:
    """The epilog of a command: lines as they are typed, each with a comment or without."""
    return _EXAMPLES + "\n".join(lines)


def examples_of(command: click.Command) -> list[str]:
    """Those lines."""
    return (command.epilog or "").removeprefix(_EXAMPLES).splitlines()


class _Formatter(click.HelpFormatter):
    """Lists whose first column leaves room for the second, in a terminal of 40 columns too."""

    def __init__(self, indent_increment: int = 2, width: int | None = None, max_width: int | None = None) -> None:
        columns = min(shutil.get_terminal_size().columns, max_width or 80)
        super().__init__(indent_increment, width or max(columns - 2, 20), max_width)

    def write_dl(self, rows: Any, col_max: int = 30, col_spacing: int = 2) -> None:
        super().write_dl(rows, min(col_max, self.width // 3), col_spacing)

    def write_example(self, line: str) -> None:
        """A command as it may be pasted: its comment above it where both do not fit, and continued lines marked."""
        room, (command, sign, comment) = self.width - self.current_indent, line.partition("  # ")
        if sign and len(line) > room:
            self._write_lines(textwrap.wrap(comment.strip(), room, initial_indent="# ", subsequent_indent="# "))
            line = command.rstrip()
        words = shlex.split(line) if len(line) > room else []
        folded = textwrap.wrap(
            shlex.join(words), room - 2, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
        )
        self._write_lines([f"{part} \\" for part in folded[:-1]] + folded[-1:] if words else [line])

    def _write_lines(self, lines: list[str]) -> None:
        for line in lines:
            self.write(f"{'':{self.current_indent}}{line}\n")


class _Context(click.Context):
    formatter_class = _Formatter


class _Page:
    """What manual pages add to a command."""

    context_class: type[click.Context] = _Context

    def get_short_help_str(self: Any, limit: int = 45) -> str:
        """The first sentence, whole."""
        return str(super().get_short_help_str(1000))  # type: ignore[misc]

    def format_epilog(self: Any, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Exit status, files and variables of the whole program, and examples."""
        assert isinstance(formatter, _Formatter)
        if ctx.parent is None and isinstance(self, click.Group):
            for title, rows in (("Exit status", STATUS), ("Files", FILES), ("Variables", VARIABLES)):
                with formatter.section(title):
                    formatter.write_dl([*rows.items()])
        with formatter.section("Examples"):
            for line in examples_of(self):
                formatter.write_example(line)


class Command(_Page, click.Command):
    """A command with a manual page."""


class Group(_Page, click.Group):
    """Commands with manual pages."""

    command_class = Command


class MainGroup(_Page, DefaultGroup):
    """The same, and a command that is meant where none is named: its options are completed, too."""

    command_class = Command
    default_cmd_name: str

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Where a shell asks what may follow, nothing stands for nothing."""
        if ctx.resilient_parsing and not args:
            return click.Group.parse_args(self, ctx, args)
        return list(super().parse_args(ctx, args))

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """What may follow on the command line."""
        found = super().shell_complete(ctx, incomplete)
        meant = self.commands[self.default_cmd_name]
        of_its = meant.shell_complete(click.Context(meant, parent=ctx, info_name=meant.name), incomplete)
        known = {one.value for one in found}
        return [*found, *(one for one in of_its if one.value not in known)]
