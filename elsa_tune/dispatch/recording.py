"""What this process asks, recorded: torch answers everything, and at exit the file that ELSA_TUNE_RECORD names has a line for each problem."""

from __future__ import annotations

import atexit
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import suppress
from time import perf_counter

import torch

from elsa_tune.dispatch import ledger
from elsa_tune.traffic import Traffic

VARIABLE = "ELSA_TUNE_RECORD"

FILE = os.path.abspath(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else ""
"""Where lines are added; processes that this one starts add theirs."""

active = bool(FILE)
"""Whether this process records, for as long as it lives: then nothing is known of any kernel of ours."""


class _Process:
    """This process since it began or was forked: its random name, when that was, and what was written already."""

    def __init__(self) -> None:
        self.name, self.since = secrets.token_hex(8), perf_counter()
        self.told = {(one.problem, one.device): one for one in ledger.served()}

    def news(self) -> Iterator[ledger.Served]:
        """What was served since this was asked last."""
        for one in ledger.served():
            before = self.told.get((one.problem, one.device))
            self.told[one.problem, one.device] = one
            calls, seconds = (before.calls, before.seconds) if before else (0, 0.0)
            if one.calls > calls:
                yield one._replace(calls=one.calls - calls, seconds=one.seconds - seconds)


def _lines() -> Iterator[str]:
    wall = perf_counter() - _process.since
    for device, asked in ledger.asked_of_torch(_process.news()).items():
        for problem, calls, seconds in asked:
            yield Traffic(
                device=device, problem=problem, calls=calls, seconds=seconds, process=_process.name, wall=wall,
                torch=str(torch.__version__), threads=torch.get_num_threads(),
            ).line  # fmt: skip


_failed = False
"""Whether it could not be written, which was told."""


def write() -> None:
    """Add what was asked since this was called last to the file, at once. Never raises."""
    global _failed
    if _failed:
        return
    try:
        _append("".join(f"{line}\n" for line in _lines()).encode())
    except Exception as error:
        _failed = True
        with suppress(Exception):  # nobody may be there to be told
            print(
                f"elsa-tune: what this process asked is not recorded: {type(error).__name__}: {error}", file=sys.stderr
            )


def _append(text: bytes) -> None:
    file = os.open(FILE, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        if text and os.write(file, text) < len(text):
            raise OSError("the disk is full")
    finally:
        os.close(file)


def _after_fork() -> None:
    """What was asked before is the parent's."""
    global _process
    _process = _Process()


def _begin() -> None:
    from multiprocessing import util

    def finally_write(_: object = None) -> None:
        util.Finalize(None, write, exitpriority=0)

    write()  # a file without a line says that nothing was asked
    atexit.register(write)
    finally_write()
    util.register_after_fork(write, finally_write)  # children of multiprocessing forget theirs, and exit without atexit
    if sys.platform != "win32":
        os.register_at_fork(after_in_child=_after_fork)


if active:
    os.environ[VARIABLE] = FILE  # of processes that this one starts in other folders, too
    _process = _Process()
    _begin()
