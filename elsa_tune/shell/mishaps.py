"""What to say of an exception that nobody caught: a sentence that names the cause and what to do, and an exit status."""

from __future__ import annotations

import errno
import os
import sys
import tempfile
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

from elsa_tune.errors import ElsaTuneError, one_line
from elsa_tune.shell import lacks
from elsa_tune.shell.exits import EXIT_INCOMPLETE, EXIT_INTERRUPTED, EXIT_MISTAKE, EXIT_UNEXPECTED

FILE = "traceback.txt"
"""In the home folder, else in that for temporary files: the trace of what was not foreseen, the last one alone."""

_FULL = "free some space, or name a folder that has some: ELSA_TUNE_HOME, TMPDIR, -o"
_SHUT = "make it writable, or name another folder: ELSA_TUNE_HOME, TMPDIR, -o"
_MEMORY = "close other programs, raise the limit (ulimit -v), or tune smaller problems with --problem"

REMEDIES = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EFBIG: "raise the limit of a file's size (ulimit -f)",
    errno.EACCES: _SHUT,
    errno.EPERM: _SHUT,
    errno.EROFS: _SHUT,
    errno.ENOTDIR: _SHUT,
    errno.EISDIR: "name a file",
    errno.ENAMETOOLONG: "name a shorter path",
    errno.EMFILE: "raise the limit of open files (ulimit -n 1024)",
    errno.ENFILE: "close other programs: the system has as many files open as it may",
    errno.EAGAIN: "raise the limit of processes (ulimit -u), or close other programs",
    errno.ENOMEM: _MEMORY,
    errno.EIO: "the disk does not answer; name another folder: ELSA_TUNE_HOME, TMPDIR, -o",
}
"""What to do about what a system refuses."""


def told(error: BaseException, signal: int = 0) -> tuple[int, str]:
    """Exit status and sentence for what ended a command, of which a signal may have been the first cause. An empty sentence: there is
    nobody to tell, or it was told."""
    if os.environ.get("ELSA_TUNE_TRACEBACK") not in (None, "", "0"):
        traceback.print_exception(error, file=sys.stderr)
    if (
        isinstance(error, KeyboardInterrupt) or signal or type(error).__name__ == "Abort"
    ):  # click's for KeyboardInterrupt
        return EXIT_INTERRUPTED, "stopped; what was recorded before is kept"
    if isinstance(error, ElsaTuneError):
        return EXIT_MISTAKE, one_line(error)
    if isinstance(error, BrokenPipeError):
        return EXIT_INCOMPLETE, ""
    if hasattr(error, "format_message"):  # click's for mistakes
        return EXIT_MISTAKE, _of_usage(error)
    sentence = lacks.found(error) or _of_system(error)
    return (EXIT_MISTAKE, sentence) if sentence else (EXIT_UNEXPECTED, _unforeseen(error))


def _of_usage(error: Any) -> str:
    """What was wrong with the arguments, and where to read what they may be."""
    context = getattr(error, "ctx", None)
    command: str = context.command_path if context else "elsa-tune"
    said = " ".join(str(error.format_message()).split()).rstrip(".")
    if "unexpected extra argument" in said and context and context.parent:
        said += f": the commands are {', '.join(context.parent.command.commands)}"
    missing = type(error).__name__ == "NoArgsIsHelpError"  # whose message is the whole help
    return f"{'name a command' if missing else said}; {command} --help says what it takes"


def _of_system(error: BaseException) -> str:
    """Of a full disk, missing rights, memory or a limit; empty if it is none of these."""
    text = one_line(error)
    if isinstance(error, MemoryError) or "can't allocate memory" in text or "out of memory" in text:
        return f"memory does not suffice ({text[:160] or 'MemoryError'}); {_MEMORY}"
    if "can't start new thread" in text:
        return f"{text}; {REMEDIES[errno.EAGAIN]}"
    if isinstance(error, FileNotFoundError) and "temporary directory" in text:
        return f"{text}; name a folder that can be written with TMPDIR"
    if isinstance(error, OSError) and error.errno in REMEDIES:
        where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
        return f"{where}{error.strerror}; {REMEDIES[error.errno]}"
    return ""


def _unforeseen(error: BaseException) -> str:
    kept = _keep(error)
    where = f"the whole trace is in {kept}" if kept else "ELSA_TUNE_TRACEBACK=1 shows the whole trace"
    return (
        f"this should not have happened: {type(error).__name__}: {one_line(error)[:300]}; what was recorded is kept, {where}: please report it"
        " with what elsa-tune doctor says"
    )


def _keep(error: BaseException) -> Path | None:
    """The file that the trace was written to, or None."""
    text = f"{sys.argv}\n{''.join(traceback.format_exception(error))}"
    for folder in _folders():
        with suppress(Exception):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            path = folder / FILE
            path.unlink(missing_ok=True)
            with open(path, "x", errors="backslashreplace", opener=_private) as file:
                file.write(text)
            return path
    return None


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _folders() -> list[Path]:
    found = list[Path]()
    with suppress(Exception):  # platformdirs may be what is missing
        from elsa_tune import places

        found.append(places.home())
    with suppress(Exception):
        found.append(Path(tempfile.gettempdir()))
    return found
