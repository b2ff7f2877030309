"""The command line's part for programs: `elsa-tune run -- COMMAND`, and tuning from what programs asked."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from elsa_tune.errors import BadWorkload, ElsaTuneError
from elsa_tune.shell import cli_report, examples, manual, options
from elsa_tune.shell.exits import EXIT_INCOMPLETE, EXIT_INTERRUPTED, mistakes_are_messages

if TYPE_CHECKING:
    from elsa_tune.traffic import Traffic

PASSED_ON, OF_TERMINALS = ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"), ("SIGINT", "SIGQUIT")
"""Signals that who sends them to this process means for the program, and those that a terminal sends to both."""

BOTH_SECONDS = 1.0
"""After which one of those is passed on where no terminal sent it: who ended a group of processes has reached the program by then."""


@click.command(
    cls=manual.Command,
    context_settings={"allow_interspersed_args": False},
    epilog=examples.RUN,
)
@options.here("As for tune; auto: those that the program used.")
@options.budget("Wall seconds of tuning.")
@options.effort
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Add what was recorded to this file too, JSON lines."
)
@options.watch
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@mistakes_are_messages
def run(
    device: str, budget: float, effort: str, output: Path | None, port: int | None, command: tuple[str, ...]
) -> None:  # fmt: skip
    """Run COMMAND as it is, record what it asks of torch's attention, and tune that.

    Write it as in: elsa-tune run -- python program.py. What was recorded is kept in the database before anything is tuned.
    What the program will gain is said on stderr. Exit status as of tune, and 1 where the program failed.
    """
    from elsa_tune import places
    from elsa_tune.remember.database import Database
    from elsa_tune.shell import screen

    if shutil.which(command[0]) is None:
        raise ElsaTuneError(
            f"{command[0]}: No such file, or none that can be executed; name a program, as in elsa-tune run -- python program.py"
        )
    with Database.for_writing():  # what cannot be kept is better told before
        _add(b"", output)
        if output is not None:
            _check(output)
    _prepare()
    with tempfile.TemporaryDirectory(prefix="traffic-", dir=places.home()) as folder:
        file = Path(folder) / "traffic.jsonl"
        ended = _run(command, file)
        traffic = _kept(file, output, ended)
    console = screen.console(stderr=True)
    console.print(f"{shlex.join(command)}: {ended}", highlight=False, markup=False, soft_wrap=True)
    source = output or places.database()
    status = tune_for(
        console,
        traffic,
        str(source),
        program=shlex.join(command),
        device=device,
        budget=budget,
        effort=effort,
        wall=ended.wall,
        port=port,
    )
    sys.exit(status or (EXIT_INCOMPLETE if ended.status else 0))


@dataclass(frozen=True, slots=True)
class _Ended:
    """How a program ended: its exit status, negative for a signal, and the wall seconds that it took."""

    status: int
    wall: float

    def __str__(self) -> str:
        told = f"ended by {_name(-self.status)}" if self.status < 0 else f"exit status {self.status}"
        return f"{told}, {self.wall:.1f} s"


def _name(number: int) -> str:
    """Of a signal; those of real time have none."""
    with suppress(ValueError):
        return signal.Signals(number).name
    return f"signal {number}"


def _prepare() -> None:
    """Build what counts calls without Python now: its seconds are not the program's."""
    from elsa_tune.generate import backends

    with suppress(Exception):  # without a compiler Python counts them
        for name in backends.candidates():
            backends.get(name).interposer()


def _run(command: Sequence[str], file: Path) -> _Ended:
    """Run a program that records into a file, on our own stdin, stdout and stderr. Raises ElsaTuneError."""
    begin = time.monotonic()
    try:
        program = subprocess.Popen(command, env={**os.environ, "ELSA_TUNE_RECORD": str(file)})
    except OSError as error:
        raise ElsaTuneError(
            f"{command[0]}: {error.strerror}; name a program, as in elsa-tune run -- python program.py"
        ) from error
    with _passed_on(program):
        status = _waited_for(program)
    return _Ended(status, time.monotonic() - begin)


LOOK_SECONDS = 0.5


def _waited_for(program: subprocess.Popen[bytes]) -> int:
    """The status that a program ends with. A signal that comes as a wait begins does not end it: so waits are short."""
    while True:
        with suppress(subprocess.TimeoutExpired):
            return program.wait(LOOK_SECONDS)


@contextmanager
def _passed_on(program: subprocess.Popen[bytes]) -> Iterator[None]:
    """Inside, signals are the program's."""

    def pass_on(number: int, frame: object) -> None:
        if signal.Signals(number).name in PASSED_ON:
            program.send_signal(number)
        elif not _is_at_a_terminal():
            later = threading.Timer(BOTH_SECONDS, program.send_signal, [number])
            later.daemon = True
            later.start()

    numbers = [getattr(signal, name) for name in (*OF_TERMINALS, *PASSED_ON) if hasattr(signal, name)]
    before = {number: signal.signal(number, pass_on) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_at_a_terminal() -> bool:
    """Whether a terminal sends its signals to this process, and so to the program too."""
    if sys.platform == "win32":
        return False
    with suppress(OSError):
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY)
        try:
            return os.tcgetpgrp(terminal) == os.getpgrp()
        finally:
            os.close(terminal)
    return False


def _kept(file: Path, output: Path | None, ended: _Ended) -> list[Traffic]:
    """What a program recorded, kept in the database, and in a file where one is named. Raises ElsaTuneError where that is nothing."""
    from elsa_tune import places
    from elsa_tune.remember import traffic as recorded
    from elsa_tune.remember.database import Database

    if not file.exists():
        raise ElsaTuneError(
            f"nothing was recorded ({ended}): no Python of the command imported torch where elsa-tune is installed; install it there with pip,"
            " and name a program that does"
        )
    _add(file.read_bytes(), output)
    try:
        found = recorded.read(file)
    except BadWorkload as error:  # a full disk, a process that was killed while it wrote
        kept = output or places.home() / "traffic-unread.jsonl"
        _add(file.read_bytes(), None if output else kept)
        raise BadWorkload(str(error).replace(str(file), str(kept))) from None
    if not found and ended.status < 0:
        raise ElsaTuneError(
            f"nothing was recorded: the program was {ended}, before it wrote down what it asked; let it end by itself"
        )
    if not found:
        raise ElsaTuneError(
            f"nothing was recorded ({ended}): the program asked no attention of torch's fused CPU operator (torch 2.9 and later), nor of"
            " elsa_tune.attention; see docs/how-to/tune-from-traffic.md"
        )
    with Database.for_writing() as database:
        database.keep_traffic(found)
    return found


def recorded(path: Path) -> list[Traffic]:
    """The traffic of a file or a database. Raises BadWorkload, also where there is none."""
    from elsa_tune.remember import traffic

    found = traffic.read(path)
    if not found:
        raise BadWorkload(f"traffic {path} is empty; elsa-tune run -- python program.py records some")
    return found


def _check(output: Path) -> None:
    """Raise BadWorkload where a file that lines are to be added to holds something else."""
    from elsa_tune.remember import traffic

    with output.open("rb") as file:
        is_database = file.read(16).startswith(b"SQLite format 3")
    if is_database:
        raise BadWorkload(f"{output} is a database, to which no lines can be added; name another file with -o")
    traffic.read(output)


def _add(lines: bytes, output: Path | None) -> None:
    """Add lines to a file, if one is named. Raises ElsaTuneError."""
    if output is None:
        return
    try:
        with output.open("ab") as file:
            file.write(lines)
    except OSError as error:
        raise ElsaTuneError(f"{output}: {error.strerror}; name a file that can be written with -o") from error


def tune_for(
    console: Any, traffic: Sequence[Traffic], source: str, *, program: str = "python your_program.py", wall: float = 0.0, as_json: bool = False,
    device: str = "auto", port: int | None = None, **options: Any,
) -> int:  # fmt: skip
    """Say what was asked, tune for it, and print what that gains ``program``; the exit status. ``source`` is where the traffic is kept."""
    from elsa_tune.shell import for_programs, screen
    from elsa_tune.tuning import from_traffic

    for here in from_traffic.devices(device, traffic):
        screen.print_traffic(console, traffic, here, wall)
    try:
        with cli_report.watching(console, port) as watch:
            report, forecasts = from_traffic.tune(traffic, device=device, wall=wall, watch=watch, **options)
    except KeyboardInterrupt:
        console.print(
            f"stopped; what was recorded and measured is kept, and this goes on from it: elsa-tune --from-traffic {shlex.quote(source)}",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
        return EXIT_INTERRUPTED
    if as_json:
        click.echo(for_programs.report(report, forecasts))
    else:
        for one in forecasts:
            screen.print_forecast(console, one)
        screen.print_report(console, report, program)
    return 0 if report.complete else EXIT_INCOMPLETE
