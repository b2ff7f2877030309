"""What a program is told when it ends: problems that it asked often, and for which nobody is known to be the fastest."""

from __future__ import annotations

import os
import sys
from contextlib import suppress

from elsa_tune.device import Device
from elsa_tune.dispatch import ledger
from elsa_tune.dispatch.shelf import Shelf
from elsa_tune.generate import backends, lawful
from elsa_tune.problem import Problem
from elsa_tune.traffic import Asked

OFTEN, LONG = 16, 0.1
"""Calls of a problem, and their seconds, from which it is worth a run."""

NAMED = 3
"""Problems that the command names."""

TELLER = "ELSA_TUNE_TELLER"
"""The variable by which processes that a program starts know that another one, of this number, tells."""

_process = os.getpid()


def begin() -> None:
    """This process asks: what it starts from now on says nothing."""
    os.environ.setdefault(TELLER, str(_process))


def tell(shelf: Shelf) -> None:
    """One line on stderr of all such problems, with the command to type; none from children, nor where ELSA_TUNE_TRACE is off. Never
    raises."""
    with suppress(Exception):
        if (
            sys.stderr is None
            or _is_a_child()
            or os.environ.get("ELSA_TUNE_TRACE", "").lower() in ("0", "false", "no", "off")
        ):
            return
        if found := unknown(shelf):
            print(told(found), file=sys.stderr, flush=True)


def _is_a_child() -> bool:
    """Whether this process was forked, or started by one that tells."""
    return os.getpid() != _process or os.environ.get(TELLER, str(_process)) != str(_process)


def unknown(shelf: Shelf) -> list[Asked]:
    """What this process asked so often that it is worth a run, and that kernels of ours could serve, though nothing is known of it; those of
    most seconds first."""
    found = []
    for device, asked in ledger.asked_of_torch(ledger.served()).items():
        often = [one for one in asked if one.calls >= OFTEN and one.seconds >= LONG]
        found += [
            one for one in often if _could_be_served(one.problem, device) and not shelf.knows(one.problem, device)
        ]
    return sorted(found, key=lambda one: -one.seconds)


def _could_be_served(problem: Problem, device: Device) -> bool:
    return lawful.unserved(problem, [device], backends.candidates()) is None


def told(found: list[Asked]) -> str:
    """The line."""
    seconds, count = sum(one.seconds for one in found), len(found)
    named = " ".join(f"--problem {one.problem}" for one in found[:NAMED])
    more = f" ({count - NAMED} more: elsa-tune run -- PROGRAM)" if count > NAMED else ""
    which = f"{count} problems that were" if count > 1 else "a problem that was"
    return f"elsa-tune: torch took {seconds:.1f} s over {which} never tuned here; type elsa-tune {named}{more}"
