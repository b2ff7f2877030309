"""The command line: a thin shell over the library."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import click
from click.shell_completion import get_completion_class

from elsa_tune.errors import ElsaTuneError
from elsa_tune.shell import cli_db, cli_report, cli_run, cli_ship, examples, manual, options
from elsa_tune.shell.completions import BOTH, FAMILIES, PROBLEMS, VARIANTS
from elsa_tune.shell.exits import EXIT_INCOMPLETE, EXIT_INTERRUPTED, mistakes_are_messages


def _say_versions(context: click.Context, parameter: click.Parameter, asked: bool) -> None:
    """Print the versions of what matters, and exit."""
    if asked and not context.resilient_parsing:
        from elsa_tune.shell import versions

        for name, version in versions.known():
            click.echo(f"{name} {version}")
        context.exit()


@click.group(
    cls=manual.MainGroup,
    default="tune",
    default_if_no_args=True,
    epilog=examples.MAIN,
)
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_say_versions,
    help="Print the versions of what matters, compilers included.",
)  # fmt: skip
def main() -> None:
    """Generate, tune, remember and dispatch exact attention kernels. Without a command: tune."""


@main.command(epilog=examples.TUNE)
@options.here(
    "auto, cpu, cuda, hip, opencl, or a device's full spelling; with --offline a target such as sm_80 or gfx942.", BOTH
)
@options.workload("Which problems to tune.")
@options.problems("Tune this instead; repeatable.")
@click.option(
    "--from-traffic",
    type=click.Path(path_type=Path),
    metavar="FILE|DATABASE",
    help="Tune what programs asked instead, as elsa-tune run recorded it.",
)
@options.budget("Wall seconds, compiling included.")
@options.effort
@click.option("--seed", default=0, show_default=True, help="Of the search.")
@click.option("--sampler", default="local", show_default=True, help="Who proposes variants: local, tpe or random.")
@click.option("--exhaustive", is_flag=True, help="Walk the whole space instead of searching it.")
@click.option(
    "--storage", default="", metavar="URL",
    help="Tune together with every machine that names it: postgresql+psycopg://..., or journal:FILE in a shared folder; sqlite:///FILE here.",
)  # fmt: skip
@click.option("--offline", is_flag=True, help="Rank variants for a GPU that is not here: compiled, not measured.")
@options.watch
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@mistakes_are_messages
def tune(device: str, workload: str, problems: tuple[str, ...], from_traffic: Path | None, budget: float, effort: str,
         seed: int, sampler: str, exhaustive: bool, storage: str, offline: bool, port: int | None, as_json: bool) -> None:  # fmt: skip
    """Find the fastest exact kernel for each problem on each device.

    Stop it whenever you like: every measurement is recorded as it is made, and the next run goes on from there. It ends within a tenth of
    its budget, or a few seconds where that is less than them, and names the problems for which it had no time to try 12 variants, and
    those that it could not settle because others used the machine.

    Exit status: 0 if every problem has a winner (torch's SDPA counts), 1 if not, 2 for a mistake, 130 when stopped.
    """
    from elsa_tune import workload as workloads
    from elsa_tune.device import detect
    from elsa_tune.shell import for_programs, screen
    from elsa_tune.tuning import tune as tuning

    console = screen.console(stderr=as_json)
    if from_traffic is not None:
        if problems or offline or workload != "default":
            raise ElsaTuneError(
                "--from-traffic says which problems to tune; leave out --problem, --workload and --offline"
            )
        traffic = cli_run.recorded(from_traffic)
        sys.exit(cli_run.tune_for(
            console, traffic, str(from_traffic), as_json=as_json, device=device, budget=budget, effort=effort, seed=seed, sampler=sampler,
            exhaustive=exhaustive, storage=storage, port=port,
        ))  # fmt: skip
    if offline:
        if port is not None:
            raise ElsaTuneError("--offline measures nothing that a report could show; leave out --watch")
        _rank(console, device, workload, problems, budget, seed, as_json)
    for here in detect(device):
        count = len(problems) or len(workloads.read(workload, here))
        kinds = f"{here.memory >> 30} GiB" if here.kind != "cpu" else ", ".join(here.isas)
        console.print(
            f"{here}  {here.name}, {here.cores} cores, {kinds}: {count} problem{'s' * (count != 1)}", highlight=False
        )
    console.print(f"tuning for up to {budget:.0f} s, effort {effort}", highlight=False)
    try:
        with cli_report.watching(console, port) as watch:
            result = tuning.tune(
                problems or None, workload=workload, device=device, budget=budget, effort=effort, seed=seed,
                sampler=sampler, exhaustive=exhaustive, storage=storage, watch=watch,
            )  # fmt: skip
    except KeyboardInterrupt:
        console.print("stopped; everything measured so far is kept, and the next run goes on from it", highlight=False)
        sys.exit(EXIT_INTERRUPTED)
    if as_json:
        click.echo(for_programs.report(result))
    else:
        screen.print_report(console, result)
    sys.exit(0 if result.complete else EXIT_INCOMPLETE)


def _rank(
    console: Any, device: str, workload: str, problems: tuple[str, ...], budget: float, seed: int, as_json: bool
) -> NoReturn:
    """Rank for a target that is not here, print the shortlists, and exit: 0 if every problem has candidates."""
    from elsa_tune.shell import for_programs, screen
    from elsa_tune.tuning import offline

    console.print(f"ranking for {device} for up to {budget:.0f} s; nothing is measured", highlight=False)
    with console.status("compiling") as status:
        found = offline.rank(
            device, problems or None, workload=workload, budget=budget, seed=seed, watch=status.update
        )  # fmt: skip
    if as_json:
        click.echo(for_programs.ranked(found))
    else:
        screen.print_rankings(console, found, offline.target(device))
    sys.exit(0 if all(ranking.candidates for ranking in found) else EXIT_INCOMPLETE)


@main.command(epilog=examples.WINNERS)
@options.recorded
@click.option("--family", default=None, shell_complete=FAMILIES, help="Only this family, like fp32.d64.causal.")
@options.one_problem
@click.option("--json", "as_json", is_flag=True, help="Print full measurements as JSON.")
@mistakes_are_messages
def winners(device: str | None, family: str | None, problem: str | None, as_json: bool) -> None:
    """List the recorded winners of every layer, and from how many finals each is."""
    from elsa_tune import device as devices
    from elsa_tune.remember import layers
    from elsa_tune.shell import for_programs, screen

    known = layers.layers()
    recorded = {one for layer in known for one, _ in layer.finals_of()}
    meant = devices.among(device, recorded) if device and recorded else []
    wanted = {k: v for k, v in (("family", family), ("problem", problem)) if v}
    found = [m for layer in known for m in layer.winners(meant, **wanted)]
    for trouble in layers.troubles(known):
        click.echo(f"elsa-tune: {trouble}", err=True)
    if as_json:
        click.echo(json.dumps([for_programs.winner(m) for m in found], indent=2))
    elif found:
        screen.print_winners(screen.console(), found)
    else:
        click.echo("no winner is recorded; run elsa-tune")


@main.command(epilog=examples.SHOW)
@click.argument("variant", shell_complete=VARIANTS)
@click.argument("problem", default="fp32.d64", shell_complete=FAMILIES)
@mistakes_are_messages
def show(variant: str, problem: str) -> None:
    """Print the source of VARIANT for PROBLEM (a family is enough) and its compile command. Nothing is run.

    A family that the backend has no kernels of is refused with the reason.
    """
    from elsa_tune import space
    from elsa_tune.errors import KernelMissing
    from elsa_tune.generate import backends, lawful
    from elsa_tune.problem import Problem

    chosen, wanted = space.parse(variant), Problem.parse(problem)
    backend = backends.get(chosen.backend)
    if backends.role(str(chosen)) == "rival":
        click.echo(f"{chosen} is torch's own kernel; nothing is generated")
        return
    if reason := lawful.unserved(wanted, lawful.everywhere(), [chosen.backend]):
        raise KernelMissing(
            f"{chosen.backend} has no kernels of {wanted.family}: {reason}; elsa-tune explain {wanted} says who serves it"
        )
    source = backend.source(chosen, wanted)
    assert source is not None
    click.echo(source.text)
    if command := backend.command(chosen):
        click.echo(f"// {shlex.join(command)} kernel.{source.suffix} -o kernel.so")


@main.command(epilog=examples.EXPLAIN)
@click.argument("problem", shell_complete=PROBLEMS)
@options.here()
@mistakes_are_messages
def explain(problem: str, device: str) -> None:
    """Say who serves PROBLEM and why, what was tried, what was rejected, and which axes mattered."""
    from elsa_tune.device import detect
    from elsa_tune.dispatch import serving
    from elsa_tune.generate import backends
    from elsa_tune.problem import Problem
    from elsa_tune.remember.layers import layers
    from elsa_tune.shell import screen
    from elsa_tune.space import Space
    from elsa_tune.tuning import search

    wanted = Problem.parse(problem)
    for here in detect(device):
        (own,) = (layer for layer in layers() if layer.name == "own")
        tried = own.measurements(device=str(here), problem=str(wanted))
        spaces = [Space.read(name) for name in backends.candidates()]
        mattered = next(filter(None, (search.importances(s, tried) for s in spaces)), {})
        screen.print_explanation(screen.console(), wanted, serving.explain(wanted, here), tried, mattered)


main.add_command(cli_db.db)
main.add_command(cli_run.run)
main.add_command(cli_report.report)
for command in (cli_ship.kit, cli_ship.export, cli_ship.compile_for):
    main.add_command(command)


@main.command(epilog=examples.FLEET)
@click.option("--storage", required=True, metavar="URL", help="What the fleet shares, as for tune.")
@mistakes_are_messages
def fleet(storage: str) -> None:
    """Say who tunes together: worker, device, trials, trials a minute, last sign of life."""
    from elsa_tune.shell import screen
    from elsa_tune.tuning import fleet as fleets

    screen.print_members(screen.console(), fleets.members(storage))


@main.command(epilog=examples.DOCTOR)
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
@mistakes_are_messages
def doctor(as_json: bool) -> None:
    """Devices, compilers, instruction sets, OpenMP, a launch on each GPU, databases, calls handed over to torch, versions; each lack
    with its remedy."""
    from elsa_tune.shell import doctor as examination
    from elsa_tune.shell import screen

    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in examination.examine()], indent=2))
    else:
        screen.print_findings(screen.console(), examination.examine())


@main.command(epilog=examples.COMPLETION)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the script that completes commands, devices, problems and variants in SHELL.

    Read it when a shell starts: eval "$(elsa-tune completion bash)" in ~/.bashrc, the same with zsh in ~/.zshrc, and
    elsa-tune completion fish | source in ~/.config/fish/config.fish.
    """
    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(main, {}, "elsa-tune", "_ELSA_TUNE_COMPLETE").source())


if __name__ == "__main__":
    main()
