"""Traffic: what programs ask is recorded as it was asked, tuned by its seconds, forecast, and told at exit where nothing is known."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import elsa_tune
from elsa_tune import masks, places
from elsa_tune.device import Device, host_cpu
from elsa_tune.dispatch import ledger, notice, operator, recording, serving
from elsa_tune.errors import BadDevice, BadWorkload, ElsaTuneError
from elsa_tune.generate.cpp import native
from elsa_tune.measurement import Evidence
from elsa_tune.problem import Problem
from elsa_tune.remember import traffic as recorded
from elsa_tune.remember.database import Database
from elsa_tune.shell import cli, cli_run, exits
from elsa_tune.traffic import Asked, Traffic, merged, of, wall_of, worth_tuning
from elsa_tune.tuning import from_traffic
from elsa_tune.tuning import tune as tuning
from elsa_tune.tuning.effort import EFFORTS, Effort
from elsa_tune.tuning.forecast import forecast
from elsa_tune.tuning.report import Outcome, Report
from tests.test_dispatch import record, won

ROOT = Path(__file__).resolve().parent.parent
SMALL = "fp32.d16@b1.h2.q96.k96"
GPU = Device.parse("cuda:nvidia_h200-sm_90-c132-g140+d580.82_t12.8")


@pytest.fixture(scope="module", autouse=True)
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The extension is built once for all programs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ELSA_TUNE_HOME", str(tmp_path_factory.mktemp("built")))
        kernels = native._build().parent.parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ELSA_TUNE_KERNELS", str(kernels))
        yield


def asked(problem: str, calls: int = 1, seconds: float = 1.0) -> Asked:
    return Asked(Problem.parse(problem), calls, seconds)


def traffic(problem: str = SMALL, **more: Any) -> Traffic:
    facts: dict[str, Any] = dict(
        device=host_cpu(), calls=10, seconds=2.0, process="1f", wall=5.0, torch=str(torch.__version__), threads=2
    )
    return Traffic(problem=Problem.parse(problem), **{**facts, **more})


def decoding(lengths: Iterable[int], seconds: float = 1.0) -> list[Asked]:
    return [asked(f"fp32.d64@b1.h8.q1.k{n}", 2, seconds) for n in lengths]


# The noun.


def test_lengths_that_are_served_alike_are_one() -> None:
    found = merged(decoding(range(512, 576)))
    assert found == [asked("fp32.d64@b1.h8.q1.k512", 128, 64.0)], "the one that dispatch asks for all of them"
    assert merged(decoding(range(512, 577)))[1:] == [asked("fp32.d64@b1.h8.q1.k576", 2, 1.0)]
    assert len(merged(decoding(range(1, 4097)))) == 16 + 8 * 8, "eight in an octave"
    [most] = merged([*decoding([1499]), *decoding([1500], 3.0)])
    assert most == asked("fp32.d64@b1.h8.q1.k1500", 4, 4.0), "a length that has most of the seconds stands for itself"
    apart = [asked("fp32.d64@b1.h8.q1.k520"), asked("fp32.d64@b1.h8.q2.k520"), asked("fp32.d64@b1.h8.q1.k520.cache")]
    assert sorted(map(str, merged(apart))) == sorted(map(str, apart)), "they differ in more than keys"
    assert merged(merged(decoding(range(700, 900)))) == merged(decoding(range(700, 900)))


def test_a_winner_of_a_bucket_serves_every_length_of_it(home: Path) -> None:
    [one] = merged(decoding(range(512, 576)))
    record(won(str(one.problem), "sdpa.flash", 1.0))
    for length in range(512, 576):
        problem = one.problem.reshaped(kv_len=length)
        assert serving.current().knows(problem, host_cpu()), length
    assert not serving.current().knows(one.problem.reshaped(q_len=2048), host_cpu())


def test_small_problems_count_with_their_familys_largest() -> None:
    prompts = [asked(f"fp32.d64.causal@b1.h8.q{n}.k{n}", seconds=0.005) for n in range(100, 200)]
    large, rare = asked("fp32.d64@b1.h8.q512.k512", seconds=9.0), asked("fp32.d32@b1.h8.q9.k9", seconds=0.001)
    assert worth_tuning([*prompts, rare, large]) == {large.problem: 9.0, prompts[0].problem: pytest.approx(0.5)}


def test_a_line_is_read_as_it_was_written() -> None:
    one = traffic("bf16.d128.causal+window.softcap@b1.h32.kv8.q1.k4096.bshd.left1023.right0.softcap50")
    assert recorded.parse(one.line) == one and recorded.parse(one.line).line == one.line
    walls = [one, replace(one, wall=7.0), replace(one, process="2a", wall=3.0)]
    assert wall_of(walls) == 10.0, "of each process once"
    there = replace(one, device=replace(host_cpu(), cores=999))
    assert of(host_cpu(), [one, there]) == [one] and of(host_cpu(), [there]) == [there] == of(GPU, [there])


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "not JSON"),
        ("[]", "line 2"),
        ("x" * 9000, "line 2"),
        (traffic(calls=0).line, "calls"),
        (traffic(seconds=-1.0).line, "seconds"),
        (traffic().line.replace(SMALL, "fp32"), "problem 'fp32' is misspelled"),
        (traffic().line.replace("cpu:", "abacus "), "device 'abacus"),
        (traffic().line.replace('"wall":5.0', '"wall":NaN'), "line 2"),
        (traffic().line.replace('"wall"', '"more":1,"wall"'), "more"),
        ('{"device": 3}', "device"),
    ],
)
def test_a_malformed_file_is_one_clear_error(line: str, told: str, home: Path, tmp_path: Path) -> None:
    path = tmp_path / "traffic.jsonl"
    path.write_text(f"{traffic().line}\n{line}\n")
    with pytest.raises(BadWorkload, match="line 2") as caught:
        recorded.read(path)
    assert told in str(caught.value)
    code, out, err = run("--from-traffic", str(path))
    assert code == exits.EXIT_MISTAKE and not out and err.startswith("elsa-tune: traffic ") and err.count("\n") == 1


def test_files_and_databases_hold_each_line_once(home: Path, tmp_path: Path) -> None:
    one, other = traffic(), traffic(process="2a")
    path = tmp_path / "traffic.jsonl"
    path.write_text(f"{one.line}\n\n{other.line}\n{one.line}\n")
    assert recorded.read(path) == [one, other]
    for _ in range(2):
        with Database.for_writing() as database:
            database.keep_traffic([one, other, one])
    assert recorded.read(places.database()) == [one, other]
    with pytest.raises(BadWorkload, match="No such file"):
        recorded.read(tmp_path / "nothing")
    with Database.for_writing(tmp_path / "fresh.db") as database:
        database._connection.execute("DROP TABLE traffic")  # as an earlier version left it
    assert recorded.read(tmp_path / "fresh.db") == []
    with Database.for_writing(tmp_path / "fresh.db") as database:
        database._connection.execute("INSERT INTO traffic SELECT 1, 'x', 'y', 1, 1, '1f', 1, '2', 1")
    with pytest.raises(BadWorkload, match="line 1: device 'x'"):
        recorded.read(tmp_path / "fresh.db")
    code, _, err = run("--from-traffic", str(path), "--problem", SMALL)
    assert code == exits.EXIT_MISTAKE and "leave out --problem" in err
    path.write_text("")
    assert "is empty" in run("--from-traffic", str(path))[2]


# Recording: programs in processes of their own.

PROGRAM = """
import multiprocessing, os, sys, torch
from torch.nn.functional import scaled_dot_product_attention as sdpa
torch.set_num_threads(1)  # torch's threads do not survive a fork

def work(times):
    q = torch.randn(1, 2, 8, 16)
    for _ in range(times):
        sdpa(q, q, q)

if __name__ == "__main__":
    x = torch.randn(2, 4, 50, 16)
    for _ in range(7):
        sdpa(x, x, x)
    for _ in range(5):
        sdpa(x, x, x, is_causal=True)
    x.requires_grad_()
    for _ in range(2):
        sdpa(x, x, x).sum().backward()
    q, cache, grown = torch.randn(1, 4, 1, 16), torch.randn(1, 4, 512, 16), torch.randn(1, 4, 199, 16)
    for n in range(200, 264):
        grown = torch.cat([grown, q], 2)
        for _ in range(3):
            sdpa(q, cache[:, :, :n], cache[:, :, :n])
            sdpa(q, grown, grown, torch.zeros(1, 1, 1, n))
    for method in sys.argv[1:]:
        process = multiprocessing.get_context(method).Process(target=work, args=(9,))
        process.start()
        process.join()
    if not os.fork():
        work(4)
        sys.exit()
    os.wait()
    import elsa_tune
    print(sorted({row.kernel for row in elsa_tune.served()}))
    1 / 0
"""
SELF = "fp32.d16@b2.h4.q50.k50"


def environment(tmp_path: Path, **variables: str) -> dict[str, str]:
    """Of a Python in which the package is installed."""
    there = tmp_path / "installed" / "elsa_tune_there-1.dist-info"
    there.mkdir(parents=True, exist_ok=True)
    (there / "METADATA").write_text("Metadata-Version: 2.1\nName: elsa-tune-there\nVersion: 1\n")
    (there / "entry_points.txt").write_text("[torch.backends]\nthere = elsa_tune_autoload:load\n")
    own = {
        name: x for name, x in os.environ.items() if name != notice.TELLER
    }  # this process is not its parent, it tests it
    return {**own, "PYTHONPATH": f"{ROOT}:{there.parent}", **variables}


def started(tmp_path: Path, program: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    path = tmp_path / "program.py"
    path.write_text(program)
    return subprocess.run(
        [sys.executable, str(path), *arguments], env=environment(tmp_path, **variables), capture_output=True, text=True, check=False,
        timeout=120,
    )  # fmt: skip


def calls(path: Path) -> Counter[str]:
    return Counter(
        {p: n for one in merged(t.asked for t in recorded.read(path)) for p, n in [(str(one[0]), one.calls)]}
    )


@pytest.mark.parametrize("way", ["extension", pytest.param("Python", marks=pytest.mark.slow)])
def test_what_a_program_asks_is_recorded_exactly(way: str, home: Path, tmp_path: Path) -> None:
    record(won(SELF))  # which must not serve
    file, missing = tmp_path / "traffic.jsonl", {"CXX": "/bin/false", "PATH": "/nowhere"}
    methods = ("fork", "spawn") if way == "extension" else ()
    done = started(tmp_path, PROGRAM, *methods, ELSA_TUNE_RECORD=str(file), **(missing if way == "Python" else {}))
    assert done.stderr.startswith("Traceback") and done.stderr.count("\n") == 5, "nothing but its own mistake"
    assert done.stdout == "['torch']\n", "as if nothing were known"
    lines = recorded.read(file)
    assert {one.device for one in lines} == {host_cpu()} and {one.threads for one in lines} == {1}
    assert len({one.process for one in lines}) == 2 + len(methods), "each process has lines of its own"
    found = calls(file)
    assert found.pop(SELF) == 9 and found.pop("fp32.d16.causal@b2.h4.q50.k50") == 5
    assert found.pop("fp32.d16.backward@b2.h4.q50.k50") == 2
    assert found.pop("fp32.d16@b1.h2.q8.k8") == 9 * len(methods) + 4
    few = Counter(
        {192: 24, 208: 48, 224: 48, 240: 48, 256: 24}
    )  # calls of 64 lengths, by the least that is served alike
    nearby = Counter({str(Problem.parse(p).nearby): 0 for p in found})
    for problem, count in found.items():
        nearby[str(Problem.parse(problem).nearby)] += count
    cached = {f"fp32.d16@b1.h4.q1.k{n}.cache": count for n, count in few.items()}
    assert nearby == cached | {f"fp32.d16.bias@b1.h4.q1.k{n}": count for n, count in few.items()}
    assert len(found) == 2 * len(few), "each is a line"
    assert all(0 < one.seconds < one.wall for one in lines)


def test_rows_of_a_growing_cache_never_run_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "_rows", {})
    monkeypatch.setattr(ledger, "MOST", 64)
    for problem, _, _ in decoding(range(1, 2049)):
        ledger.row(problem, ledger.TORCH, str(host_cpu())).count(time.perf_counter())
    found = ledger.asked_of_torch(ledger.served())[host_cpu()]
    assert sum(one.calls for one in found) == 2048 and len(ledger.served()) <= 2 * 64
    assert [one for one in ledger.served() if one.problem == ledger.OTHERS] == []


def test_masks_of_ours_that_torch_answers_are_counted(home: Path) -> None:
    ledger.forget()
    serving.refresh()
    query, key, value = torch.randn(3, 2, 4, 33, 16)
    for _ in range(3):
        elsa_tune.attention(query, key, value, masks.window(7))
    with torch.autocast("cpu", torch.bfloat16):
        elsa_tune.attention(query, key, value)  # of another dtype than it seems, which no kernel is asked for
    for _ in range(2):  # as compiled code asks
        operator.call(query, key, value, masks.window(3), False, None, False, False)
    told = {row.problem: (row.calls, row.kernel, row.device) for row in elsa_tune.served()}
    counts = {f"fp32.d16.window@b2.h4.q33.k33.left{left}.right0": n for left, n in ((7, 3), (3, 2))}
    assert told == {problem: (n, ledger.TORCH, str(host_cpu())) for problem, n in counts.items()}


def test_a_file_that_cannot_be_written_stops_no_program(tmp_path: Path) -> None:
    program = "import torch\nq = torch.ones(1, 1, 2, 16)\nprint(torch.nn.functional.scaled_dot_product_attention(q, q, q).sum())"
    done = started(tmp_path, program, ELSA_TUNE_RECORD="/nowhere/at/all", ELSA_TUNE_HOME=str(tmp_path / "home"))
    assert "32." in done.stdout and done.returncode == 0 and "is not recorded: FileNotFoundError" in done.stderr


# Tuning for it.


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(cli.main, arguments)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


ASKS = """
import sys, torch
x, y = torch.randn(1, 2, 96, 16), torch.randn(1, 4, 33, 16)
for i in range(400):
    torch.nn.functional.scaled_dot_product_attention(x, x, x)
sys.exit(3)
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """A command that asks SMALL 400 times and ends with status 3."""
    for name, value in environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    path = tmp_path / "asks.py"
    path.write_text(ASKS)
    return sys.executable, str(path)


def test_run_records_tunes_and_says_what_is_gained(
    program: tuple[str, ...], home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(EFFORTS, "quick", Effort(trials=2, fewest=2, seconds=5, final_rounds=5))
    file = tmp_path / "kept.jsonl"
    code, out, err = run("run", "--budget", "3", "-o", str(file), "--", *program)
    assert code == exits.EXIT_INCOMPLETE and not out, "the program failed, and stdout is its own"
    assert "exit status 3" in err and "400 calls of 1 problem took" in err and f"{SMALL}" in err
    assert "attention on cpu:" in err and "the program as a whole:" in err and "ELSA_TUNE=1" in err
    [one] = recorded.read(file)
    assert (str(one.problem), one.calls) == (SMALL, 400) and recorded.read(places.database()) == [one]
    code, out, _ = run("--from-traffic", str(file), "--budget", "1", "--json")
    report = json.loads(out)
    [told] = report["forecasts"]
    assert code == 0 and report["complete"] and told["gains"][0]["calls"] == 400
    assert told["before"] == one.seconds and told["after"]["median"] <= told["before"] and told["whole"]["low"] >= 0.9
    assert [path.name for path in places.home().iterdir() if path.name.startswith("traffic")] == []


def test_what_was_recorded_outlives_an_interruption(
    program: tuple[str, ...], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights: list[Any] = []

    def stopped(problems: Any, **options: Any) -> Report:
        weights.append(problems)
        raise KeyboardInterrupt

    monkeypatch.setattr(tuning, "tune", stopped)
    code, _, err = run("run", "--", *program)
    assert code == exits.EXIT_INTERRUPTED and f"elsa-tune --from-traffic {places.database()}" in err
    [one] = recorded.read(places.database())
    assert weights == [{one.problem: one.seconds}] and one.calls == 400
    assert run("--from-traffic", str(places.database()))[0] == exits.EXIT_INTERRUPTED and weights[1] == weights[0]


def test_nothing_recorded_is_said_with_its_reason(tmp_path: Path, home: Path, program: tuple[str, ...]) -> None:
    code, _, err = run("run", "--", "true")
    assert code == exits.EXIT_MISTAKE and "no Python of the command imported torch" in err and "exit status 0" in err
    code, _, err = run("run", "--", sys.executable, "-c", "import torch")
    assert code == exits.EXIT_MISTAKE and "the program asked no attention" in err
    assert "SIGTERM" in run("run", "--", "sh", "-c", "kill -TERM $$")[2]
    code, _, err = run("run", "--", "/no/such/program")
    assert code == exits.EXIT_MISTAKE and "No such file" in err and err.count("\n") == 1
    code, _, err = run("run", "-o", "/nowhere/at/all", "--", "true")
    assert code == exits.EXIT_MISTAKE and "-o" in err
    for name, text in (("some.db", b"SQLite format 3\0 and more"), ("some.py", b"import this\n")):
        (tmp_path / name).write_bytes(text)
        code, _, err = run("run", "-o", str(tmp_path / name), "--", "true")
        assert code == exits.EXIT_MISTAKE and name in err and (tmp_path / name).read_bytes() == text


def test_our_own_commands_are_not_served(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "elsa_tune.shell.cli", "winners"], env=environment(tmp_path, ELSA_TUNE="1"), capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert not done.stderr


def test_an_unended_last_line_is_left_out(tmp_path: Path) -> None:
    line = Traffic(
        device=host_cpu(), problem=Problem.parse(SMALL), calls=1, seconds=0.5, process="ab", wall=1.0, torch="2", threads=1
    ).line  # fmt: skip
    file = tmp_path / "traffic"
    file.write_text(f"{line}\n{line[:40]}")
    assert [one.line for one in recorded.read(file)] == [line]
    file.write_text(f"{line[:40]}\n{line}\n")
    with pytest.raises(BadWorkload, match="line 1"):
        recorded.read(file)


def test_many_small_problems_are_tuned_by_the_largest() -> None:
    many = [Asked(Problem.parse(f"fp32.d{n}@b1.h2.q96.k96"), 1, 1.0 + n / 1e6) for n in range(1, 200)]
    assert worth_tuning(many) == {many[-1].problem: pytest.approx(sum(one.seconds for one in many))}
    assert worth_tuning([Asked(many[0].problem, 1, 0.0)]) == {many[0].problem: 1.0}


def test_signals_are_the_programs(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    script = f'trap "exit 7" TERM; trap "exit 8" USR1; : > {ready}; while :; do sleep 0.02; done'

    def send(number: int) -> None:
        while not ready.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)  # which a terminal sends to both
        os.kill(os.getpid(), number)

    for number, status in ((signal.SIGTERM, 7), (signal.SIGUSR1, 8)):
        ready.unlink(missing_ok=True)
        before = signal.getsignal(number)
        thread = threading.Thread(target=send, args=(number,))
        thread.start()
        assert cli_run._run(("sh", "-c", script), tmp_path / "file").status == status
        thread.join()
        assert signal.getsignal(number) == before


def test_trials_are_proportional_to_seconds() -> None:
    a, b = Problem.parse(SMALL), Problem.parse("fp32.d16@b1.h2.q9.k9")
    assert tuning._weighted({a: 3.0, b: 1.0}) == {a: 1.5, b: 0.5} and tuning._weighted([SMALL, a, b]) == {
        a: 1.0,
        b: 1.0,
    }
    effort = EFFORTS["quick"]
    whole = effort.target(1e-3, False)
    assert effort.target(1e-3, False, 2.5) == round(2.5 * whole) and effort.target(1e-3, False, 0.01) == effort.fewest
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ElsaTuneError, match="above 0"):
            tuning._weighted({a: wrong})


def test_devices_of_traffic(home: Path) -> None:
    assert from_traffic.devices("auto", [traffic()]) == [host_cpu()]
    assert from_traffic.devices("cpu", [traffic(device=GPU)]) == [host_cpu()], "for another device, where one is named"
    with pytest.raises(BadDevice, match="h200.*--device"):
        from_traffic.devices("auto", [traffic(device=GPU)])


def test_a_forecast_is_amdahls() -> None:
    fast, slow, none = SMALL, "fp32.d32@b1.h2.q96.k96", "fp32.d48@b1.h2.q96.k96"
    found = [traffic(fast, seconds=6.0), traffic(slow, seconds=2.0), traffic(none, seconds=1.0)]

    def outcome(problem: str, variant: str, ratio: float) -> Outcome:
        final = won(problem, "sdpa.flash", ratio=ratio)
        final = replace(final, variant=variant, role="rival" if variant.startswith("sdpa") else "candidate")
        return Outcome(Problem.parse(problem), host_cpu(), Evidence(final, ratio, ratio / 1.5, ratio * 1.5, 1))

    outcomes = [outcome(fast, "cpp.x", 3.0), outcome(slow, "sdpa.math", 1.2)]
    told = forecast(found, outcomes, host_cpu(), wall=20.0)
    assert (
        told.before == 9.0
        and told.after.median == 5.0
        and (told.after.low, told.after.high) == pytest.approx((13 / 3, 6.0))
    )
    assert told.attention.median == pytest.approx(9 / 5) and told.whole is not None
    assert told.whole.median == pytest.approx(20 / 16) and told.whole.low == pytest.approx(20 / 17)
    assert [gain.saved for gain in told.gains] == pytest.approx([4.0, 0.0, 0.0])
    assert forecast(found, outcomes, host_cpu(), wall=1.0).whole is None, "calls ran side by side"
    elsewhere = forecast([replace(one, device=GPU) for one in found], outcomes, host_cpu(), wall=20.0)
    assert elsewhere.before == pytest.approx(10 * 1e-3 * 3.0 + 10 * 1e-3) and elsewhere.whole is None
    assert forecast(found, [], host_cpu()).attention.median == 1.0


# The notice at exit.


@pytest.fixture
def often(home: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A problem that this process asked often, by what the ledger says."""
    monkeypatch.setattr(ledger, "_rows", {})
    row = ledger.row(Problem.parse(SMALL), ledger.TORCH, str(host_cpu()))
    row.calls, row.seconds = notice.OFTEN, notice.LONG
    return SMALL


def test_a_problem_that_recurs_with_no_winner_is_told(often: str, capsys: pytest.CaptureFixture[str]) -> None:
    for length in range(1024, 1040):
        row = ledger.row(Problem.parse(f"fp32.d64@b1.h8.q1.k{length}"), ledger.TORCH, str(host_cpu()))
        row.calls, row.seconds = 1, notice.LONG
    notice.tell(serving.current())
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "torch took 1.7 s over 2 problems" in told
    assert told.endswith(f"elsa-tune --problem fp32.d64@b1.h8.q1.k1024 --problem {SMALL}\n"), "a growing cache is one"


def test_what_is_known_rare_or_hopeless_is_not_told(often: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [str(one.problem) for one in notice.unknown(serving.current())] == [SMALL]
    name = (SMALL, ledger.TORCH, str(host_cpu()))
    for calls, seconds in ((notice.OFTEN - 1, 9.0), (9999, notice.LONG / 2)):
        ledger._rows[name].calls, ledger._rows[name].seconds = calls, seconds
        assert not notice.unknown(serving.current())
    ledger._rows[name].calls, ledger._rows[name].seconds = 9999, 9.0
    for problem, device in (
        ("fp32.d999@b1.h2.q96.k96", str(host_cpu())),
        ("no problem of ours", str(host_cpu())),
        (SMALL, "mps"),
    ):
        ledger._rows[problem, ledger.TORCH, device] = ledger._rows[name]
    assert len(notice.unknown(serving.current())) == 1
    record(won(SMALL, "sdpa.flash", 1.0))
    assert not notice.unknown(serving.current()), "torch's own kernel is known to be the fastest"


def test_nobody_is_told_twice_or_in_vain(
    often: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("ELSA_TUNE_TRACE", "0")
        notice.tell(serving.current())
    with monkeypatch.context() as patch:
        patch.setattr(notice, "_process", os.getpid() + 1)  # as in a forked child
        notice.tell(serving.current())
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", None)
        notice.tell(serving.current())
    assert not capsys.readouterr().err and not recording.active


LONG = """
import os, sys, torch
torch.set_num_threads(1)
q = torch.randn(1, 8, 512, 40, dtype=torch.float64)  # of which no winner is shipped
for _ in range(20):
    torch.nn.functional.scaled_dot_product_attention(q, q, q)
if not os.fork():
    torch.nn.functional.scaled_dot_product_attention(q, q, q)
    sys.exit()
os.wait()
if "started" not in sys.argv:
    import subprocess
    subprocess.run([sys.executable, __file__, "started"], check=True)
"""


def test_a_program_is_told_once_when_it_ends(tmp_path: Path, home: Path) -> None:
    told = started(tmp_path, LONG, ELSA_TUNE="1").stderr
    assert told.count("\n") == 1 and told.rstrip().endswith("elsa-tune --problem fp64.d40@b1.h8.q512.k512")
    assert not started(tmp_path, LONG, ELSA_TUNE="1", ELSA_TUNE_RECORD=str(tmp_path / "file")).stderr
    assert not started(tmp_path, "import os\nos.close(2)\n" + LONG, ELSA_TUNE="1").returncode
