"""Measurements that travel: canonical lines, merging, what is refused, signatures, remote files, layers, races, drift."""

from __future__ import annotations

import gzip
import http.server
import json
import os
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from victim import made

import elsa_tune
from elsa_tune import places
from elsa_tune.device import host_cpu
from elsa_tune.dispatch import serving
from elsa_tune.errors import BadMeasurements, BadSettings, NotTrusted
from elsa_tune.generate import cpp
from elsa_tune.generate import kernel_cache as _kernel_cache
from elsa_tune.measurement import STATUSES, Evidence, Measurement, canonical
from elsa_tune.problem import Problem
from elsa_tune.prove import check
from elsa_tune.remember import earlier, foreign, layers, lines, signatures
from elsa_tune.remember import settings as configuration
from elsa_tune.remember.database import Database
from elsa_tune.shell import cli
from elsa_tune.space import Space
from elsa_tune.tuning import canaries, drift, recall
from elsa_tune.tuning import tune as tuning
from elsa_tune.tuning.effort import Effort
from elsa_tune.tuning.run import Run
from elsa_tune.tuning.search import searches
from elsa_tune.tuning.task import Task

HERE = host_cpu()
SMALL = "fp32.d16@b1.h2.q96.k96"
VARIANTS = [
    "sdpa.flash",
    "sdpa.math",
    *Space.read("cpp").start[:4],
    *Space.read("cuda").start[:3],
    *Space.read("triton").start[:2],
]
number = st.floats(0, 1e12, allow_nan=False)
sample = st.floats(1e-9, 1e5)
texts = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=40)


@st.composite
def measurements(draw: st.DrawFn) -> Measurement:
    """Any measurement that a machine could have made."""
    samples = draw(st.lists(sample, max_size=6))
    variant, incumbent = draw(st.sampled_from(VARIANTS)), draw(st.sampled_from(["", "plain", "sdpa.flash"]))
    return Measurement(
        **earlier.roles(variant, incumbent),
        device=draw(st.sampled_from([str(HERE), "cpu:amd_f25m17-zen4-c8", "cuda:nvidia_h200-sm_90-c132-g140+d580.82_t12.8"])),
        problem=draw(st.sampled_from([SMALL, "fp16.d64.causal@b2.h8.kv2.q100.k1000.graph", "bf16.d40.v80.backward@b1.h1.q1.k1"])),
        variant=variant, status=draw(st.sampled_from(STATUSES)), stage=draw(st.sampled_from(["trial", "final"])),
        digest=draw(st.text("0123456789abcdef", max_size=20)), reason=draw(texts), error=draw(st.none() | number),
        ratio=draw(st.none() | number), ratio_low=draw(st.none() | number), seconds=draw(st.none() | number), samples=tuple(samples),
        incumbent=incumbent, incumbent_samples=tuple(draw(st.lists(sample, max_size=20))),
        resources=draw(st.dictionaries(st.sampled_from(["registers", "spills"]), st.integers(0, 1 << 40))),
        provenance=draw(st.dictionaries(st.sampled_from(["torch", "peak"]), texts | st.floats(-1e9, 1e9))), created=draw(st.floats(0, 1e10)),
    )  # fmt: skip


contents = st.lists(measurements(), max_size=5)
patient = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@given(contents)
@settings(patient, max_examples=200)
def test_what_is_written_is_read_back_everywhere(rows: list[Measurement]) -> None:
    assert [Measurement.from_line(m.line) for m in rows] == rows
    assert [canonical(json.loads(m.line)) for m in rows] == [m.line for m in rows]
    assert [foreign.sound(m.line) for m in rows] == rows
    database = Database.in_memory(rows, "test")
    assert {m.line for m in database} == {m.line for m in rows} and not database.damaged()


def test_any_number_is_written_as_json() -> None:
    """Whole, tiny, huge and none: a kernel may err by infinity."""
    odd = (0.0, -0.0, 3.0, 1e-300, 1.5e-5, 123456.0, 1234570.0, 2.5e6, 1e16, float("inf"), float("nan"))
    written = replace(made(1), samples=odd, incumbent_samples=odd[::-1], error=float("inf"), constant=float("nan")).line
    assert canonical(json.loads(written)) == written and json.loads(written)["samples"][:9] == list(odd[:9])


def test_importing_writes_and_parses_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Facts of a measurement are encoded once for its line, name and row; a spelling that thousands share is judged once."""
    rows = [replace(made(n), resources={"spills": n}) for n in range(300)]
    lines.write(rows, tmp_path / "rows.jsonl")
    encoded: list[object] = []
    spelled: list[str] = []
    spell = Problem.__str__
    monkeypatch.setattr("elsa_tune.measurement.canonical", lambda value: encoded.append(value) or canonical(value))
    monkeypatch.setattr(Problem, "__str__", lambda problem: spelled.append("") or spell(problem))
    assert foreign.import_from(str(tmp_path / "rows.jsonl"), Database.in_memory([], "test")).new == 300
    assert sum(isinstance(value, dict) for value in encoded) == 600
    assert len(spelled) <= len({m.problem for m in rows}) == 30


@given(contents, contents, contents)
@settings(patient, max_examples=300)
def test_merging_is_idempotent_commutative_and_associative(
    tmp_path: Path, a: list[Measurement], b: list[Measurement], c: list[Measurement]
) -> None:
    def file(name: str) -> Path:
        return tmp_path / f"{name}.jsonl"

    def merged(*names: str) -> bytes:
        target = "".join(("m", *names))
        foreign.merge([str(file(name)) for name in names], file(target))
        return file(target).read_bytes()

    for name, rows in (("a", a), ("b", b), ("c", c)):
        lines.write(rows, file(name))
    assert merged("a", "a") == file("a").read_bytes()
    assert merged("a", "b") == merged("b", "a")
    merged("b", "c")
    assert merged("mab", "c") == merged("a", "mbc") == merged("c", "b", "a")
    assert {m.line for m in (*a, *b, *c)} == set(file("mcba").read_text().splitlines()), "failures and samples are kept"


@given(contents, contents)
@settings(patient, max_examples=100)
def test_importing_is_merging(a: list[Measurement], b: list[Measurement]) -> None:
    both = Database.in_memory(a, "test")
    assert both.add(b) == len({m.id for m in b} - {m.id for m in a}) and both.add(a) == 0
    assert lines.sorted_lines(both) == lines.sorted_lines([*b, *a])


@given(st.binary(max_size=300) | st.text(max_size=300).map(str.encode))
@settings(patient, max_examples=1500)
def test_any_bytes_are_counted_never_believed(content: bytes) -> None:
    line = content.decode(errors="replace").replace("\n", " ")
    with pytest.raises(ValueError):
        foreign.sound(line)


@given(measurements(), st.data())
@settings(patient, max_examples=1500)
def test_a_changed_line_is_refused_or_sound(m: Measurement, data: st.DataObject) -> None:
    """A fuzzer on the importer: change any field to anything; what gets in is spelled as this program spells it."""
    content = json.loads(m.line)
    junk = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3), max_leaves=8,
    )  # fmt: skip
    name = data.draw(st.sampled_from(sorted(Measurement.__dataclass_fields__)) | st.text(max_size=10))
    content[name] = data.draw(junk)
    try:
        read = foreign.sound(json.dumps(content))
    except ValueError as error:
        assert len(str(error)) <= 200 and str(error).isprintable()
        return
    assert read.status in STATUSES and str(Problem.parse(read.problem)) == read.problem and read.variant in VARIANTS
    assert foreign.sound(read.line) == read
    assert next(iter(Database.in_memory([read], "test"))) == read


BASE = {"device": "cpu:a-b-c1", "problem": SMALL, "variant": "sdpa.math", "status": "ok"}
DEEP = "[" * 30_000 + "]" * 30_000
HOSTILE = {
    "no JSON": ("nonsense", "line"),
    "no mapping": ("[1, 2]", "line"),
    "nothing": ("{}", "device"),
    "a shell's text": ({"variant": "cpp; rm -rf /"}, "variant"),
    "a path for a backend": ({"variant": "../../etc/passwd"}, "variant"),
    "a path for a device": ({"device": "cpu:../../x"}, "device"),
    "a template's text": ({"variant": "{{ 7 * 7 }}.serial"}, "variant"),
    "SQL in a problem": ({"problem": "fp32.d64'; DROP TABLE records; --"}, "problem"),
    "SQL in a digest": ({"digest": "' OR 1=1"}, "digest"),
    "a path in a digest": ({"digest": "../../kernel"}, "digest"),
    "an unknown status": ({"status": "won"}, "status"),
    "a huge integer": ({"problem": f"fp32.d{'9' * 5000}@b1.h1.q1.k1"}, "problem"),
    "a large dimension": ({"problem": "fp32.d9999999999999@b1.h1.q1.k1"}, "problem"),
    "a huge number": ({"ratio": 1e300}, "ratio"),
    "a negative sample": ({"samples": [-1.0]}, "samples"),
    "an impossible sample": ({"samples": [1e-20]}, "samples"),
    "text for a number": ({"seconds": "1"}, "seconds"),
    "a bool for a number": ({"seconds": True}, "seconds"),
    "not a number": (json.dumps({**BASE, "ratio": float("nan")}), "ratio"),
    "infinity": (json.dumps({**BASE, "ratio": float("inf")}), "ratio"),
    "a large exponent": (json.dumps(BASE)[:-1] + ', "ratio": 1e999}', "ratio"),
    "a list for a mapping": ({"resources": []}, "resources"),
    "a name that is a path": ({"resources": {"../x": 1}}, "resources"),
    "depth": (json.dumps(BASE)[:-1] + f', "samples": {DEEP}}}', "line"),
    "depth in a name nobody knows": (f'{{"x": {DEEP}}}', "line"),
    "a name twice": (json.dumps(BASE)[:-1] + ', "status": "wrong"}', "twice"),
    "an inner name twice": (json.dumps(BASE)[:-1] + ', "resources": {"a": 1, "a": 2}}', "twice"),
    "a field of the future": ({"winner": True}, "winner"),
    "an axis of the future": ({"variant": "cpp.serial.avx512.l16.q3.k8.v8.n64.quantum"}, "variant"),
    "a backend of the future": ({"variant": "mojo.serial"}, "variant"),
    "a look-alike letter": ({"variant": "sdpа.math"}, "variant"),
    "digits of another script": ({"problem": "fp32.d٦٤@b1.h1.q1.k1"}, "problem"),
    "another spelling": ({"problem": " fp32.d64@b1.h1.q1.k1"}, "problem"),
    "a terminal's escape": ({"reason": "\x1b[2Jyou are fine"}, "reason"),
    "an escape in a name": ({"\x1b[2J": 1}, "x1b"),
    "a newline in a fact": ({"provenance": {"torch": "2\n"}}, "provenance"),
    "words for a peak": ({"provenance": {"peak_gflops": "fast"}}, "peak_gflops"),
    "a word for a share": ({"provenance": {"disturbed": "yes"}}, "disturbed"),
    "many facts": ({"provenance": {f"f{i}": 1.0 for i in range(100)}}, "provenance"),
    "many samples": ({"samples": [1.0] * 12_000}, "samples"),
    "a long line": ({"samples": [1.0] * 20_000}, "longer"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_lines_are_counted_by_reason(name: str, home: Path, tmp_path: Path) -> None:
    content, reason = HOSTILE[name]
    line = content if isinstance(content, str) else json.dumps({**BASE, **content})
    file = tmp_path / "results.jsonl"
    file.write_text(f"{line}\n{json.dumps(BASE)}\n")
    done = CliRunner().invoke(cli.main, ["db", "import", str(file)])
    assert done.exit_code == 1 and "1 measurements, 1 of them new" in done.output
    left_out = next(text for text in done.output.splitlines() if text.startswith("left out 1: "))
    assert reason in left_out and left_out.isprintable() and len(left_out) < 250
    with Database.for_reading(places.database()) as database:
        assert [m.variant for m in database] == ["sdpa.math"]


def test_bombs_are_refused_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    endless = tmp_path / "line.jsonl.gz"
    endless.write_bytes(gzip.compress(b"[" * 200_000_000, 1))
    start = time.monotonic()
    with pytest.raises(BadMeasurements, match="endless"):
        foreign.import_from(str(endless), Database.in_memory([], "test"))
    assert time.monotonic() - start < 5  # the line is never read whole
    monkeypatch.setattr(foreign, "MOST_BYTES", 1 << 20)
    many = tmp_path / "lines.jsonl.gz"
    many.write_bytes(gzip.compress(b"\n" * 3_000_000))
    with pytest.raises(BadMeasurements, match="unpacked"):
        foreign.import_from(str(many), Database.in_memory([], "test"))
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(made(1).line.encode() * 100)[:-20])
    with pytest.raises(BadMeasurements):
        foreign.import_from(str(cut), Database.in_memory([], "test"))


def test_a_database_from_elsewhere_is_foreign_too(tmp_path: Path) -> None:
    """Rows of a SQLite file are judged as lines are; one that is no database of ours is refused."""
    with Database.for_writing(tmp_path / "theirs.db") as theirs:
        theirs.record(made(1))
        theirs.record(replace(made(2), variant="cpp; rm -rf /"))
    mine = Database.in_memory([], "test")
    found = foreign.import_from(str(tmp_path / "theirs.db"), mine)
    assert (found.sound, sum(found.refused.values())) == (1, 1) and mine.measurements(local=True) == []
    (tmp_path / "other.db").write_bytes((tmp_path / "theirs.db").read_bytes()[:5000])
    with pytest.raises((BadMeasurements, elsa_tune.errors.DatabaseUnusable)):
        foreign.import_from(str(tmp_path / "other.db"), mine)


def test_files_of_the_command_line(home: Path, tmp_path: Path) -> None:
    """Export, merge and diff; packed files too; the same content is the same bytes."""

    def run(*arguments: object, code: int = 0) -> str:
        done = CliRunner().invoke(cli.main, ["db", *map(str, arguments)])
        assert done.exit_code == code, done.output
        return done.output

    with Database.for_writing() as database:
        for m in map(made, range(5)):
            database.record(m)
    one, two, packed = tmp_path / "one.jsonl", tmp_path / "two.jsonl", tmp_path / "packed.jsonl.gz"
    assert "5 measurements" in run("export", "-o", one) and run("export").splitlines() == one.read_text().splitlines()
    run("export", "-o", packed)
    assert gzip.decompress(packed.read_bytes()) == one.read_bytes()
    assert "1 measurements" in run("export", "--problem", made(3).problem, "-o", two)
    assert "misspelled" in run("export", "--problem", "fp32.d64@b1", code=2)
    assert "nothing was measured here" in run("export", "--problem", "fp32.d8@b1.h1.q1.k1", code=2)
    other = replace(
        made(3), ratio=4.0, ratio_low=3.9, ratio_high=4.1, created=99.0, variant="cpp.serial.avx512.l16.q3.k8.v8.n96"
    )
    lines.write([other], two)
    told = run("diff", one, two, code=1)
    assert "0 measurements in both, 5 only in the first, 1 only in the second" in told and other.variant in told
    assert "6 measurements, of 6 read" in run("merge", one, two, "-o", tmp_path / "both.jsonl")
    run("merge", two, packed, one, "-o", tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "both.jsonl").read_bytes()
    assert "6 measurements, 1 of them new" in run("import", tmp_path / "both.jsonl")
    info = run("info")
    assert "own" in info and "5 measurements" in info and "imported" in info and "1 measurements" in info
    assert "6 measurements are what was recorded" in run("verify")
    (places.kernels() / "old").mkdir(parents=True)
    os.utime(places.kernels() / "old", (1, 1))
    assert "1 kernels removed" in run("gc") and not (places.kernels() / "old").exists()
    assert "6 measurements are what was recorded" in run("verify"), "collecting removes no measurement"
    assert "kernel cache" in run("doctor")
    assert "nowhere" in run("import", tmp_path / "nowhere.jsonl", code=2)
    assert "ftp" in run("import", "ftp://somewhere/x.jsonl", code=2)
    assert "nowhere" in run("export", "-o", tmp_path / "nowhere" / "x.jsonl", code=2)


# Signatures.


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    made_keys = (tmp_path / "ours", tmp_path / "theirs")
    for key in made_keys:
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(key)], check=True)
    return made_keys


def trust(home: Path, *keys: Path) -> None:
    home.mkdir(exist_ok=True)
    listed = ", ".join(json.dumps(key.with_suffix(".pub").read_text().strip()) for key in keys)
    (home / "config.toml").write_text(f"trusted = [{listed}]\n")


def test_signed_exports(home: Path, tmp_path: Path, keys: tuple[Path, Path]) -> None:
    ours, theirs = keys
    file = tmp_path / "out.jsonl"
    with Database.for_writing() as database:
        database.record(made(1))
    done = CliRunner().invoke(cli.main, ["db", "export", "--sign", str(ours), "-o", str(file)])
    assert done.exit_code == 0 and (tmp_path / "out.jsonl.sig").exists(), done.output
    target = Database.in_memory([], "test")
    trust(home, ours, theirs)
    assert foreign.import_from(str(file), target).new == 1
    trust(home, theirs)
    with pytest.raises(NotTrusted, match="not signed by anyone"):
        foreign.import_from(str(file), target)
    trust(home, ours)
    file.write_text(file.read_text() + made(2).line + "\n")
    with pytest.raises(NotTrusted):
        foreign.import_from(str(file), target)
    with pytest.raises(NotTrusted):
        foreign.merge([str(file)], tmp_path / "merged.jsonl")
    (tmp_path / "out.jsonl.sig").unlink()
    with pytest.raises(NotTrusted, match="ask for its"):
        foreign.import_from(str(file), target)
    assert len(target) == 1
    with pytest.raises(NotTrusted, match="cannot be signed"):
        signatures.sign(file, tmp_path / "no key")


# Layers.


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "www").mkdir()
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "www"))
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}"
    running.shutdown()


def variant_here() -> str:
    isa = HERE.isas[0]
    return f"cpp.serial.{isa}.l{cpp.ISAS[isa].lanes}.q2.k4.v4.n48"


def won(problem: str = SMALL, ratio: float = 2.0, **more: object) -> Measurement:
    facts: dict[str, object] = dict(
        device=str(HERE), problem=problem, variant=variant_here(), status="ok", stage="final", error=1e-7, seconds=1e-4,
        ratio=ratio, ratio_low=0.98 * ratio, ratio_high=1.02 * ratio, incumbent="sdpa.flash", created=1.0,
    )  # fmt: skip
    return Measurement(**{**facts, **more})  # type: ignore[arg-type]


def pool(ratio: float) -> Evidence:
    return Evidence(won(ratio=ratio), ratio, 0.98 * ratio, 1.02 * ratio, 1)


def eventually(what: object, seconds: float = 60.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if what():  # type: ignore[operator]
            return True
        time.sleep(0.05)
    return False


def test_a_team_serves_through_files_and_addresses(
    home: Path, tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    near, far = tmp_path / "www" / "near.jsonl", tmp_path / "www" / "far.jsonl.gz"
    lines.write([won()], near)
    lines.write([won(ratio=3.0), won("fp32.d16@b1.h2.q777.k777", ratio=1.7)], far)
    monkeypatch.setenv("ELSA_TUNE_DB", f"{near}; {server}/far.jsonl.gz")
    assert [x.database for x in layers.layers() if x.name == "team"] == [None, None]
    serving.explain(Problem.parse(SMALL), HERE)  # reads them beside its work
    assert eventually(lambda: not layers.stale()), serving._shelf.troubles
    assert eventually(lambda: serving.explain(Problem.parse(SMALL), HERE).rung == "exact")
    chosen = serving.explain(Problem.parse(SMALL), HERE)
    assert chosen.winner is not None and chosen.winner.layer == "team" and chosen.winner.measurement.ratio == 2.0, (
        "order"
    )
    assert serving.explain(Problem.parse("fp32.d16@b1.h2.q777.k777"), HERE).rung == "exact"
    lines.write([won(ratio=2.5)], near)
    os.utime(near, (time.time() + 5, time.time() + 5))
    assert layers.stale() == [str(near)] and layers.refresh_all() == []
    serving.refresh()
    again = serving.explain(Problem.parse(SMALL), HERE).winner
    assert again is not None and again.measurement.ratio == 2.5
    with Database.for_writing() as database:
        database.record(won(ratio=1.2))
    serving.refresh()
    own = serving.explain(Problem.parse(SMALL), HERE).winner
    assert own is not None and own.layer == "own", "what was measured here beats what was measured elsewhere"
    monkeypatch.setenv("ELSA_TUNE_DB", f"{server}/nowhere.jsonl;{tmp_path / 'nothing.jsonl'}")
    assert len(layers.refresh_all()) == 2
    serving.refresh()
    assert serving.explain(Problem.parse(SMALL), HERE).rung == "exact"


def test_a_team_where_nothing_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ELSA_TUNE_HOME", str(tmp_path / "file" / "home"))
    (tmp_path / "shared").mkdir()
    lines.write([won()], tmp_path / "shared" / "team.jsonl")
    monkeypatch.setenv("ELSA_TUNE_DB", str(tmp_path / "shared" / "team.jsonl"))
    monkeypatch.setattr(layers, "_kept", {})
    assert layers.refresh_all() == [] and layers.stale() == []
    (team,) = (layer for layer in layers.layers() if layer.name == "team")
    assert team.database is not None and len(team.database) == 1


def test_settings_come_from_a_file_too(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert configuration.databases() == configuration.trusted() == []
    home.mkdir()
    (home / "config.toml").write_text('databases = ["a.jsonl", "s3://b/c.jsonl"]\n')
    assert configuration.databases() == ["a.jsonl", "s3://b/c.jsonl"]
    monkeypatch.setenv("ELSA_TUNE_DB", "")
    assert configuration.databases() == []
    monkeypatch.delenv("ELSA_TUNE_DB")
    for text in ("databases = 3", "databases = [1]", "]["):
        (home / "config.toml").write_text(text)
        with pytest.raises(BadSettings, match=r"config\.toml"):
            configuration.databases()
        assert any(layer.name == "team" and layer.problem for layer in layers.layers()), "dispatch goes on"


def test_an_imported_winner_is_checked_once_and_remembered(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Database.for_writing() as database:
        database.add([won(digest="0123456789abcdef0123")])
    serving.refresh()
    checks: list[str] = []
    check_family = check.check_family
    monkeypatch.setattr(check, "check_family", lambda *a, **k: checks.append("") or check_family(*a, **k))
    loaded = elsa_tune.load(SMALL)
    assert str(loaded.variant) == variant_here() and len(checks) == 1
    serving.refresh()
    elsa_tune.load(SMALL)
    assert len(checks) == 1, "remembered for the next process"
    digest = cpp.digest(loaded.variant, loaded.problem)
    assert _kernel_cache.checked(digest, str(HERE)) and not _kernel_cache.checked(digest, "cpu:another-one-c1")
    q = torch.randn(1, 2, 96, 16)
    assert torch.allclose(loaded(q, q, q), torch.nn.functional.scaled_dot_product_attention(q, q, q), atol=1e-6)


def test_a_forged_digest_loads_nothing(home: Path) -> None:
    """An imported row that names a kernel built here for another family gets that family's own kernel, not the named one."""
    other = Problem.parse("fp32.d32@b1.h2.q64.k64")
    built = cpp.build(Space.read("cpp").parse(variant_here()), other)
    with Database.for_writing() as database:
        database.add([won(digest=built.digest, provenance={"installation": database.installation})])
    serving.refresh()
    loaded = elsa_tune.load(SMALL)
    q = torch.randn(1, 2, 96, 16)
    assert torch.allclose(loaded(q, q, q), torch.nn.functional.scaled_dot_product_attention(q, q, q), atol=1e-6)


def test_races_settle_what_was_imported(home: Path) -> None:
    """An imported claim is raced here; afterwards this machine's own measurement decides."""
    with Database.for_writing() as database:
        database.add([won(ratio=900.0)])
        assert drift.contested(database, HERE) == {SMALL: [variant_here()]}
    report = tuning.settle("cpu", budget=30)
    with Database.for_reading(places.database()) as database:
        (mine,) = database.measurements(True, variant=variant_here(), stage="final")
        assert mine.ratio and mine.ratio < 800 and database.measurements(False)[0].ratio == 900.0
        assert drift.contested(database, HERE) == {SMALL: [variant_here()]}, "the claims still disagree"
    assert report.complete and report.outcomes[0].winner is not None and (report.outcomes[0].winner.ratio or 900) < 800
    serving.refresh()
    chosen = serving.explain(Problem.parse(SMALL), HERE)
    assert chosen.winner is not None and chosen.winner.layer == "own"


def test_an_older_claim_that_agrees_is_left_alone() -> None:
    database = Database.in_memory([won(ratio=2.0)], "test")
    database.record(won(ratio=2.01, created=2.0))
    assert drift.contested(database, HERE) == {}


# Drift.


def test_changes_of_software_and_clock_are_seen() -> None:
    database = Database.in_memory([], "test")
    versions, peaks = {"torch": "2.12", "compiler": "g++ 12"}, {"peak_gflops": 400.0}
    assert drift.changes(database, HERE, versions, peaks) == [], "the first run has nothing to compare with"
    drift.remember(database, HERE, versions, peaks)
    assert drift.changes(database, HERE, versions, {"peak_gflops": 430.0}) == []
    assert drift.changes(database, HERE, {**versions, "torch": "2.13"}, peaks) == ["torch 2.12 is now 2.13"]
    assert "peak_gflops 400 is now 200" in drift.changes(database, HERE, versions, {"peak_gflops": 200.0})
    assert not drift.moved(pool(2.0), pool(2.03)) and drift.moved(pool(2.0), pool(1.5))


def test_only_what_moved_is_tuned_anew(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tuning.EFFORTS, "quick", Effort(trials=2, fewest=2, seconds=5, final_rounds=15))
    problems = [SMALL, "fp32.d16@b1.h2.q64.k64"]
    tuning.tune(problems, device="cpu", budget=20)
    with Database.for_writing() as database:
        for name in [n for n in (f"software of {HERE}",) if database.about(n)]:
            old = json.loads(database.about(name))
            database.note(name, json.dumps({**old, "compiler": "g++ 1.0"}))
        winner = next(m for m in database.winners(True) if m.problem == SMALL)
    moved: dict[str, bool] = {}
    turned: set[str] = set()
    has_moved, turn = canaries.has_moved, tuning.turn

    def noting_moves(run: Run, task: Task) -> bool:
        return moved.setdefault(str(task.problem), has_moved(run, task))

    def noting_turns(run: Run, task: Task, reserve: float = 0.0) -> None:
        turned.add(str(task.problem))
        turn(run, task, reserve)

    monkeypatch.setattr(canaries, "has_moved", noting_moves)
    monkeypatch.setattr(tuning, "turn", noting_turns)
    monkeypatch.setattr(drift, "moved", lambda before, after: before.problem == SMALL)
    monkeypatch.setattr(Measurement, "disturbed", False)  # whoever else uses this machine meanwhile
    report = tuning.tune(problems, device="cpu", budget=25)
    assert any("g++ 1.0 is now" in note for note in report.notes), report.notes
    told = next(note for note in report.notes if "timed again" in note)
    assert f"2 winners timed again, {sum(moved.values())} have moved" in told
    assert moved.keys() == set(problems) and moved[SMALL] == (not winner.is_rival)
    assert turned == {problem for problem, has in moved.items() if has}


def test_changed_templates_reopen_only_their_variants(home: Path) -> None:
    with Database.for_writing() as database:
        database.record(won(provenance={"source": "0" * 8}))
        space = Space.read("cpp")
        variant, problem = space.parse(variant_here()), Problem.parse(SMALL)
        source = cpp.source(variant, problem)
        fresh = won(problem="fp32.d16@b1.h2.q64.k64", provenance={"source": source.digest})
        database.record(fresh)
        with tuning.running(database, HERE, "quick", 5, lambda p: None, [], []) as run:
            assert recall.is_of_other_code(problem, database.measurements(problem=SMALL)[0])
            assert not recall.is_of_other_code(Problem.parse(fresh.problem), fresh)
            task = Task(problem, searches(problem, HERE, []))
            recall.recall(run, task)
            assert not task.latest and str(task.searches[0].ask(20)).count(variant_here()) >= 1


def test_kernels_made_elsewhere_are_found(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = cpp.build(Space.read("cpp").parse(variant_here()), Problem.parse(SMALL))
    ready = tmp_path / "ready"
    places.kernels().rename(ready)
    assert cpp.find(built.digest) is None
    monkeypatch.setenv("ELSA_TUNE_KERNELS", str(ready))
    found = cpp.find(built.digest)
    assert found is not None and found.path is not None and found.path.is_relative_to(ready)
    ready.chmod(0o777)
    with pytest.raises(elsa_tune.errors.KernelCacheUnsafe):
        cpp.find(built.digest)


def test_refused_reasons_are_counted_together(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text("".join(json.dumps({**BASE, "status": "won"}) + "\n" for _ in range(7)))
    refused: Counter[str] = Counter()
    assert list(foreign.read(file, refused)) == [] and list(refused.values()) == [7]
