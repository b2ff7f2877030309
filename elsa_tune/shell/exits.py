"""Exit statuses, as docs/how-to/when-something-is-wrong.md promises them, and mistakes as messages."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from elsa_tune.errors import ElsaTuneError, one_line

EXIT_INCOMPLETE, EXIT_MISTAKE, EXIT_UNEXPECTED, EXIT_INTERRUPTED = 1, 2, 70, 130
"""Something is missing from what was asked; a mistake that a sentence names; a fault of ours; Ctrl-C. Other signals are 128 and their
number."""

P = ParamSpec("P")
R = TypeVar("R")


def mistakes_are_messages(command: Callable[P, R]) -> Callable[P, R]:
    """Errors raised on purpose are one line on stderr, not a traceback."""

    @wraps(command)
    def wrapped(*arguments: P.args, **options: P.kwargs) -> R:
        try:
            return command(*arguments, **options)
        except ElsaTuneError as error:
            print(f"elsa-tune: {one_line(error)}", file=sys.stderr)
            sys.exit(EXIT_MISTAKE)

    return wrapped
