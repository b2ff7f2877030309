"""Whether the machine was ours while something ran: threads that waited for a core, others that wanted one, stolen time."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

WAITED = 0.03
"""A sample is disturbed if one of this process's threads waited for a core for a larger share of it: a call ends with its slowest
thread, and many that each wait for an instant hold nobody up."""

WANTED = 0.3
"""A machine is busy if on average more than so many of its cores were wanted by a thread that could not run."""

STOLEN = 0.02
"""It is busy too if a hypervisor took a larger share of its cores' time."""

SWITCH_SECONDS = 1e-3
"""What an involuntary switch of threads is taken for, where nothing says how long they waited."""

if sys.platform == "win32":
    _TICK = 0.01
else:
    _TICK = 1.0 / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Heard:
    """What happened between two moments: seconds; the share of them that the own thread that waited most did; cores that
    somebody waited for, on average; the share of all cores' time that was stolen."""

    seconds: float
    waited: float
    wanted: float
    stolen: float

    @property
    def disturbed(self) -> bool:
        """Whether what this process did meanwhile was held up."""
        return self.waited > WAITED or self.stolen > STOLEN

    @property
    def busy(self) -> bool:
        """Whether others wanted the machine."""
        return self.wanted > WANTED or self.stolen > STOLEN


class _Counters(NamedTuple):
    """Now; and seconds, since some beginning, that each own thread waited, that cores were wanted, that cores were stolen."""

    seconds: float
    waited: list[float]
    wanted: float
    stolen: float


class Listener:
    """Reads the counters that this system has; what it lacks stays silent. A few microseconds a reading.

    Linux: pressure stall information, each own thread's time in the run queue, steal. Elsewhere: involuntary switches.
    """

    def __init__(self) -> None:
        self._cores = os.cpu_count() or 1
        self._files: list[int] = []
        self._pressure = self._open("/proc/pressure/cpu")
        self._stat = self._open("/proc/stat")
        self._threads: list[int] = []
        with suppress(OSError):
            tasks = [self._open(f"/proc/self/task/{task}/schedstat") for task in os.listdir("/proc/self/task")]
            self._threads = [file for file in tasks if file is not None]
        self._before = self._read()

    def _open(self, path: str) -> int | None:
        if sys.platform == "win32":
            return None
        try:
            file = os.open(path, os.O_RDONLY)
            os.pread(file, 1, 0)  # a kernel built without it may let it be opened, and no more
        except OSError:
            return None
        self._files.append(file)
        return file

    def _read(self) -> _Counters:
        waited = [_number(file, lambda text: int(text.split()[1]) * 1e-9) for file in self._threads]
        wanted = _number(self._pressure, lambda text: int(text.split(b"total=")[1].split()[0]) * 1e-6) * self._cores
        stolen = _number(self._stat, lambda text: int(text.split()[8]) * _TICK)
        return _Counters(time.perf_counter(), waited or [_switches() * SWITCH_SECONDS], wanted, stolen)

    def heard(self) -> Heard:
        """What happened since this was last asked."""
        before, now = self._before, self._read()
        self._before = now
        seconds = max(now.seconds - before.seconds, 1e-9)
        waited = max(x - y for x, y in zip(now.waited, before.waited, strict=True))
        stolen = max(
            0.0, now.stolen - before.stolen - _TICK
        )  # a tick of a coarse clock may have been taken long before
        return Heard(seconds, waited / seconds, (now.wanted - before.wanted) / seconds, stolen / seconds / self._cores)

    def close(self) -> None:
        """Close the files."""
        while self._files:
            os.close(self._files.pop())

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _number(file: int | None, read: Callable[[bytes], float]) -> float:
    if file is None or sys.platform == "win32":
        return 0.0
    try:
        return read(os.pread(file, 256, 0))
    except (OSError, IndexError, ValueError):  # the thread has ended, or the kernel says less than it might
        return 0.0


def _switches() -> int:
    if sys.platform == "win32":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
