"""Where `elsa-tune` is entered: whatever happens, also while Python imports what it needs, ends in one sentence and an exit status.

Imports little of Python itself, for what else may be missing, too old, or a file of the current folder that bears its name.
"""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from elsa_tune.shell.stopping import Stopping


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit. ``arguments`` are those of the process by default."""
    _open_streams()
    try:
        from elsa_tune.shell import mishaps
        from elsa_tune.shell.stopping import Stopping
    except Exception as error:  # the standard library itself is in somebody's way
        told = f"elsa-tune cannot start: {type(error).__name__}: {error}; start it in a folder that has no Python files"
        os.write(2, f"{told}\n".encode(errors="replace"))
        sys.exit(2)
    with Stopping() as stopping:
        try:
            status = _run(arguments, stopping)
            _flush()
        except BaseException as error:
            try:
                status, sentence = mishaps.told(error, stopping.number)
            except Exception as another:  # whatever is wrong here is wrong with telling it, too
                status, sentence = (
                    70,
                    f"{type(error).__name__}: {error}, and {type(another).__name__}: {another} while that was told",
                )
            _say(sentence)
        sys.exit(stopping.status(status))


def _run(arguments: list[str] | None, stopping: Stopping) -> int:
    """The exit status of the command that the arguments name."""
    from elsa_tune.shell import cli

    stopping.is_begun = True
    try:
        returned = cli.main.main(arguments, prog_name="elsa-tune", standalone_mode=False)
    except SystemExit as end:
        returned = end.code
    return returned if isinstance(returned, int) else 0


def _flush() -> None:
    """Write what is still to be printed: a full disk, or a reader that went away, is met here and not as Python ends. Raises OSError."""
    try:
        sys.stdout.flush()
    except OSError as error:
        error.filename = "what is printed cannot be written"
        raise


def _open_streams() -> None:
    """Nowhere in place of a standard stream that is closed, or the next file opened would be it; and every character can be written."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.dup(number), mode))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _say(sentence: str) -> None:
    """One line on stderr, if anybody can be told; what stdout still holds and cannot be written is forgotten."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
    if sentence:
        with suppress(OSError, ValueError):
            print(f"elsa-tune: {sentence}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
