"""The command line's part for databases: `elsa-tune db ...`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from elsa_tune.errors import ElsaTuneError
from elsa_tune.shell import examples, manual, options
from elsa_tune.shell.exits import EXIT_INCOMPLETE, mistakes_are_messages

if TYPE_CHECKING:
    from elsa_tune.remember.foreign import Imported


@click.group(cls=manual.Group, epilog=examples.DB)
def db() -> None:
    """The database of measurements: take it elsewhere, bring others' here, keep it whole."""


@db.command("export", epilog=examples.DB_EXPORT)
@options.recorded
@options.one_problem
@click.option("--sign", "key", type=click.Path(path_type=Path), help="Sign with this OpenSSH key: FILE.sig.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="The file, .jsonl or .jsonl.gz; by default printed."
)
@mistakes_are_messages
def export_file(device: str | None, problem: str | None, key: Path | None, output: Path | None) -> None:
    """Write measurements as sorted JSON lines: equal content is equal bytes."""
    from elsa_tune import device as devices
    from elsa_tune import places
    from elsa_tune.problem import Problem
    from elsa_tune.remember import lines, signatures
    from elsa_tune.remember.database import Database

    wanted = {"problem": str(Problem.parse(problem))} if problem else {}
    with Database.for_reading(places.database()) as database:
        recorded = {one for one, _ in database.counts()}
        meant = [{"device": one} for one in devices.among(device, recorded)] if device else [{}]
        found = [m for one in meant for m in database.measurements(None, **one, **wanted)]
    if database.trouble:
        click.echo(f"elsa-tune: {database.trouble}", err=True)
    if problem and not found:
        raise ElsaTuneError(f"nothing was measured here of {problem}; elsa-tune db export prints everything")
    if output is None:
        for line in lines.sorted_lines(found):
            click.echo(line)
        return
    click.echo(f"{output}: {lines.write(found, output)} measurements")
    if key is not None:
        click.echo(f"{signatures.sign(output, key)}: signed")


@db.command("import", epilog=examples.DB_IMPORT)
@click.argument("sources", nargs=-1, required=True, metavar="FILE|URL...")
@mistakes_are_messages
def import_files(sources: tuple[str, ...]) -> None:
    """Take measurements of others, as candidates. What is not sound is counted and left out."""
    from elsa_tune.remember import foreign
    from elsa_tune.remember.database import Database

    complete = True
    with Database.for_writing() as database:
        for source in sources:
            found = foreign.import_from(source, database)
            click.echo(f"{source}: {found.sound} measurements, {found.new} of them new")
            complete &= _say_what_was_refused(found) and found.sound > 0
    sys.exit(0 if complete else EXIT_INCOMPLETE)


def _say_what_was_refused(found: Imported) -> bool:
    for reason, count in sorted(found.refused.items()):
        click.echo(f"left out {count}: {reason}", err=True)
    return not found.refused


@db.command(epilog=examples.DB_MERGE)
@click.argument("sources", nargs=-1, required=True, metavar="FILE|URL...")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The file, .jsonl or .jsonl.gz.")
@mistakes_are_messages
def merge(sources: tuple[str, ...], output: Path) -> None:
    """Write what any of the sources holds, each measurement once; their order changes nothing."""
    from elsa_tune.remember import foreign

    found = foreign.merge(sources, output)
    click.echo(f"{output}: {found.new} measurements, of {found.sound} read")
    sys.exit(0 if _say_what_was_refused(found) else EXIT_INCOMPLETE)


@db.command(epilog=examples.DB_DIFF)
@click.argument("first")
@click.argument("second")
@mistakes_are_messages
def diff(first: str, second: str) -> None:
    """Compare two files: what only one of them holds, and where they name other winners. Exit 1 if they differ."""
    from elsa_tune.remember import foreign
    from elsa_tune.shell import screen

    found = foreign.diff(first, second)
    screen.print_difference(screen.console(), found)
    sys.exit(EXIT_INCOMPLETE if found.only_first or found.only_second else 0)


@db.command(epilog=examples.DB_VERIFY)
@mistakes_are_messages
def verify() -> None:
    """Compare every measurement with its digest. What is damaged is set aside, and reported.

    Of a damaged file what is sound is taken over; said is how much that is, and which pages of which tables are not.
    """
    from elsa_tune import places
    from elsa_tune.remember import repair

    health = repair.verify()
    click.echo(f"{health.sound} measurements are what was recorded")
    for path in health.aside:
        click.echo(f"set aside: {path}")
    for flaw in health.flaws:
        click.echo(f"damaged: {flaw}", err=True)
    if health.damaged:
        click.echo(f"damaged: {health.damaged} measurements that are not what was recorded", err=True)
    if health.damaged or not health.whole:
        click.echo(
            f"{places.database()} is a new file with what is whole; the rest is lost unless it was exported: "
            "elsa-tune db import FILE, or tune again",
            err=True,
        )
        sys.exit(EXIT_INCOMPLETE)


@db.command(epilog=examples.DB_RACE)
@options.here()
@options.budget()
@mistakes_are_messages
def race(device: str, budget: float) -> None:
    """Time what was imported for this device, or is disputed, against this machine's own best."""
    from elsa_tune.shell import progress, screen
    from elsa_tune.tuning import tune as tuning

    console = screen.console()
    with progress.LiveProgress(console) as watch:
        found = tuning.settle(device, budget=budget, watch=watch)
    if found.outcomes:
        screen.print_report(console, found)
    else:
        click.echo("nothing imported is left to race")


@db.command(epilog=examples.DB_GC)
@mistakes_are_messages
def gc() -> None:
    """Give back space: kernels that no measurement worth keeping names, and what the database no longer uses. No measurement goes."""
    from elsa_tune import places
    from elsa_tune.generate import kernel_cache
    from elsa_tune.remember.database import Database

    path = places.database()
    with Database.for_writing(path) as database:
        before = path.stat().st_size
        kept = {m.digest for m in database if m.stage == "final" or m.status == "candidate"}
        database.pack()
    removed = kernel_cache.remove_all_but(kept)
    click.echo(f"{removed} kernels removed; the database takes {path.stat().st_size >> 10} KiB, before {before >> 10}")


@db.command(epilog=examples.DB_INFO)
@mistakes_are_messages
def info() -> None:
    """Say what each layer holds. The team's databases that have changed are read again first."""
    from elsa_tune.remember import layers

    for trouble in layers.refresh_all():
        click.echo(f"elsa-tune: {trouble}", err=True)
    for layer in layers.layers():
        for line in layer.inventory():
            click.echo(line)


@db.command(epilog=examples.DB_DOCTOR)
@mistakes_are_messages
def doctor() -> None:
    """What is wrong with databases and the kernel cache here, each lack with its remedy."""
    from elsa_tune.device import host_cpu
    from elsa_tune.shell import doctor as examination
    from elsa_tune.shell import screen

    screen.print_findings(screen.console(), examination.examine_databases(host_cpu()))
