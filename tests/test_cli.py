"""The command line: what a person types, what a program reads, and mistakes that name the remedy."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import elsa_tune
from elsa_tune import masks, places
from elsa_tune.device import host_cpu
from elsa_tune.generate.cpp import compiler as _compiler
from elsa_tune.generate.cpp import pool as _pool
from elsa_tune.generate.cpp.build import LIBRARY
from elsa_tune.generate.cpp.laws import ISAS
from elsa_tune.measurement import Evidence, Measurement
from elsa_tune.problem import Problem
from elsa_tune.shell import cli, doctor, ending, exits, screen
from elsa_tune.space import Space
from elsa_tune.tuning.report import Outcome, Report

SMALL = "fp32.d16@b1.h2.q96.k96"
NATIVE = host_cpu().isas[0]
VARIANT = f"cpp.serial.{NATIVE}.l{ISAS[NATIVE].lanes}.q2.k4.v4.n48"


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(cli.main, arguments)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_tune_is_the_default_and_ends_with_a_table(home: Path) -> None:
    code, out, _ = run("--device", "auto", "--problem", SMALL, "--budget", "8")
    assert code == 0
    assert SMALL in out and "ratio" in out and "GFLOP/s" in out and "error" in out
    assert f"elsa-tune --device {host_cpu()} --problem {SMALL}" in out.replace("\n", "")
    assert str(host_cpu()) in out, "it says what it found"
    *_, gained, use, following = out.splitlines()
    assert "of 1 problem is faster than by torch's own kernels" in gained and use.startswith("Use it: ")
    assert "elsa-tune run -- python your_program.py" in following and "ELSA_TUNE=1 python your_program.py" in following

    code, out, _ = run("--problem", SMALL, "--budget", "3", "--json")
    report = json.loads(out)
    (line,) = report["outcomes"]
    assert (
        code == 0 and report["complete"] and line["winner"]["ratio"] >= 1 and line["reproduce"].startswith("elsa-tune ")
    )

    code, out, _ = run("winners", "--json", "--problem", SMALL)
    assert code == 0 and json.loads(out)[0]["variant"] == line["winner"]["variant"]
    assert SMALL.split("@")[0] in run("winners")[1]
    assert run("winners", "--family", "fp32.d99")[1].startswith("no winner")

    code, out, _ = run("explain", SMALL)
    assert code == 0 and "rung: " in out and "tried here: " in out and "axes that mattered" in out


def test_the_last_line_names_what_serves(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """attention() where it can pose the family, masks and scores too; else the call of load() that does, which is what it says."""
    shape = "b2.h2.q9.k9"
    problems = (f"fp32.d16.causal@{shape}", f"fp32.strict.d16.causal+lengths.softcap@{shape}.softcap30")
    outcomes = [Outcome(Problem.parse(problem), host_cpu(), evidence(2.0)) for problem in problems]
    screen.print_report(screen.console(), Report(outcomes, 1.0, []))
    asked, loaded = capsys.readouterr().out.splitlines()[-3:-1]
    screen.print_report(screen.console(), Report(outcomes, 1.0, []), "python mine.py")
    told = capsys.readouterr().out
    assert told.endswith("Use it: ELSA_TUNE=1 python mine.py\n") and told.count("Use it") == 1, "that program's"
    assert asked == "Use it: elsa_tune.attention(query, key, value) instead of scaled_dot_product_attention."
    assert loaded.startswith("Use fp32.strict.d16.causal+lengths.softcap: elsa_tune.load(") and "attention()" in loaded
    query, key, value = torch.randn(3, 2, 2, 9, 16)
    names = {"elsa_tune": elsa_tune, "query": query, "key": key, "value": value, "attn_mask": masks.lengths([9, 3])}
    assert eval(loaded.partition(": ")[2].partition(";")[0], names).shape == query.shape
    assert ending.calls(outcomes[:1]) == [asked] and ending.calls(outcomes[1:]) == [loaded]
    masked = [Outcome(Problem.parse(f"fp32.d16.lengths@{shape}"), host_cpu(), None)]
    assert ending.calls(masked) == [asked.replace("value)", "value, attn_mask)")]
    (told,) = ending.calls([Outcome(Problem.parse("fp32.strict.d64.backward@b1.h1.q9.k9"), host_cpu(), None)])
    assert "no call asks for gradients" in told
    opencl = replace(host_cpu(), kind="opencl")
    assert 'device="opencl"' in ending.calls([Outcome(Problem.parse(f"fp32.d16@{shape}"), opencl, None)])[0]
    gpu = replace(host_cpu(), kind="cuda")
    for family, server in (
        ("fp32.tf32.d16.backward", "attention("),
        ("fp32.strict.d16", "load("),
        ("fp16.d16.window", "attention("),
    ):
        told = ending.calls([Outcome(Problem.parse(family), gpu, None)])[0]
        assert f"elsa_tune.{server}" in told, family


def evidence(ratio: float, busy: bool = False) -> Evidence:
    """A winner of a ratio; torch's own where that is 1."""
    name, role = ("sdpa.flash", "rival") if ratio == 1 else (VARIANT, "candidate")
    measured = Measurement(
        device=str(host_cpu()),
        problem=SMALL,
        variant=name,
        role=role,
        status="ok",
        provenance={"disturbed": float(busy)},
    )
    return Evidence(measured, ratio, ratio, ratio, 1)


@pytest.mark.parametrize(
    ("winners", "told"),
    [
        (
            [2.0, 8.0, 1.0],
            "2 of 3 problems are faster than by torch's own kernels, 2.00 to 8.00 times, 4.00 by the geometric mean; of 1 torch's own",
        ),
        ([1.5], "1 of 1 problem is faster than by torch's own kernels, 1.50 times."),
        (
            [1.0, 1.0],
            "None of 2 problems is faster than by torch's own kernels; of 2 torch's own kernel is the fastest of those measured, and",
        ),
        (
            [None],
            "None of 1 problem is faster than by torch's own kernels; 1 could not be measured, and torch serves it: ",
        ),
        (
            [3.0, -3.0],
            "1 of 2 problems is faster than by torch's own kernels, 3.00 times; of 1 a faster one is not settled",
        ),
        ([0.0], "of 1 no kernel of ours was tried yet: give a longer --budget"),
        ([], "nothing was gained"),
    ],
)
def test_it_says_what_was_gained_and_what_was_not(winners: list[float | None], told: str) -> None:
    """Negative: measured while others used the machine; 0: torch's own, for nothing else was tried."""
    made = [None if ratio is None else evidence(abs(ratio) or 1.0, ratio < 0) for ratio in winners]
    tried = [0 if ratio == 0 else 3 for ratio in winners]
    outcomes = [Outcome(Problem.parse(SMALL), host_cpu(), w, tried=t) for w, t in zip(made, tried, strict=True)]
    assert told in ending.gained(outcomes)
    assert any("Use it" in line for line in ending.lines(outcomes)) == any(abs(ratio or 0) > 1 for ratio in winners)


def test_what_to_type_next_can_be_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`make tune` leaves the command in .venv, where no shell looks for it before that is activated."""
    script = tmp_path / ".venv" / "bin" / "activate"
    script.parent.mkdir(parents=True)
    script.touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.prefix", str(tmp_path / ".venv"))
    outcomes = [Outcome(Problem.parse(SMALL), host_cpu(), None)]
    for path, told in (
        ("", "unchanged (first type: source .venv/bin/activate): "),
        (str(script.parent), "unchanged: "),
    ):
        monkeypatch.setenv("PATH", path)
        assert f"For your program, {told}elsa-tune run -- python" in ending.lines(outcomes)[-1]
        (script.parent / "elsa-tune").touch(0o755)


def test_a_workload_file(home: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(f'[mine]\nproblems = ["{SMALL}"]\n')
    code, out, _ = run(
        "--workload", str(path), "--budget", "5", "--effort", "quick", "--seed", "3", "--sampler", "random"
    )
    assert code == 0 and SMALL in out


def test_show_runs_nothing(home: Path) -> None:
    code, out, _ = run("show", VARIANT, "fp32.d48.causal")
    assert code == 0 and "HEAD_DIM = 48" in out and "position + 1" in out
    command = shlex.split(out.splitlines()[-1].removeprefix("// "))
    assert command[-1] == "kernel.so" and "kernel.cpp" in command
    assert f"elsa-tune show {VARIANT} fp32.d48.causal" in out, "the code carries the command that made it"
    assert not home.exists()
    assert "torch's own" in run("show", "sdpa.flash")[1]


@pytest.mark.parametrize(
    ("variant", "family", "reason"),
    [
        (VARIANT, "fp32.d257", "up to 256"),
        (VARIANT, "fp32.tf32.d64", "no class tf32"),
        (Space.read("triton").start[0], "bf16.d257.softcap.backward", "up to 256"),
        (Space.read("cuda").start[0], "bf16.d64.v300", "up to 256"),
        (Space.read("cuda").start[0], "fp32.d64.backward", "no backward kernels"),
    ],
)
def test_what_no_kernel_can_serve_is_neither_shown_nor_advised(
    home: Path, variant: str, family: str, reason: str
) -> None:
    code, out, err = run("show", variant, family)
    assert code == exits.EXIT_MISTAKE and not out and reason in err and err.count("\n") == 1
    if variant == VARIANT and "tf32" not in family:  # of which a more exact kernel may serve
        code, out, _ = run("explain", f"{family}@b1.h1.q64.k64", "--device", "cpu")
        assert code == 0 and f"no kernel can serve {family} on {host_cpu()}" in out and reason in out
        assert "--problem" not in out and "tune longer" not in out
    out = run("explain", "fp32.d64@b1.h1.q64.k64", "--device", "cpu")[1]
    assert "elsa-tune --problem fp32.d64@b1.h1.q64.k64" in out and "no kernel can serve" not in out


@pytest.mark.parametrize(
    "arguments",
    [
        ("--problem", "fp32"),
        ("--device", "cuda"),
        ("--workload", "nothing"),
        ("--sampler", "oracle"),
        ("show", "cpp.x"),
        ("explain", "x"),
        ("show", VARIANT, "x"),
    ],
)
def test_mistakes_are_one_line_and_name_the_remedy(home: Path, arguments: tuple[str, ...]) -> None:
    code, _, err = run(*arguments)
    assert code == exits.EXIT_MISTAKE
    assert err.startswith("elsa-tune: ") and err.count("\n") == 1 and "Traceback" not in err


def test_unwritable_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ELSA_TUNE_HOME", str(tmp_path / "file" / "home"))
    code, _, err = run("--problem", SMALL)
    assert code == exits.EXIT_MISTAKE and "ELSA_TUNE_HOME" in err


def findings() -> dict[str, doctor.Finding]:
    return {f.topic: f for f in doctor.examine()}


def test_doctor_on_a_healthy_machine(home: Path) -> None:
    found = findings()
    assert {
        "device",
        "instruction set",
        "C++ compiler",
        "OpenMP runtime",
        "database, own",
        "database, shipped",
        "kernel cache",
        "versions",
    } <= set(found)
    assert "torch" in found["versions"].detail and str(host_cpu()) in found["device"].detail
    assert run("doctor")[0] == 0


def test_doctor_names_each_lack_with_its_remedy(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_compiler, "_candidates", lambda: [])
    monkeypatch.setattr(_pool, "openmp", lambda: ("", 0))
    _compiler.find.cache_clear()
    places.home().mkdir()
    places.database().write_bytes(b"garbage" * 1000)
    places.kernels().mkdir()
    broken = places.kernels() / "abc"
    broken.mkdir()
    for name in (LIBRARY, "resources.json"):
        (broken / name).write_text("{}")
    broken.chmod(0o777)
    try:
        found = findings()
    finally:
        _compiler.find.cache_clear()
    assert "ziglang" in found["C++ compiler"].remedy or "elsa-tune[compiler]" in found["C++ compiler"].remedy
    assert "one thread" in found["OpenMP runtime"].remedy
    assert "set aside" in found["database, own"].remedy and "not a database" in found["database, own"].detail
    assert "remove" in found["kernel cache"].remedy
    assert not any(found[t].good for t in ("C++ compiler", "OpenMP runtime", "database, own", "kernel cache"))
