"""The command line's part for devices that are elsewhere: kits, headers, kernels that are built for them."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from elsa_tune.shell import examples, manual, options
from elsa_tune.shell.completions import BOTH, PROBLEMS, TARGETS
from elsa_tune.shell.exits import EXIT_INCOMPLETE, mistakes_are_messages


@click.command(cls=manual.Command, epilog=examples.KIT)
@options.goal("--device", "A target: sm_62, cortex_a72, opencl, or a device's full spelling.")
@options.workload()
@options.problems()
@click.option("-o", "--output", default="kit", show_default=True, type=click.Path(path_type=Path), help="The folder.")
@mistakes_are_messages
def kit(device: str, workload: str, problems: tuple[str, ...], output: Path) -> None:
    """Write a folder that tunes where nothing is installed: kernels, a runner, a Makefile."""
    from elsa_tune.ship import kit as kits

    headers = kits.make(device, output, problems or None, workload)
    click.echo(f"{output}: {len(headers)} kernels for {device}; take it there and type make run")


@click.command(cls=manual.Command, epilog=examples.EXPORT)
@click.argument("problem", shell_complete=PROBLEMS)
@options.here("A device that is here, a target, or a full spelling.", BOTH)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The header; by default named for the family.")
@mistakes_are_messages
def export(problem: str, device: str, output: Path | None) -> None:
    """Write the best known kernel for PROBLEM on a device as one header with a plain C interface."""
    from elsa_tune import places
    from elsa_tune.problem import Problem
    from elsa_tune.ship import export as exports

    made = exports.export(Problem.parse(problem), device)
    path = output or Path(f"{made.name}.h")
    with places.written(path):
        places.replace(path, made.text.encode())
    click.echo(f"{path}: {made.variant} as {made.name}()")


@click.command("compile", cls=manual.Command, epilog=examples.COMPILE)
@options.goal("--for", "sm_90, gfx942: a device that need not be here.", TARGETS)
@options.workload()
@options.problems()
@options.budget()
@click.option("-o", "--output", default="ready", show_default=True, type=click.Path(path_type=Path), help="The folder.")
@mistakes_are_messages
def compile_for(device: str, workload: str, problems: tuple[str, ...], budget: float, output: Path) -> None:
    """Build the most promising kernels for a device that is not here, and a manifest of what is ready to be timed there."""
    from elsa_tune.shell import screen
    from elsa_tune.tuning import offline

    console = screen.console()
    with console.status("compiling") as status:
        found = offline.rank(device, problems or None, workload=workload, budget=budget, watch=status.update)
    count = offline.hand_over(found, device, output)
    click.echo(f"{output}: {count} kernels for {device}. There: ELSA_TUNE_KERNELS={output / 'kernels'}, and")
    click.echo(f"elsa-tune db import {output / offline.MANIFEST}; elsa-tune then times these first")
    sys.exit(0 if count else EXIT_INCOMPLETE)
