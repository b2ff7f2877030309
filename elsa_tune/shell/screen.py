"""What people see: live progress, tables of winners, explanations, the doctor's findings. And the same as JSON."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping

from rich.console import Console
from rich.table import Table
from rich.text import Text

from elsa_tune.device import Device
from elsa_tune.dispatch.exactness import as_exact, torchs_error
from elsa_tune.dispatch.ladder import Choice
from elsa_tune.generate.backends import Finding
from elsa_tune.measurement import Evidence, Measurement
from elsa_tune.problem import Problem
from elsa_tune.remember.foreign import Difference
from elsa_tune.shell import ending, whole_models
from elsa_tune.traffic import LEAST_SHARE, Traffic, merged, of, wall_of, worth_tuning
from elsa_tune.tuning.fleet import Member
from elsa_tune.tuning.forecast import Forecast
from elsa_tune.tuning.offline import Ranking, Target, occupancy
from elsa_tune.tuning.race import Ratio
from elsa_tune.tuning.report import Outcome, Report


def console(stderr: bool = False) -> Console:
    """Where people read: as wide as their terminal, or wide enough for every table in a file."""
    return Console(stderr=stderr, width=None if (sys.stderr if stderr else sys.stdout).isatty() else 120)


def number(value: float | None, form: str) -> str:
    """A number as it is shown, or a dash."""
    return "-" if value is None else format(value, form)


def ratio(found: Evidence) -> str:
    """What finals say together of a winner, with the interval."""
    if found.variant == found.measurement.incumbent:
        return "1, torch's own"
    return f"{found.ratio:.2f} [{found.ratio_low:.2f}, {found.ratio_high:.2f}]"


def listing(*columns: str) -> Table:
    """A table whose first column is text and the others numbers."""
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number else "left", no_wrap=number > 0, overflow="fold")
    return table


LEAST_NAME = 24
"""Columns that names in a table need beside its numbers."""


def _put(console: Console, table: Table) -> None:
    """Print a table; on a terminal too narrow for its numbers and some of its names, a line for each of its cells."""
    first, *numbers = table.columns
    width = sum(2 + max(len(str(cell)) for cell in (column.header, *column.cells)) for column in numbers)
    if width + LEAST_NAME <= console.width:
        console.print(table, highlight=False)
        return
    for name, *cells in zip(first.cells, *(column.cells for column in numbers), strict=True):
        console.print(Text(str(name)), soft_wrap=True)
        for column, cell in zip(numbers, cells, strict=True):
            console.print(Text(f"  {column.header}: {cell}"), soft_wrap=True)


def outcome_table(outcomes: Iterable[Outcome]) -> Table:
    """The final table of a run: two lines a problem, the second its winner."""
    table = listing("problem, winner", "ratio to SDPA [95 %]", "GFLOP/s", "of limit", "error")
    for o in outcomes:
        if o.winner is None:
            table.add_row(f"{o.problem}\n  none", "-", "-", "-", "-")
            continue
        limit = "-" if o.limit is None else f"{100 * o.limit:.0f} %"
        name = f"{o.problem}\n  {o.winner.variant}"
        table.add_row(name, ratio(o.winner), number(o.gflops, ".0f"), limit, number(o.winner.measurement.error, ".1e"))
    return table


def print_report(console: Console, report: Report, program: str = "") -> None:
    """The final table, what it means, how to reproduce a line, and what to do with it: ``program`` is a command that it was for."""
    _put(console, outcome_table(report.outcomes))
    console.print(
        "ratio: median of torch's fastest kernel / winner, in turns in one run, with its interval; "
        "of limit: share of the measured multiply-add peak or read bandwidth, whichever binds; error: relative to max|v|, "
        "against float64 (of fp64: against twice its digits).",
        style="dim",
        highlight=False,
    )
    if gains := whole_models.gains(report.outcomes):
        table = listing("model", "attention", "whole model, at most")
        for gain in gains:
            table.add_row(gain.model.name, f"{gain.attention:.2f}", f"{gain.whole:.2f}")
        _put(console, table)
    for note in report.notes:
        console.print(f"note: {note}", style="yellow", highlight=False)
    if report.outcomes:
        console.print(f"Reproduce a line: {report.outcomes[0].command}", highlight=False, soft_wrap=True)
    for line in ending.lines(report.outcomes, program):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def print_traffic(console: Console, traffic: Iterable[Traffic], device: Device, wall: float) -> None:
    """What programs asked of a device, what of it is tuned, and what is not."""
    found = of(device, traffic)
    asked, tuned = merged(one.asked for one in found), worth_tuning(one.asked for one in found)
    lasted, total = max(wall, wall_of(found)), sum(one.seconds for one in asked)
    table = listing("asked", "calls", "seconds", "of the program")
    for one in asked:
        if one.problem in tuned:
            table.add_row(
                str(one.problem), str(one.calls), f"{one.seconds:.3f}", f"{one.seconds / lasted:.1%}" if lasted else "-"
            )
    _put(console, table)
    calls = sum(one.calls for one in asked)
    told = f"{calls} calls of {len(asked)} problem{'s' * (len(asked) > 1)} took {total:.3f} s of {lasted:.1f} s"
    if rest := [one for one in asked if one.problem not in tuned]:
        seconds = sum(one.seconds for one in rest)
        told += f"; not tuned: {len(rest)} of less than {LEAST_SHARE:.0%} each, {seconds:.3f} s together"
    console.print(told, highlight=False, soft_wrap=True)


def print_forecast(console: Console, found: Forecast) -> None:
    """What traffic will gain by the winners of a device."""
    table = listing("forecast", "calls", "seconds by torch", "ratio [95 %]", "saved")
    for gain in found.gains:
        if gain.saved > 0:
            table.add_row(
                str(gain.problem), str(gain.calls), f"{gain.before:.3f}", _interval(gain.ratio), f"{gain.saved:.3f}"
            )
    if table.row_count:
        _put(console, table)
    after = found.after
    console.print(
        f"attention on {found.device}: {found.before:.3f} s by torch, {after.median:.3f} [{after.low:.3f}, {after.high:.3f}] s by the winners,"
        f" {_interval(found.attention)} times as fast", highlight=False, soft_wrap=True,
    )  # fmt: skip
    if found.whole is not None:
        told = f"the program as a whole: {found.wall:.1f} s, {_interval(found.whole)} times as fast"
        console.print(told, highlight=False, soft_wrap=True)


def _interval(ratio: Ratio) -> str:
    return f"{ratio.median:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"


def print_rankings(console: Console, rankings: Iterable[Ranking], goal: Target) -> None:
    """Shortlists for a device that is not here. The order is predicted; nothing was measured."""
    for ranking in rankings:
        best = ranking.best
        table = listing("variant", "registers", "shared KiB", "blocks", "against the first")
        for c in best:
            r = c.built.resources
            table.add_row(
                str(c.variant), str(r["registers"]), f"{r['shared'] / 1024:.0f}",
                str(occupancy(r, goal)), f"{best[0].predicted / c.predicted:.2f}",
            )  # fmt: skip
        console.print(
            f"{ranking.problem} on {goal.device.arch}: {len(ranking.candidates)} compiled, {ranking.refused} refused",
            highlight=False,
        )
        _put(console, table)
    console.print(
        "Predicted from compiler reports, not measured. Recorded as candidates: elsa-tune tries them first on such a device.",
        style="dim",
        highlight=False,
    )


def print_winners(console: Console, winners: Iterable[Evidence]) -> None:
    """Recorded winners by device, two lines a problem."""
    devices: dict[str, list[Evidence]] = {}
    for m in winners:
        devices.setdefault(m.device, []).append(m)
    for device, rows in devices.items():
        table = listing("problem, winner", "ratio to SDPA [95 %]", "finals", "error")
        for m in rows:
            name = f"{m.problem}\n  {m.variant}"
            table.add_row(name, ratio(m), str(m.finals), number(m.measurement.error, ".1e"))
        console.print(device, highlight=False, soft_wrap=True)
        _put(console, table)


def print_explanation(
    console: Console, problem: Problem, choice: Choice, tried: list[Measurement], importances: dict[str, float]
) -> None:
    """Which rung answered, what was tried, what was rejected and why, which axes mattered."""
    server = "torch's SDPA" if choice.by_sdpa else str(choice.variant)
    console.print(f"{problem} is served by {server} (rung: {choice.rung})", highlight=False, soft_wrap=True)
    for step in choice.steps:
        console.print(f"  {step}", highlight=False, soft_wrap=True)
    counts: dict[str, int] = {}
    for m in tried:
        counts[m.status] = counts.get(m.status, 0) + 1
    console.print(
        "tried here: " + (", ".join(f"{n} {s}" for s, n in sorted(counts.items())) or "nothing"), highlight=False
    )
    latest = {m.variant: m for m in tried if m.status == "ok" and m.ratio}
    for m in sorted(latest.values(), key=lambda m: -(m.ratio or 0))[:5]:
        console.print(f"  {number(m.ratio, '.2f')}  {m.variant} ({m.stage})", highlight=False, soft_wrap=True)
    print_exactness(console, latest)
    rejected = {m.variant: m for m in tried if m.status != "ok"}
    if rejected:
        console.print("rejected:", highlight=False)
    for m in rejected.values():
        console.print(f"  {m.status}: {m.variant}: {m.reason}", highlight=False, soft_wrap=True)
    if importances:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in importances.items() if share >= 0.01)
        console.print(f"axes that mattered: {shares}", highlight=False, soft_wrap=True)
    elif tried:
        console.print("axes that mattered: too few measurements to say; tune longer", highlight=False)


def print_exactness(console: Console, latest: Mapping[str, Measurement]) -> None:
    """The fastest variant that errs no more than torch: what exactness costs."""
    error, exact = torchs_error(latest.values()), as_exact(latest.values(), 1.0)
    if error is not None:
        words = (
            f"{exact[0].variant} ({number(exact[0].ratio, '.2f')}, {exact[0].error:.1e})" if exact else "none measured"
        )
        console.print(f"fastest at or below torch's error of {error:.1e}: {words}", highlight=False, soft_wrap=True)


def print_members(console: Console, members: Iterable[Member]) -> None:
    """Who tunes together."""
    table = Table("worker", "device", "trials", "a minute", "last seen", box=None)
    for m in members:
        table.add_row(m.worker, m.device, str(m.trials), f"{m.rate:.1f}", f"{m.ago:.0f} s ago")
    _put(console, table)


def print_difference(console: Console, difference: Difference) -> None:
    """What two files of measurements do not share, and where they name other winners."""
    console.print(
        f"{difference.shared} measurements in both, {len(difference.only_first)} only in the first, "
        f"{len(difference.only_second)} only in the second",
        highlight=False,
    )
    table = Table("device", "problem", "first's winner", "second's winner", box=None)
    for (device, problem), pair in difference.winners.items():
        table.add_row(device, problem, *(f"{m.variant} {m.ratio or 1:.2f}" if m else "none" for m in pair))
    if difference.winners:
        _put(console, table)


def print_findings(console: Console, findings: Iterable[Finding]) -> None:
    """The doctor's findings: good ones, and lacks with their remedy."""
    for f in findings:
        mark = "[green]ok[/]  " if f.good else "[red]lack[/]"
        console.print(f"{mark} {f.topic}:", Text(f.detail), highlight=False, soft_wrap=True)
        if f.remedy:
            console.print(Text(f"       {f.remedy}"), soft_wrap=True)
