"""The command line as it describes itself: usage, help and options of every command."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

import click

from elsa_tune.shell.cli import main
from elsa_tune.shell.manual import FILES, STATUS, VARIABLES

from ._markdown import code, said, table

VERBATIM = "\b\n"
"""How click marks a paragraph whose lines stay as they are."""


def statuses() -> str:
    """What exit statuses mean."""
    return table(["exit status", "means"], ((code(name), _plain(what)) for name, what in STATUS.items()))


def variables() -> str:
    """What a person may set."""
    return table(["variable", "does"], ((code(name), _plain(what)) for name, what in VARIABLES.items()))


def files_kept() -> str:
    """What lies in the home folder and the configuration folder."""
    return table(["file", "holds"], ((code(name), what) for name, what in FILES.items()))


def command_reference() -> str:
    """A section for each command."""
    return "\n\n".join(_sections(click.Context(main, info_name="elsa-tune")))


def _sections(context: click.Context) -> Iterator[str]:
    command = context.command
    path = context.command_path
    told = said(command.help, path) and inspect.cleandoc(command.help or "")
    yield f"## `{path}`"
    yield f"```console\n$ {path} {' '.join(command.collect_usage_pieces(context))}\n```"
    yield from map(_paragraph, f"{told}\n\n{inspect.cleandoc(command.epilog or '')}".strip().split("\n\n"))
    options = [param for param in command.params if isinstance(param, click.Option) and not param.hidden]
    if options:
        yield table(["option", "does"], (_row(option, context) for option in options))
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            if below is not None and not below.hidden:
                yield from _sections(click.Context(below, parent=context, info_name=name))


def _row(option: click.Option, context: click.Context) -> tuple[str, str]:
    """An option as it is written, and what it does."""
    names, what = option.get_help_record(context) or ("", "")
    said(option.help, f"{context.command_path} {names}")
    return re.sub(r"--?[a-z][a-z-]*", r"`\g<0>`", _plain(names)), _plain(said(what, names))


def _paragraph(text: str) -> str:
    return f"```text\n{text.removeprefix(VERBATIM)}\n```" if text.startswith(VERBATIM) else _plain(text)


def _plain(text: str) -> str:
    """Text that means no markup."""
    return text.replace("*", "\\*").replace("<", "&lt;").replace("[", "\\[")
