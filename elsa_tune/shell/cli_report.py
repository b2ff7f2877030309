"""The command line's part for who would rather look: `elsa-tune report`, and the same page while it is tuned."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from elsa_tune.shell import examples, manual, options
from elsa_tune.shell.exits import mistakes_are_messages

if TYPE_CHECKING:
    from elsa_tune.tuning.task import Progress


@click.command(cls=manual.Command, epilog=examples.REPORT)
@click.argument("sources", nargs=-1, metavar="[LAYER|FILE|URL]...")
@options.recorded
@options.problems("Only this problem; repeatable.")
@click.option(
    "-o", "--output", default="report.html", show_default=True, type=click.Path(path_type=Path, dir_okay=False),
    help="The page.",
)  # fmt: skip
@mistakes_are_messages
def report(sources: tuple[str, ...], device: str | None, problems: tuple[str, ...], output: Path) -> None:
    """Write what was measured as one page: winners, how each search went, rooflines, what was rejected and why, generated code.

    Of one's own measurements, or of layers (own, imported, team, shipped), databases and files of measurements; of several, and of several
    devices, side by side.
    """
    from elsa_tune.shell import report as reports

    count = reports.write(output, sources, device, problems)
    click.echo(
        err=not output.is_file(),
        message=f"{output}: {count} problem{'s' * (count > 1)}; open it in a browser, it needs no network",
    )


@contextmanager
def watching(console: Any, port: int | None) -> Iterator[Callable[[Progress], None]]:
    """Who is told of a run: the terminal, and browsers of this machine where a port is given (0: any that is free). Raises ElsaTuneError."""
    from elsa_tune.shell import progress

    with ExitStack() as stack:
        told: list[Callable[[Progress], None]] = []
        if port is not None:
            from elsa_tune.shell.report.live import Live

            live = stack.enter_context(Live(port))
            console.print(f"watch it at {live.address} while it tunes", highlight=False)
            told.append(live)
        told.append(stack.enter_context(progress.LiveProgress(console)))

        def watch(so_far: Progress) -> None:
            for one in told:
                one(so_far)

        yield watch
