"""A disposable process: a job that hangs, crashes or eats memory is killed with it, and the caller learns why."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from types import TracebackType
from typing import Any, TypeVar

from elsa_tune.device import host_cpu
from elsa_tune.errors import NoRoom
from elsa_tune.generate import backends

T = TypeVar("T")


class WorkerFailed(Exception):
    """A job did not come back: ``status`` is failed or timeout."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


class GivenUp(WorkerFailed):
    """A job was ended together with others of its worker's processes, for a fault of theirs: it says nothing of the job."""


def _start_worker(memory: int) -> None:
    """First thing in a new worker: its parent, the fork server, loads code and never computes."""
    threading.Thread(target=_end_with_parent, name="elsa-tune-parent", daemon=True).start()
    for name in backends.names():
        backends.get(name).begin_worker()
    if sys.platform == "win32":
        return  # a system without these limits still has the time-out
    import resource

    with suppress(ValueError, OSError):
        if memory:
            resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _end_with_parent() -> None:
    """End this process as soon as the one that tunes is gone, however that ended: the fork server would keep a worker at work."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Processes started meanwhile never get a terminal's Ctrl-C: who tunes ends them, and they have nothing to say."""
    if sys.platform == "win32":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_of_main = threading.Lock()


@contextmanager
def _main_is_not_imported() -> Iterator[None]:
    """Processes started meanwhile leave the caller's script alone, which need not guard ``__main__`` then: jobs are this
    package's functions."""
    with _of_main:
        main: dict[str, Any] = vars(sys.modules["__main__"])
        shown: dict[str, Any] = {name: main[name] for name in ("__spec__", "__file__") if name in main}
        main.update(dict.fromkeys(shown))
        try:
            yield
        finally:
            main.update(shown)


def _begin_tracker() -> None:
    """Begin the process that takes away what killed ones leave behind, without its telling users of it."""
    if sys.platform == "win32":
        return
    told = os.environ.get("PYTHONWARNINGS")
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, (told, "ignore:resource_tracker:UserWarning")))
    try:
        with _without_interrupts():
            resource_tracker.ensure_running()
    finally:
        del os.environ["PYTHONWARNINGS"]
        if told is not None:
            os.environ["PYTHONWARNINGS"] = told


_METHODS = multiprocessing.get_all_start_methods()
_START: Any = multiprocessing.get_context("forkserver" if "forkserver" in _METHODS else "spawn")
"""How workers start: forked by a server that has loaded torch, where systems have that."""


@contextmanager
def _at_a_stretch() -> Iterator[None]:
    """Signals that come meanwhile are handled afterwards: a process that is half started is nobody's to end."""
    came: list[int] = []
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in map(int, (signal.SIGINT, signal.SIGTERM)):
            if callable(signal.getsignal(number)):
                before[number] = signal.signal(number, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in came[:1]:
            signal.raise_signal(number)


class _Process(_START.Process):  # type: ignore[misc]
    def start(self) -> None:
        with _at_a_stretch():
            super().start()

    @staticmethod
    def _Popen(process: Any) -> Any:
        with _main_is_not_imported(), _without_interrupts():
            return _START.Process._Popen(process)


class _Context(type(_START)):  # type: ignore[misc]
    Process = _Process


class Worker:
    """``count`` processes that run jobs; one is replaced when a job kills it, outlasts its time or breaks its GPU.

    ``memory`` bounds the bytes a process may take, half of the machine's by default; 0 leaves it unbounded, as GPU
    drivers need, which reserve addresses without using them.
    """

    def __init__(self, memory: int | None = None, count: int = 1) -> None:
        context = _Context()
        if hasattr(context, "set_forkserver_preload"):
            context.set_forkserver_preload(["torch"])
        limit = max(4 << 30, host_cpu().memory // 2) if memory is None else memory
        self._options: dict[str, Any] = {
            "max_workers": count, "context": context, "initializer": _start_worker, "initargs": (limit,),
        }  # fmt: skip
        self._start()

    def _start(self) -> None:
        from pebble import CONSTS, ProcessPool

        _begin_tracker()
        CONSTS.term_timeout = (
            0.1  # each that is stuck in a compiler or a kernel is waited for, one by one, before it is killed
        )
        self._pool, self._waiting = ProcessPool(**self._options), set[Any]()

    def run(self, job: Callable[..., T], *arguments: object, timeout: float) -> T:
        """The job's result. Raises WorkerFailed; exceptions of the job itself are failures with their message, but for NoRoom."""
        from pebble import ProcessExpired

        future = self._pool.schedule(job, args=arguments, timeout=timeout)
        waiting = self._waiting
        waiting.add(future)
        try:
            result: T = future.result()
            return result
        except FutureTimeout as error:
            raise WorkerFailed("timeout", f"no answer within {timeout:.0f} s; the worker was killed") from error
        except ProcessExpired as error:
            why = ", killed: by the system, perhaps, whose memory did not suffice" if error.exitcode == -9 else ""
            raise WorkerFailed("failed", f"the worker died with exit code {error.exitcode}{why}") from error
        except CancelledError as error:
            raise GivenUp("failed", "given up: the worker was ended") from error
        except NoRoom:  # a full disk is no fault of the job
            raise
        except Exception as error:
            if any(name in str(error) for name in ("CUDA error", "HIP error", "Triton Error")):
                self.renew()  # its GPU context may be lost for good
            raise WorkerFailed("failed", f"{type(error).__name__}: {error}") from error
        finally:
            waiting.discard(future)

    def renew(self) -> None:
        """Go on in a new process: what is left of a job that failed may be in the way of the next one's."""
        self.close()
        self._start()

    def close(self) -> None:
        """End the process at once; whoever waits for a job, in another thread, learns that it was given up."""
        for future in list(self._waiting):
            future.cancel()
        self._pool.stop()  # type: ignore[no-untyped-call]
        self._pool.join()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
