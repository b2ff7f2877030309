"""The command line: a thin shell over the library."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, NoReturn, ParamSpec, TypeVar

import click
from click_default_group import DefaultGroup

import elsa_tune
from elsa_tune.errors import ElsaTuneError

EXIT_INCOMPLETE, EXIT_MISTAKE, EXIT_INTERRUPTED = 1, 2, 130


P = ParamSpec("P")
R = TypeVar("R")


def _mistakes_are_messages(command: Callable[P, R]) -> Callable[P, R]:
    """Errors raised on purpose are one line on stderr, not a traceback."""

    @wraps(command)
    def wrapped(*arguments: P.args, **options: P.kwargs) -> R:
        try:
            return command(*arguments, **options)
        except ElsaTuneError as error:
            click.echo(f"elsa-tune: {error}", err=True)
            sys.exit(EXIT_MISTAKE)

    return wrapped


_Group: type[click.Group] = DefaultGroup


@click.group(cls=_Group, default="tune", default_if_no_args=True)
@click.version_option(elsa_tune.__version__)
def main() -> None:
    """Generate, tune, remember and dispatch exact attention kernels. Without a command: tune."""


@main.command()
@click.option(
    "--device",
    default="auto",
    show_default=True,
    help="auto, cpu, cuda, hip, opencl, or a device's full spelling; with --offline a target such as sm_80 or gfx942.",
)
@click.option("--workload", default="default", show_default=True, metavar="NAME|FILE", help="Which problems to tune.")
@click.option("--problem", "problems", multiple=True, metavar="SPELLING", help="Tune this instead; repeatable.")
@click.option(
    "--budget", default=180.0, show_default=True, type=click.FloatRange(min=1), help="Wall seconds, compiling included."
)
@click.option(
    "--effort",
    default="quick",
    show_default=True,
    type=click.Choice(["quick", "full"]),
    help="How many trials a problem deserves.",
)
@click.option("--seed", default=0, show_default=True, help="Of the search.")
@click.option("--sampler", default="local", show_default=True, help="Who proposes variants: local, tpe or random.")
@click.option("--exhaustive", is_flag=True, help="Walk the whole space instead of searching it.")
@click.option("--offline", is_flag=True, help="Rank variants for a GPU that is not here: compiled, not measured.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@_mistakes_are_messages
def tune(device: str, workload: str, problems: tuple[str, ...], budget: float, effort: str, seed: int, sampler: str,
         exhaustive: bool, offline: bool, as_json: bool) -> None:  # fmt: skip
    """Find the fastest exact kernel for each problem on each device.

    Stop it whenever you like: every measurement is recorded as it is made, and the next run goes on from there.
    """
    from elsa_tune import report, tuning
    from elsa_tune import workload as workloads
    from elsa_tune.device import detect

    console = report.console(stderr=as_json)
    if offline:
        _rank(console, device, workload, problems, budget, seed, as_json)
    for here in detect(device):
        count = len(problems) or len(workloads.load(workload, here))
        kinds = f"{here.memory >> 30} GiB" if here.kind != "cpu" else ", ".join(here.isas)
        console.print(f"{here}  {here.name}, {here.cores} cores, {kinds}: {count} problems", highlight=False)
    console.print(f"tuning for up to {budget:.0f} s, effort {effort}", highlight=False)
    try:
        with report.LiveProgress(console) as watch:
            result = tuning.tune(
                problems or None, workload=workload, device=device, budget=budget, effort=effort, seed=seed,
                sampler=sampler, exhaustive=exhaustive, watch=watch,
            )  # fmt: skip
    except KeyboardInterrupt:
        console.print("stopped; everything measured so far is kept, and the next run goes on from it", highlight=False)
        sys.exit(EXIT_INTERRUPTED)
    if as_json:
        click.echo(report.report_json(result))
    else:
        report.print_report(console, result)
    sys.exit(0 if result.complete else EXIT_INCOMPLETE)


def _rank(
    console: Any, device: str, workload: str, problems: tuple[str, ...], budget: float, seed: int, as_json: bool
) -> NoReturn:
    """Rank for a target that is not here, print the shortlists, and exit: 0 if every problem has candidates."""
    from elsa_tune import offline, report

    console.print(f"ranking for {device} for up to {budget:.0f} s; nothing is measured", highlight=False)
    with console.status("compiling") as status:
        found = offline.rank(
            device, problems or None, workload=workload, budget=budget, seed=seed, watch=status.update
        )  # fmt: skip
    if as_json:
        click.echo(report.rankings_json(found))
    else:
        report.print_rankings(console, found, offline.target(device))
    sys.exit(0 if all(ranking.candidates for ranking in found) else EXIT_INCOMPLETE)


@main.command()
@click.option("--device", default=None, help="Only this device.")
@click.option("--family", default=None, help="Only this family, like fp32.d64.causal.")
@click.option("--problem", default=None, help="Only this problem.")
@click.option("--json", "as_json", is_flag=True, help="Print full measurements as JSON.")
@_mistakes_are_messages
def winners(device: str | None, family: str | None, problem: str | None, as_json: bool) -> None:
    """List the recorded winners of every layer."""
    from elsa_tune import report
    from elsa_tune.winners import layers

    wanted = {k: v for k, v in (("device", device), ("family", family), ("problem", problem)) if v}
    found = [m for layer in layers() if layer.database for m in layer.database.winners(**wanted)]
    if as_json:
        click.echo(json.dumps([report.measurement_json(m) for m in found], indent=2))
    elif found:
        report.print_winners(report.console(), found)
    else:
        click.echo("no winner is recorded; run elsa-tune")


@main.command()
@click.argument("variant")
@click.argument("problem", default="fp32.d64")
@_mistakes_are_messages
def show(variant: str, problem: str) -> None:
    """Print the source of VARIANT for PROBLEM (a family is enough) and its compile command. Nothing is run."""
    from elsa_tune import backends, space
    from elsa_tune.problem import Problem

    chosen, wanted = space.parse(variant), Problem.parse(problem)
    backend = backends.get(chosen.backend)
    source = backend.source(chosen, wanted)
    if source is None:
        click.echo(f"{chosen} is torch's own kernel; nothing is generated")
        return
    click.echo(source.text)
    if command := backend.command(chosen):
        click.echo(f"// {shlex.join(command)} kernel.{source.suffix} -o kernel.so")


@main.command()
@click.argument("problem")
@click.option("--device", default="auto", show_default=True)
@_mistakes_are_messages
def explain(problem: str, device: str) -> None:
    """Say who serves PROBLEM and why, what was tried, what was rejected, and which axes mattered."""
    from elsa_tune import backends, dispatch, report, search
    from elsa_tune.device import detect
    from elsa_tune.problem import Problem
    from elsa_tune.space import Space
    from elsa_tune.winners import layers

    wanted = Problem.parse(problem)
    for here in detect(device):
        own = next((layer.database for layer in layers() if layer.name == "own"), None)
        tried = own.measurements(device=str(here), problem=str(wanted)) if own else []
        spaces = [Space.load(name) for name in backends.names() if backends.get(name).generated]
        mattered = next(filter(None, (search.importances(s, tried) for s in spaces)), {})
        report.print_explanation(report.console(), wanted, dispatch.explain(wanted, here), tried, mattered)


@main.command()
@click.option("--device", required=True, help="A target: sm_62, cortex_a72, opencl, or a device's full spelling.")
@click.option("--workload", default="default", show_default=True, metavar="NAME|FILE", help="Which problems to take.")
@click.option("--problem", "problems", multiple=True, metavar="SPELLING", help="Take this instead; repeatable.")
@click.option("-o", "--output", default="kit", show_default=True, type=click.Path(path_type=Path), help="The folder.")
@_mistakes_are_messages
def kit(device: str, workload: str, problems: tuple[str, ...], output: Path) -> None:
    """Write a folder that tunes where nothing is installed: kernels, a runner, a Makefile."""
    from elsa_tune import kit as kits

    headers = kits.make(device, output, problems or None, workload)
    click.echo(f"{output}: {len(headers)} kernels for {device}; take it there and type make run")


@main.command()
@click.argument("problem")
@click.option(
    "--device", default="auto", show_default=True, help="A device that is here, a target, or a full spelling."
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The header; by default named for the family.")
@_mistakes_are_messages
def export(problem: str, device: str, output: Path | None) -> None:
    """Write the best known kernel for PROBLEM on a device as one header with a plain C interface."""
    from elsa_tune import export as exports
    from elsa_tune.problem import Problem

    made = exports.export(Problem.parse(problem), device)
    path = output or Path(f"{made.name}.h")
    path.write_text(made.text)
    click.echo(f"{path}: {made.variant} as {made.name}()")


@main.group()
def db() -> None:
    """The database of measurements."""


@db.command("import")
@click.argument("file", type=click.Path(path_type=Path))
@_mistakes_are_messages
def import_file(file: Path) -> None:
    """Record the measurements of FILE, as a kit or `cache/` writes them. What is not sound is counted and left out."""
    from elsa_tune.winners import Database, import_lines

    with Database.for_writing() as database:
        found = import_lines(file, database)
    click.echo(f"{found.taken} measurements are recorded")
    for reason, count in sorted(found.refused.items()):
        click.echo(f"left out {count}: {reason}", err=True)
    sys.exit(0 if found.taken and not found.refused else EXIT_INCOMPLETE)


@main.command()
@_mistakes_are_messages
def doctor() -> None:
    """Devices, compilers, instruction sets, OpenMP, databases, versions; each lack with its remedy."""
    from elsa_tune import doctor as examination
    from elsa_tune import report

    report.print_findings(report.console(), examination.examine())


if __name__ == "__main__":
    main()
