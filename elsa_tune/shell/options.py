"""Options that several commands have, each said once."""

from __future__ import annotations

from collections.abc import Callable
from math import isnan
from typing import Any, TypeVar

import click

from elsa_tune.shell.completions import BOTH, DEVICES, PROBLEMS, WORKLOADS

FC = TypeVar("FC", bound="Callable[..., Any] | click.Command")


class _Seconds(click.FloatRange):
    """A budget: of numbers, what is none ("nan") lies in every range."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        seconds = float(super().convert(value, param, ctx))
        if isnan(seconds):
            self.fail(f"{value} is no number of seconds", param, ctx)
        return seconds


def budget(meaning: str = "Wall seconds.") -> Callable[[FC], FC]:
    """How long something may take."""
    return click.option("--budget", default=180.0, show_default=True, type=_Seconds(min=1, max=1e7), help=meaning)


def here(meaning: str = "auto, a kind, or a device's full spelling.", complete: Any = DEVICES) -> Callable[[FC], FC]:
    """A device of this machine."""
    return click.option("--device", default="auto", show_default=True, shell_complete=complete, help=meaning)


def goal(name: str, meaning: str, complete: Any = BOTH) -> Callable[[FC], FC]:
    """A device that need not be here, under a name of its own."""
    return click.option(name, "device", required=True, metavar="TARGET", shell_complete=complete, help=meaning)


recorded = click.option(
    "--device",
    default=None,
    shell_complete=DEVICES,
    help="Only this device, or those of a kind (cpu) or an architecture.",
)
one_problem = click.option("--problem", default=None, shell_complete=PROBLEMS, help="Only this problem.")
effort = click.option(
    "--effort",
    default="quick",
    show_default=True,
    type=click.Choice(["quick", "full"]),
    help="How many trials a problem deserves.",
)


watch = click.option(
    "--watch", "port", is_flag=False, flag_value=0, type=click.IntRange(0, 65535), metavar="[PORT]",
    help="Serve the report to this machine's browsers while it tunes.",
)  # fmt: skip


def workload(meaning: str = "Which problems to take.") -> Callable[[FC], FC]:
    """A list of problems by its name or file."""
    return click.option(
        "--workload", default="default", show_default=True, metavar="NAME|FILE", shell_complete=WORKLOADS, help=meaning
    )


def problems(meaning: str = "Take this instead; repeatable.") -> Callable[[FC], FC]:
    """Problems one by one."""
    return click.option(
        "--problem", "problems", multiple=True, metavar="SPELLING", shell_complete=PROBLEMS, help=meaning
    )
