"""Ways to start it wrong: each ends in one sentence that names what is wrong and what to do, and in the exit status that is promised."""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from stage import Ended, Run, Stage

from elsa_tune import places
from elsa_tune.device import host_cpu
from elsa_tune.errors import NoRoom
from elsa_tune.generate import backends
from elsa_tune.generate.cpp import compiler as compilers
from elsa_tune.measurement import Measurement
from elsa_tune.problem import Problem
from elsa_tune.remember import database as databases
from elsa_tune.remember import layers
from elsa_tune.remember.database import Database
from elsa_tune.shell import entry, exits, mishaps
from elsa_tune.space import Space
from elsa_tune.tuning import tune
from elsa_tune.tuning.trial import Trials

SMALL = "fp32.d16@b1.h2.q96.k96"
RIVAL = Measurement(
    device=str(host_cpu()), problem=SMALL, variant="sdpa.flash", role="rival", incumbent="sdpa.flash", incumbent_role="rival", status="ok",
    stage="final", error=1.25e-7, samples=(1.0, 1.0), incumbent_samples=(1.0, 1.0), ratio=1.0, created=1.0,
)  # fmt: skip
"""A winner, if not much of one."""

UNFORESEEN = "should not have happened"


def one_sentence(err: str) -> str:
    """What stderr says: one sentence of ours, foreseen, on one line."""
    assert "Traceback" not in err and UNFORESEEN not in err, err
    told = [line for line in err.splitlines() if line.startswith("elsa-tune: ")]
    assert len(told) == 1 and len(told[0]) < 1000, err
    return told[0]


@dataclass
class Here:
    """Where a way is prepared."""

    home: Path
    folder: Path
    patch: pytest.MonkeyPatch

    def file(self, name: str, content: str | bytes) -> str:
        """A file's path."""
        path = self.folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    def compiler(self, script: str) -> list[str]:
        """A compiler that is a shell script, asked for by CXX."""
        path = Path(self.file("compiler", f"#!/bin/sh\n{script}\n"))
        path.chmod(0o755)
        self.patch.setenv("CXX", str(path))
        return [*EXPORT]

    def fails(self, number: int, owner: Any, name: str) -> None:
        """Let a function be refused by the system."""

        def refuse(*arguments: object, **options: object) -> None:
            raise OSError(number, os.strerror(number))

        self.patch.setattr(owner, name, refuse)


@pytest.fixture
def here(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Here]:
    compilers.find.cache_clear()
    folder = tmp_path / "folder"
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield Here(home, folder, monkeypatch)
    compilers.find.cache_clear()


def start(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """The command, in this process."""
    with pytest.raises(SystemExit) as ended:
        entry.main(list(arguments))
    told = capsys.readouterr()
    assert isinstance(ended.value.code, int)
    return ended.value.code, told.out, told.err


TUNE = ("--device", "cpu", "--problem", SMALL, "--budget", "5")
SHOW, EXPORT = ("show",), ("export", "fp32.d16@b1.h1.q9.k9", "-o")
LOCKED = "BEGIN EXCLUSIVE"

MISTYPED: dict[str, tuple[list[str], str]] = {
    "no command": (["tnue"], "extra argument (tnue): the commands are"),
    "no subcommand": (["db"], "name a command; elsa-tune db --help"),
    "no such subcommand": (["db", "exprot"], "No such command 'exprot'"),
    "no such option": (["--devcie", "cpu"], "No such option"),
    "an option without its value": (["--device"], "requires an argument"),
    "a device misspelled": (["--device", "gpu"], "device 'gpu' is not on this machine"),
    "a device that is not here": (["--device", "cuda"], "use auto"),
    "a device of a full spelling": (["--device", "cpu:other-zen9-c64"], "is not on this machine"),
    "a target without --offline": (["--device", "sm_80"], "is not on this machine"),
    "a target that nobody knows": (["--offline", "--device", "sm_1"], "cannot be ranked"),
    "no device at all": (["--device", ""], "is not on this machine"),
    "a workload that is nowhere": (["--workload", "mine.toml"], "neither a file nor one of"),
    "a workload that is a folder": (["--workload", "."], "neither a file nor one of"),
    "a problem without a shape": (["--problem", "fp32"], "fp32"),
    "an element that is none": (["--problem", "fp31.d64@b1.h1.q9.k9"], "fp31"),
    "a dimension of zero": (["--problem", "fp32.d0@b1.h1.q9.k9"], "head_dim"),
    "a negative length": (["--problem", "fp32.d64@b1.h1.q-9.k9"], "q-9"),
    "a length beyond everything": (["--problem", f"fp32.d64@b1.h1.q{10**30}.k9"], "is misspelled"),
    "a mask that is none": (["--problem", "fp32.d64.casual@b1.h1.q9.k9"], "casual"),
    "a mask without its integers": (["--problem", "fp32.d64.window@b1.h1.q9.k9"], "window"),
    "heads that do not divide": (["--problem", "fp32.d64@b1.h3.kv2.q9.k9"], "kv_heads"),
    "a shape in words": (["--problem", "attention please"], "attention please"),
    "no problem": (["--problem", ""], "problem"),
    "a budget of nothing": (["--budget", "0"], "0.0 is not in the range"),
    "a negative budget": (["--budget", "-5"], "is not in the range"),
    "a budget that is no number": (["--budget", "soon"], "is not a valid float"),
    "a budget of nan": (["--budget", "nan"], "no number of seconds"),
    "a budget of for ever": (["--budget", "inf"], "is not in the range"),
    "a seed that is no number": (["--seed", "x"], "is not a valid integer"),
    "a negative seed": ([*TUNE, "--seed", "-1"], "seed -1"),
    "a sampler that is none": ([*TUNE, "--sampler", "oracle"], "sampler 'oracle' is unknown"),
    "an effort that is none": (["--effort", "much"], "'much' is not one of"),
    "a storage without a scheme": ([*TUNE, "--storage", "there"], "storage there"),
    "a storage of another kind": ([*TUNE, "--storage", "ftp://there/x"], "storage ftp://there/x"),
    "a storage whose driver is missing": ([*TUNE, "--storage", "oracle://me:secret@there/x"], "storage oracle://there/x"),
    "a storage that nobody answers at": (["fleet", "--storage", "postgresql+psycopg://me:secret@127.0.0.1:1/x"], "start it"),
    "traffic of nothing": (["--from-traffic", "nothing.jsonl"], "name a file that elsa-tune run -o wrote"),
    "traffic of a folder": (["--from-traffic", "."], "Is a directory"),
    "a report of what is not measured": (["--offline", "--device", "sm_80", "--watch"], "leave out --watch"),
    "traffic and problems": (["--from-traffic", "x", "--problem", SMALL], "leave out --problem"),
    "a program that is not there": (["run", "--", "./progam.py"], "name a program"),
    "a program that cannot be executed": (["run", "--", "."], "name a program"),
    "no program": (["run"], "Missing argument"),
    "what was recorded goes to a folder": (["run", "-o", ".", "--", "true"], "name a file that can be written"),
    "show without a variant": (["show"], "Missing argument 'VARIANT'"),
    "show of a variant that is none": (["show", "cpp.x"], "cpp.x"),
    "show of a backend that is none": (["show", "rust.serial"], "rust"),
    "explain nothing": (["explain"], "Missing argument 'PROBLEM'"),
    "explain nonsense": (["explain", "x"], "x"),
    "export for a device that is none": (["export", SMALL, "--device", "toaster"], "device 'toaster' is not known"),
    "export of gradients": (["export", "fp32.d64.backward@b1.h1.q9.k9"], "backward"),
    "export into a folder that is not there": ([*EXPORT, "nowhere/x.h"], "No such file or directory"),
    "export onto a folder": ([*EXPORT, "."], "Is a directory"),
    "a kit for nothing": (["kit"], "Missing option '--device'"),
    "a kit for a device that is none": (["kit", "--device", "toaster"], "device 'toaster' is not known"),
    "import of nothing": (["db", "import", "nothing.jsonl"], "nothing.jsonl"),
    "import of a folder": (["db", "import", "."], "Is a directory"),
    "import from an address of another kind": (["db", "import", "gopher://there/x"], "use a path, or a URL"),
    "merge into a folder": (["db", "merge", "nothing.jsonl", "-o", "."], "nothing.jsonl"),
    "diff of nothing": (["db", "diff", "a", "b"], "a"),
    "a fleet without a storage": (["fleet"], "Missing option '--storage'"),
    "compile for a device that is none": (["compile", "--for", "toaster"], "cannot be ranked"),
}  # fmt: skip
"""What people type, and what the sentence says."""


@pytest.mark.parametrize("way", MISTYPED)
def test_what_is_mistyped(here: Here, capsys: pytest.CaptureFixture[str], way: str) -> None:
    arguments, words = MISTYPED[way]
    status, _, err = start(capsys, *arguments)
    assert status == exits.EXIT_MISTAKE and words in one_sentence(err)
    assert "secret" not in err


WAYS: dict[str, tuple[Callable[[Here], list[str]], int, str]] = {}
"""What is wrong with where it starts: how to make it so, which returns arguments, and the exit status and what the sentence says."""


def way(
    words: str, status: int = exits.EXIT_MISTAKE
) -> Callable[[Callable[[Here], list[str]]], Callable[[Here], list[str]]]:
    """Add one."""

    def add(arrange: Callable[[Here], list[str]]) -> Callable[[Here], list[str]]:
        WAYS[arrange.__name__] = arrange, status, words
        return arrange

    return add


def built(here: Here) -> list[str]:
    """Arguments of a command that builds kernels in this process and measures nothing."""

    def build(*arguments: object, **options: object) -> None:
        variant = Space.read("cpp").parse(Space.read("cpp").start[-1])
        backends.get("cpp").build(variant, Problem.parse(SMALL), host_cpu())

    here.patch.setattr(tune, "tune", build)
    return [*TUNE]


# Workloads, traffic, measurements, settings.


@way("workload")
def a_workload_that_is_empty(here: Here) -> list[str]:
    return ["--workload", here.file("w.toml", "")]


@way("is malformed")
def a_workload_that_is_binary(here: Here) -> list[str]:
    return ["--workload", here.file("w.toml", bytes(range(256)))]


@way("is malformed")
def a_workload_that_is_no_toml(here: Here) -> list[str]:
    return ["--workload", here.file("w.toml", "problems: [a]")]


@way("is malformed")
def a_workload_with_a_byte_order_mark(here: Here) -> list[str]:
    return ["--workload", here.file("w.toml", b"\xef\xbb\xbf[mine]\nproblems = []\n")]


@way("is malformed")
def a_workload_of_sections_without_problems(here: Here) -> list[str]:
    return ["--workload", here.file("w.toml", "[mine]\nproblem = 3\n")]


@way("fp99")
def a_workload_of_a_problem_that_is_none(here: Here) -> list[str]:
    return ["--workload", here.file("w.toml", '[mine]\nproblems = ["fp99.d64@b1.h1.q9.k9"]\n')]


@way("line 1")
def traffic_of_garbage(here: Here) -> list[str]:
    return ["--from-traffic", here.file("t.jsonl", bytes(range(256)) * 9)]


@way("is empty")
def traffic_of_nobody(here: Here) -> list[str]:
    return ["--from-traffic", here.file("t.jsonl", "")]


@way("a database, to which no lines can be added")
def traffic_into_a_database(here: Here) -> list[str]:
    return ["run", "-o", here.file("m.db", b"SQLite format 3\0"), "--", "true"]


@way("nothing was recorded (exit status 0")
def a_program_that_asks_nothing(here: Here) -> list[str]:
    from elsa_tune.shell import cli_run

    here.patch.setattr(cli_run, "_prepare", lambda: None)
    return ["run", "--", "true"]


@way("nothing was recorded (ended by signal 35")
def a_program_that_a_signal_without_a_name_ends(here: Here) -> list[str]:
    from elsa_tune.shell import cli_run

    here.patch.setattr(cli_run, "_prepare", lambda: None)
    return ["run", "--", "sh", "-c", "kill -35 $$"]


@way("cannot be signed")
def a_key_that_is_none(here: Here) -> list[str]:
    with Database.for_writing():
        pass
    return ["db", "export", "-o", "x.jsonl", "--sign", here.file("key", "no key")]


@way("name a file that can be written with -o")
def an_export_onto_a_folder(here: Here) -> list[str]:
    with Database.for_writing():
        pass
    return ["db", "export", "-o", "."]


@way("mend or remove it")
def settings_that_are_no_toml(here: Here) -> list[str]:
    here.home.mkdir()
    (here.home / "config.toml").write_text("databases = [")
    return ["db", "import", here.file("m.jsonl", "")]


# The home folder and the database.


@way("ELSA_TUNE_HOME")
def a_home_that_is_a_file(here: Here) -> list[str]:
    here.home.write_text("")
    return [*TUNE]


@way("ELSA_TUNE_HOME")
def a_home_inside_a_file(here: Here) -> list[str]:
    here.patch.setenv("ELSA_TUNE_HOME", here.file("file", "") + "/home")
    return [*TUNE]


@way("File name too long")
def a_home_of_a_path_that_is_too_long(here: Here) -> list[str]:
    here.patch.setenv("ELSA_TUNE_HOME", str(here.folder / ("x" * 300)))
    return [*TUNE]


@way("Permission denied")
def a_home_that_nobody_may_make(here: Here) -> list[str]:
    here.fails(errno.EACCES, Path, "mkdir")
    return [*TUNE]


@way("Read-only file system")
def a_home_on_a_read_only_file_system(here: Here) -> list[str]:
    here.fails(errno.EROFS, Path, "mkdir")
    return [*TUNE]


@way("make it writable")
def a_database_that_is_a_folder(here: Here) -> list[str]:
    (here.home / "measurements.db").mkdir(parents=True)
    return [*TUNE]


@way("by a newer elsa-tune")
def a_database_of_a_newer_version(here: Here) -> list[str]:
    here.home.mkdir()
    with sqlite3.connect(places.database()) as newer:
        newer.execute("PRAGMA user_version = 999")
    newer.close()
    return [*TUNE]


@way("cannot be set aside")
def a_damaged_database_in_a_read_only_folder(here: Here) -> list[str]:
    here.home.mkdir()
    places.database().write_bytes(b"garbage" * 999)
    here.fails(errno.EROFS, Path, "rename")
    return [*TUNE]


held: list[sqlite3.Connection] = []


@way("close what locks it")
def a_database_that_somebody_holds(here: Here) -> list[str]:
    with Database.for_writing():
        pass
    held.append(sqlite3.connect(places.database(), isolation_level=None))
    held[-1].execute("PRAGMA locking_mode = EXCLUSIVE")
    held[-1].execute("BEGIN EXCLUSIVE")
    here.patch.setattr(databases, "PATIENCE", 0.1)
    return [*TUNE]


@way("by another process")
def a_database_that_somebody_takes_while_it_is_written(here: Here) -> list[str]:

    here.patch.setattr(databases, "PATIENCE", 0.1)

    def take(*arguments: object, **options: object) -> None:
        with Database.for_writing() as database:
            held.append(sqlite3.connect(places.database(), isolation_level=None))
            held[-1].execute("BEGIN IMMEDIATE")
            database.note("name", "value")

    here.patch.setattr(tune, "tune", take)
    return [*TUNE]


@way("free some space")
def a_database_on_a_disk_that_is_full(here: Here) -> list[str]:
    with Database.for_writing():
        pass

    def full(self: Database, *arguments: object) -> None:
        self._connection.execute("PRAGMA max_page_count = 1")
        self._connection.execute("CREATE TABLE more AS SELECT randomblob(100000)")

    def write(*arguments: object, **options: object) -> None:
        with Database.for_writing() as database:
            database.note("name", "value")

    here.patch.setattr(Database, "_note", full)
    here.patch.setattr(tune, "tune", write)
    return [*TUNE]


@way("sqlite-utils 3.39 is too old")
def a_sqlite_utils_that_is_too_old(here: Here) -> list[str]:
    here.patch.setattr(databases, "version", lambda package: "3.39")
    return [*TUNE]


# Kernels and compilers.


@way("no C++ compiler was found")
def no_compiler(here: Here) -> list[str]:
    here.patch.setattr(compilers, "_candidates", lambda: [])
    return built(here)


@way("failed: ")
def a_compiler_that_fails(here: Here) -> list[str]:
    here.compiler('[ "$1" = --version ] && echo mine 1.0 || { echo "internal error" >&2; exit 1; }')
    return built(here)


@way("failed: ")
def a_compiler_that_is_too_old_for_its_flags(here: Here) -> list[str]:
    here.compiler('[ "$1" = --version ] && echo mine 1.0 || { echo "unrecognized option -std=c++17" >&2; exit 4; }')
    return built(here)


@way("failed: ")
def a_compiler_that_prints_garbage(here: Here) -> list[str]:
    here.compiler("""[ "$1" = --version ] && printf 'mine \\377\\376\\n' || { printf '\\377\\001\\n' >&2; exit 1; }""")
    return built(here)


@way("failed: ")
def a_compiler_that_is_killed(here: Here) -> list[str]:
    here.compiler('[ "$1" = --version ] && echo mine 1.0 || kill -9 $$')
    return built(here)


@way("timed out")
def a_compiler_that_hangs(here: Here) -> list[str]:
    here.compiler('[ "$1" = --version ] && echo mine 1.0 || exec sleep 100')
    here.patch.setattr(compilers.Compiler.run, "__defaults__", (0.2, Path()))
    return built(here)


@way("wrote no")
def a_compiler_that_writes_nothing(here: Here) -> list[str]:
    here.compiler('[ "$1" = --version ] && echo mine 1.0 || exit 0')
    return built(here)


@way("No space left on device; free some space")
def a_compiler_on_a_disk_that_is_full(here: Here) -> list[str]:
    here.compiler('[ "$1" = --version ] && echo mine 1.0 || { echo "x.s: No space left on device" >&2; exit 1; }')
    return built(here)


@way("No space left on device; free some space")
def a_disk_that_fills_while_a_kernel_is_written(here: Here) -> list[str]:
    arguments = built(here)
    here.fails(errno.ENOSPC, Path, "write_text")
    return arguments


@way("Permission denied; free some space and make it writable, or set ELSA_TUNE_HOME")
def a_folder_of_kernels_that_nobody_may_write(here: Here) -> list[str]:
    arguments = built(here)
    here.fails(errno.EACCES, Path, "mkdir")
    return arguments


@way("chmod go-w it")
def a_folder_of_kernels_that_others_may_change(here: Here) -> list[str]:
    places.kernels().mkdir(parents=True)
    places.kernels().chmod(0o777)
    return built(here)


@way("tuning.lock")
def a_lock_that_cannot_be_made(here: Here) -> list[str]:
    (here.home / "tuning.lock").mkdir(parents=True)

    def lock(*arguments: object, **options: object) -> None:
        with Database.for_writing() as database, Trials(database, None, host_cpu()).alone():  # type: ignore[arg-type]
            raise AssertionError("nobody may come here")

    here.patch.setattr(tune, "tune", lock)
    return [*TUNE]


# What is written elsewhere.


@way("name another with -o")
def a_kit_in_place_of_a_file(here: Here) -> list[str]:
    return ["kit", "--device", "sm_62", "-o", here.file("kit", "")]


@way("is not empty and no kit")
def a_kit_in_somebodys_folder(here: Here) -> list[str]:
    here.file("mine", "")
    return ["kit", "--device", "sm_62", "-o", "."]


@way("No space left on device; free some space")
def a_disk_that_fills_while_a_kit_is_written(here: Here) -> list[str]:
    here.fails(errno.ENOSPC, Path, "write_text")
    return ["kit", "--device", "cortex_a72", "--problem", SMALL]


@way("No space left on device; free some space")
def a_disk_that_fills_while_a_header_is_written(here: Here) -> list[str]:
    here.fails(errno.ENOSPC, Path, "write_bytes")
    return ["export", SMALL]


@way("No space left on device; name a file that can be written with -o")
def a_disk_that_fills_while_traffic_is_written(here: Here) -> list[str]:
    whole = Path.open

    def full(path: Path, *mode: Any, **more: Any) -> Any:
        if path.name == "t.jsonl":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return whole(path, *mode, **more)

    here.patch.setattr(Path, "open", full)
    return ["run", "-o", "t.jsonl", "--", "true"]


# What a system has too little of, anywhere.


def lacking(here: Here, error: BaseException) -> list[str]:
    """Arguments of a command that meets it somewhere."""

    def meet(*arguments: object, **options: object) -> None:
        raise error

    here.patch.setattr(tune, "tune", meet)
    return [*TUNE]


@way("ulimit -n")
def too_few_files(here: Here) -> list[str]:
    return lacking(here, OSError(errno.EMFILE, os.strerror(errno.EMFILE), "x"))


@way("ulimit -u")
def too_few_processes(here: Here) -> list[str]:
    return lacking(here, BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN)))


@way("ulimit -u")
def too_few_threads(here: Here) -> list[str]:
    return lacking(here, RuntimeError("can't start new thread"))


@way("memory does not suffice")
def too_little_memory(here: Here) -> list[str]:
    return lacking(here, MemoryError())


@way("memory does not suffice")
def too_little_memory_for_torch(here: Here) -> list[str]:
    return lacking(
        here, RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
    )


@way("TMPDIR")
def no_folder_for_temporary_files(here: Here) -> list[str]:
    return lacking(here, FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']"))


@way("the disk does not answer")
def a_disk_that_fails(here: Here) -> list[str]:
    return lacking(here, OSError(errno.EIO, os.strerror(errno.EIO), "x"))


@way("stopped; ", exits.EXIT_INTERRUPTED)
def ctrl_c(here: Here) -> list[str]:
    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    here.patch.setattr(layers, "layers", stop)
    return ["winners"]


# Packages.


@way("elsa_tune_needs_this is not installed")
def a_package_that_is_missing(here: Here) -> list[str]:
    return lacking(here, ModuleNotFoundError("No module named 'elsa_tune_needs_this'", name="elsa_tune_needs_this"))


@way("optuna 1.0 is too old")
def a_package_that_is_too_old(here: Here) -> list[str]:
    import optuna

    here.patch.setattr(optuna, "__version__", "1.0")
    return lacking(here, AttributeError("module 'optuna' has no attribute 'storages'"))


@way("random.py stands in the place of the module random")
def a_file_in_the_place_of_a_module(here: Here) -> list[str]:
    here.file("random.py", "")
    here.patch.syspath_prepend(str(here.folder))
    return lacking(here, AttributeError("module 'random' has no attribute 'Random'"))


@pytest.mark.parametrize("name", WAYS)
def test_what_is_wrong_here(here: Here, capsys: pytest.CaptureFixture[str], name: str) -> None:
    arrange, expected, words = WAYS[name]
    arguments = arrange(here)
    try:
        status, _, err = start(capsys, *arguments)
    finally:
        while held:
            held.pop().close()
    assert status == expected and words in one_sentence(err), err


def test_there_are_fifty() -> None:
    assert len(MISTYPED) + len(WAYS) >= 100


def test_a_problem_that_fits_into_no_memory(here: Here, capsys: pytest.CaptureFixture[str]) -> None:

    here.patch.setattr(Trials, "find_peaks", lambda self: None)
    status, out, err = start(capsys, "--device", "cpu", "--budget", "5", "--problem", f"fp32.d64@b1.h1.q9.k{10**12}")
    told = " ".join(out.split())
    assert (
        status == exits.EXIT_INCOMPLETE and not err and "its tensors take 476837 GiB, of which this device has" in told
    )
    assert "1 could not be measured, and torch serves it: see the notes" in told


def test_a_variant_that_the_disk_had_no_room_for_has_not_failed(here: Here) -> None:
    """Nothing is recorded of it, and the run ends: the next one would not fit either."""
    here.fails(errno.ENOSPC, Path, "write_text")
    with Database.for_writing() as database:
        trials = Trials(database, None, host_cpu())  # type: ignore[arg-type]
        with pytest.raises(NoRoom, match="No space left on device"):
            trials.build(Problem.parse(SMALL), [Space.read("cpp").parse(Space.read("cpp").start[-1])])
        assert len(database) == 0


# What was not foreseen.


def test_what_was_not_foreseen_is_told_apart(here: Here, capsys: pytest.CaptureFixture[str]) -> None:
    """Its own status, a file with the trace, no trace on the screen; ELSA_TUNE_TRACEBACK=1 shows it."""
    arguments = lacking(here, ZeroDivisionError("a fault\nof ours"))
    status, _, err = start(capsys, *arguments)
    file = here.home / mishaps.FILE
    assert status == exits.EXIT_UNEXPECTED and err.count("\n") == 1 and "Traceback" not in err
    assert (
        UNFORESEEN in err
        and "ZeroDivisionError: a fault of ours" in err
        and f"trace is in {file}" in err
        and "elsa-tune doctor" in err
    )
    assert "Traceback" in file.read_text() and not file.stat().st_mode & 0o077
    with pytest.raises(AssertionError):
        one_sentence(err)
    here.patch.setenv("ELSA_TUNE_TRACEBACK", "1")
    status, _, err = start(capsys, *arguments)
    assert status == exits.EXIT_UNEXPECTED and "Traceback" in err and "in meet" in err
    here.patch.setenv("ELSA_TUNE_TRACEBACK", "0")
    here.fails(errno.EROFS, Path, "mkdir")
    status, _, err = start(capsys, *arguments)
    assert status == exits.EXIT_UNEXPECTED and err.count("\n") == 1 and "ELSA_TUNE_TRACEBACK=1 shows" in err


# Processes of their own.


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    made = Stage()
    yield made
    made.close()


def seen(here: Here, stage: Stage, *arguments: str, **options: Any) -> Ended:
    """How a command ends on the stage, with this home."""
    given = options.pop("environment", {})
    return stage(Run(arguments, {"ELSA_TUNE_HOME": str(here.home), **given}, **options))


@pytest.mark.parametrize(
    "package", ["click", "numpy", "optuna", "sqlite-utils", "platformdirs", "pebble", "rich", "torch"]
)
def test_a_package_that_is_missing(here: Here, stage: Stage, package: str) -> None:
    module = package.replace("-", "_")
    absent = f"""
import sys
for name in [name for name in sys.modules if name.split(".")[0] in ("elsa_tune", {module!r})]:
    del sys.modules[name]
sys.modules[{module!r}] = None
"""
    ended = seen(here, stage, *TUNE, before=absent)
    assert ended.status == exits.EXIT_MISTAKE and f"{package} is not installed; " in one_sentence(ended.err), ended
    assert f"-m pip install '{package}" in ended.err


def test_a_torch_that_is_too_old(here: Here, stage: Stage) -> None:
    (here.folder / "torch").mkdir()
    (here.folder / "torch" / "__init__.py").write_text("__version__ = '2.0.0'\n")
    old = f"""
import sys
for name in [name for name in sys.modules if name.split(".")[0] in ("elsa_tune", "torch")]:
    del sys.modules[name]
sys.path.insert(1, {str(here.folder)!r})
"""
    ended = seen(here, stage, *TUNE, before=old)
    told = one_sentence(ended.err)
    assert (
        ended.status == exits.EXIT_MISTAKE
        and "torch 2.0.0 is too old" in told
        and "torch>=2.6" in told
        and str(here.folder) in told
    )


def test_where_nobody_reads(here: Here, stage: Stage) -> None:
    """A pipe that its reader left is no matter; a closed stream is as good as none; a full one is told."""
    show = ("show", Space.read("cpp").start[0], "fp32.d64")
    for arguments in (("db", "--help"), show, ("winners",)):
        gone = seen(here, stage, *arguments, stdout="gone")
        assert gone.status == exits.EXIT_INCOMPLETE and not gone.err, arguments
        full = seen(here, stage, *arguments, stdout="full")
        assert full.status == exits.EXIT_MISTAKE and "No space left on device" in one_sentence(full.err), arguments
        closed = seen(here, stage, *arguments, stdout="closed")
        assert closed.status == 0 and not closed.err, arguments


@pytest.mark.parametrize("columns", [20, 40])
def test_a_narrow_terminal(here: Here, stage: Stage, columns: int) -> None:
    """Every table is readable: no number is cut."""
    with Database.for_writing() as database:
        database.record(RIVAL)
    ended = seen(
        here,
        stage,
        "winners",
        stdout="terminal",
        columns=columns,
        environment={"TERM": "xterm"},
    )
    shown = "".join(ended.out.split())
    assert ended.status == 0 and not ended.err and "…" not in ended.out
    assert "1,torch'sown" in shown and "1.2e-07" in shown and SMALL in shown and "sdpa.flash" in shown


@pytest.mark.parametrize(
    "plain", [{"TERM": "dumb"}, {"TERM": "", "LC_ALL": "C"}, {"NO_COLOR": "1", "LC_ALL": "xx_YY"}, {"COLUMNS": "many"}]
)
def test_a_plain_terminal(here: Here, stage: Stage, plain: dict[str, str]) -> None:
    with Database.for_writing() as database:
        database.record(RIVAL)
    ended = seen(here, stage, "winners", stdout="terminal", columns=100, environment=plain)
    assert ended.status == 0 and not ended.err and SMALL in ended.out


def test_a_teams_database_that_is_nowhere(here: Here, capsys: pytest.CaptureFixture[str]) -> None:
    """The others are listed beside what is wrong."""
    here.patch.setenv("ELSA_TUNE_DB", "/nowhere/at/all.jsonl")
    with Database.for_writing() as database:
        database.record(RIVAL)
    status, out, err = start(capsys, "db", "info")
    assert status == 0 and "1 measurements" in out and "/nowhere/at/all.jsonl" in one_sentence(err)


def test_a_screen_that_knows_ascii_alone(here: Here, stage: Stage) -> None:
    strange = here.folder / "Schlüssel – ключ"
    ascii_alone = "import sys; sys.stdout.reconfigure(encoding='ascii', errors='strict'); sys.stderr.reconfigure(encoding='ascii', errors='strict')"
    ended = seen(here, stage, "--workload", str(strange), before=ascii_alone)
    assert ended.status == exits.EXIT_MISTAKE and "neither a file nor one of" in one_sentence(ended.err)


@pytest.mark.parametrize("absolute", [True, False])
def test_a_home_of_any_name(here: Here, capsys: pytest.CaptureFixture[str], absolute: bool) -> None:
    """Spaces, quotes, what URLs, shells and SQL mean something by, other alphabets: kernels and measurements are kept and found."""
    name = """a b'c"d?e#f%20g;é $(h)"""
    here.patch.setenv("ELSA_TUNE_HOME", str(here.folder / name) if absolute else name)
    with Database.for_writing() as database:
        database.record(RIVAL)
    built(here)
    status, _, err = start(capsys, "db", "gc")
    assert status == 0 and not err
    status, out, err = start(capsys, "winners")
    assert status == 0 and not err and SMALL in out
    variant, problem = Space.read("cpp").parse(Space.read("cpp").start[-1]), Problem.parse(SMALL)
    backend = backends.get("cpp")
    kernel = backend.load(backend.build(variant, problem), variant, problem)
    query = torch.randn(1, 2, 96, 16)
    assert torch.allclose(
        kernel(query, query, query), torch.nn.functional.scaled_dot_product_attention(query, query, query), atol=1e-5
    )


def test_limits_of_a_process(here: Here, stage: Stage) -> None:
    """Few files, little memory, a small disk: one sentence each, and what was recorded before is there."""
    files = seen(here, stage, *TUNE, limits={"RLIMIT_NOFILE": 10})
    assert files.status == exits.EXIT_MISTAKE and "ulimit -n" in one_sentence(files.err), files
    files = seen(here, stage, *TUNE, limits={"RLIMIT_NOFILE": 12})
    assert files.status == exits.EXIT_MISTAKE and "ulimit -n" in one_sentence(files.err), files
    size = seen(
        here,
        stage,
        *TUNE,
        limits={"RLIMIT_FSIZE": 4096},
        before="import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)",
    )
    assert size.status == exits.EXIT_MISTAKE and "free some space" in one_sentence(size.err), size


def test_ctrl_c_while_workers_start(here: Here, stage: Stage) -> None:
    """Twice, to all processes of the terminal: one sentence, nobody is left, and nothing wrong was recorded."""
    ended = seen(here, stage, *TUNE, signals=[(1.5, "SIGINT", True), (0.05, "SIGINT", True)])
    stopped(here, ended, 130)


def test_sigterm_while_kernels_are_raced(here: Here, stage: Stage) -> None:
    """To who tunes alone, as process managers do."""
    ended = seen(here, stage, *TUNE, signals=[(5.0, "SIGTERM", False)])
    stopped(here, ended, 143)


def test_kill_leaves_nobody_behind(here: Here, stage: Stage) -> None:
    """Workers, and the server that forks them, end with who tunes, however that ended."""
    assert not seen(here, stage, *TUNE, signals=[(3.0, "SIGKILL", False)]).left


def stopped(here: Here, ended: Ended, status: int) -> None:
    """A stopped tuning: what it says, leaves behind and has recorded."""
    assert ended.status == status and "stopped; everything measured so far is kept" in ended.out, ended
    assert not ended.err and not ended.left
    with Database.for_reading(places.database()) as database:
        assert not [m for m in database if m.status == "failed"] and not database.damaged()


def test_ctrl_c_before_anything_began(here: Here, stage: Stage) -> None:
    early = """
import os, signal
from elsa_tune.shell import entry
entry._run = lambda *given: os.kill(os.getpid(), signal.SIGINT)
"""
    ended = seen(here, stage, *TUNE, before=early)
    assert ended.status == 130 and "stopped before it began" in one_sentence(ended.err) and not ended.out


def test_ctrl_c_that_a_library_swallows_comes_again(here: Here, stage: Stage) -> None:
    """Where Python can only say that it ignored an exception."""
    swallowed = """
import os, signal
from elsa_tune.tuning import tune
class Swallows:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000): pass
def tuned(*given, **more):
    Swallows()
    import time
    time.sleep(30)
tune.tune = tuned
"""
    ended = seen(here, stage, *TUNE, before=swallowed)
    assert ended.status == 130 and not ended.err and "stopped; " in ended.out


def test_sigint_alone_is_the_programs(here: Here, stage: Stage) -> None:
    """`elsa-tune run` passes on what no terminal sent to both, and says how the program ended."""
    program = here.file("program.sh", "trap 'exit 7' INT; for i in $(seq 100); do sleep 0.1; done")
    unprepared = "from elsa_tune.shell import cli_run; cli_run._prepare = lambda: None; cli_run.BOTH_SECONDS = 0.1"
    ended = seen(here, stage, "run", "--", "sh", program, before=unprepared, signals=[(0.7, "SIGINT", False)])
    assert (
        ended.status == exits.EXIT_MISTAKE
        and "nothing was recorded (exit status 7" in one_sentence(ended.err)
        and not ended.left
    )
