"""Ctrl-C, and a process manager's way of saying it: KeyboardInterrupt wherever the program is, until it has come to its end."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from contextlib import suppress
from types import FrameType
from typing import Any

from elsa_tune.shell.exits import EXIT_INTERRUPTED

SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")
"""What asks a program to end. One that is ignored when it starts, as nohup and shells do in the background, stays ignored."""

AGAIN = 0.05
"""Seconds after which a signal comes again whose exception was lost."""

PATIENCE = 5.0
"""Seconds for threads and processes to end once a command was stopped."""


class Stopping:
    """Inside, signals are noted, and are KeyboardInterrupt; while Python still imports what a command needs, the end at once."""

    def __init__(self) -> None:
        self.number = 0
        """Of the signal that came; 0 if none did."""
        self.is_begun = False
        """Whether a command has begun: before that nothing can be lost."""
        self._before: dict[int, Any] = {}
        self._status = 0
        self._unraisable, self._in_thread = sys.unraisablehook, threading.excepthook

    def __enter__(self) -> Stopping:
        for name in SIGNALS:
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) not in (signal.SIG_IGN, None):
                with suppress(ValueError):  # not the main thread: who called it handles signals
                    self._before[number] = signal.signal(number, self._arrive)
        sys.unraisablehook, threading.excepthook = self._lost, self._of_thread
        atexit.register(self._end)  # before anybody's: it comes last
        return self

    def __exit__(self, *exception: object) -> None:
        if self.number:  # what is still to end does so in silence
            return
        atexit.unregister(self._end)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        sys.unraisablehook, threading.excepthook = self._unraisable, self._in_thread

    def status(self, status: int) -> int:
        """What to exit with: a command that was stopped says by which signal. Signals that come later change nothing, and the process is
        gone within PATIENCE, whoever it still waits for."""
        if not self.number:
            return status
        for number in self._before:
            signal.signal(number, signal.SIG_IGN)
        self._status = 128 + self.number if status == EXIT_INTERRUPTED else status
        watch = threading.Timer(PATIENCE, self._end)
        watch.daemon = True
        watch.start()
        return self._status

    def _end(self) -> None:
        """At once, by this status: Python's own end would be by SIGINT where a text that it executed was interrupted."""
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(self._status)

    def _arrive(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        if not self.is_begun:
            os.write(2, b"elsa-tune: stopped before it began\n")
            os._exit(128 + number)
        raise KeyboardInterrupt

    def _lost(self, found: Any) -> None:
        """What was raised where nobody can catch it: a signal that came there comes again, the rest is told as Python does."""
        if found.exc_type is KeyboardInterrupt:
            again = threading.Timer(
                AGAIN, _interrupt, [self.number or signal.SIGINT]
            )  # not from here: this would be lost as well
            again.daemon = True
            again.start()
        elif not self.number:
            self._unraisable(found)

    def _of_thread(self, found: Any) -> None:
        """Threads that end because the program does have nothing to say."""
        if not self.number:
            self._in_thread(found)


def _interrupt(number: int) -> None:
    """The signal, to the thread that handles it."""
    if sys.platform == "win32":
        signal.raise_signal(number)
    else:
        signal.pthread_kill(threading.main_thread().ident or 0, number)
