"""Commands in processes of their own, that one program forks once it has imported what they need: closed streams, limits, signals, terminals.

As a program, it reads a Run a line from stdin as JSON, and prints how that ended.
"""

from __future__ import annotations

import fcntl
import json
import os
import pty
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

LONGEST = 60.0
"""Seconds after which a command hangs."""


@dataclass(frozen=True)
class Run:
    """A command: what Python executes before it, its limits by resource's names, and what its streams are: files, or named otherwise."""

    arguments: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    before: str = ""
    limits: Mapping[str, int] = field(default_factory=dict)
    stdout: str = "file"  # or closed, full, gone (a pipe that nobody reads), terminal
    columns: int = 0  # of the terminal
    signals: Sequence[
        tuple[float, str, bool]
    ] = ()  # seconds after the one before, its name, whether to the whole group


@dataclass(frozen=True)
class Ended:
    """How it ended, and processes that it left behind."""

    status: int
    out: str
    err: str
    left: list[str]


class Stage:
    """The program."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __call__(self, run: Run) -> Ended:
        """Run a command to its end."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(asdict(run)), file=self._process.stdin, flush=True)
        return Ended(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def _serve(run: Run) -> Ended:
    with tempfile.TemporaryFile("w+b") as out, tempfile.TemporaryFile("w+b") as err:
        leader, follower = pty.openpty() if run.stdout == "terminal" else (-1, -1)
        child = os.fork()
        if not child:
            _perform(run, out.fileno(), err.fileno(), follower)
        shown = b""
        if leader >= 0:
            os.close(follower)
            reader = _Reader(leader)
        for seconds, name, group in run.signals:
            time.sleep(seconds)
            with suppress(ProcessLookupError):
                (os.killpg if group else os.kill)(child, getattr(signal, name))
        watch = threading.Timer(LONGEST, os.killpg, [child, signal.SIGKILL])
        watch.start()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        watch.cancel()
        if leader >= 0:
            shown = reader.end()
        texts = [shown] if leader >= 0 else []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read())
        first, *rest = (text.decode(errors="replace") for text in texts)
        return Ended(status, first, "".join(rest), _left_of(child))


class _Reader(threading.Thread):
    """Takes what a terminal shows."""

    def __init__(self, leader: int) -> None:
        super().__init__(daemon=True)
        self._leader, self._shown = leader, b""
        self.start()

    def run(self) -> None:
        with suppress(OSError):  # what Linux says where the last process has closed it
            while portion := os.read(self._leader, 1 << 16):
                self._shown += portion

    def end(self) -> bytes:
        self.join(5)
        os.close(self._leader)
        return self._shown


def _perform(run: Run, out: int, err: int, follower: int) -> None:
    """Be the command. Never returns."""
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(err, 2)
    if run.stdout == "terminal":
        fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, run.columns, 0, 0))
        os.dup2(follower, 1)
    elif run.stdout == "full":
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
    elif run.stdout == "gone":
        gone, pipe = os.pipe()
        os.close(gone)
        os.dup2(pipe, 1)
    else:
        os.dup2(out, 1)
    os.environ.update(run.environment)
    try:
        if run.stdout == "closed":
            sys.stdout = None  # type: ignore[assignment]
            os.close(1)
        exec(run.before, {"__name__": "before"})
        for name, most in run.limits.items():
            resource.setrlimit(getattr(resource, name), (most, most))
        from elsa_tune.shell import entry

        entry.main(list(run.arguments))
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
        import atexit

        atexit._run_exitfuncs()
        os._exit(status)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(99)


def _left_of(session: int) -> list[str]:
    """Processes of a session that do not end within a few seconds."""
    deadline = time.monotonic() + 5
    while (left := _alive(session)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def _alive(session: int) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, _, of = path.read_text().rpartition(")")[2].split()[:4]
            if int(of) == session and state != "Z":
                found.append((path.parent / "cmdline").read_text().replace("\0", " "))
    return found


def main() -> None:
    """Serve until stdin ends."""
    import optuna  # noqa: F401
    import torch  # noqa: F401

    from elsa_tune.shell import cli, screen  # noqa: F401
    from elsa_tune.tuning import tune  # noqa: F401

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    while line := sys.stdin.readline():
        answer = _serve(Run(**json.loads(line)))
        print(json.dumps(asdict(answer)), file=answers, flush=True)


if __name__ == "__main__":
    main()
