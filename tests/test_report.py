"""The report: what it says of measurements, how it looks in a browser, and that it goes along with a run."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import socket
import struct
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from click.testing import CliRunner
from rich.console import Console

from elsa_tune import places
from elsa_tune.device import Device, host_cpu
from elsa_tune.errors import ElsaTuneError
from elsa_tune.generate import lawful
from elsa_tune.measurement import Measurement
from elsa_tune.problem import Problem
from elsa_tune.remember import lines
from elsa_tune.remember.database import Database
from elsa_tune.shell import cli, progress
from elsa_tune.shell.report import figures, live
from elsa_tune.shell.report.contents import Contents, contents
from elsa_tune.shell.report.page import Writer
from elsa_tune.space import Space
from elsa_tune.tuning import fleet, search
from elsa_tune.tuning.task import Progress, Task

ROOT = Path(__file__).resolve().parent.parent
ZEN4, XEON = "cpu:amd_f25m17-x86_64_v4-c2", "cpu:intel_f6m167-icelake-c2"
LONG, SHORT = "fp32.d64@b1.h8.q1024.k1024", "fp32.d64@b1.h12.q197.k197"
HOSTILE = 'x < y & "<script>alert(1)</script>" </script>'
SCREENSHOTS = ROOT / "build" / "screenshots"


def searched(problem: str, device: str = ZEN4, count: int = 14) -> list[Measurement]:
    """A search as it might have gone: peaks, torch's own, trials of lawful variants that get better, one final, three refused."""
    asked, peaks = Problem.parse(problem), {"peak_gflops": 230.0, "peak_gbytes": 30.0, "torch": "2.13.0"}
    space = Space.read("cpp")
    every = lawful.variants(space, asked, Device.parse(device), None, None)
    variants = [str(next(every)) for _ in range(7 * count)][::7]
    took = 4 * asked.flops / 230e9
    found = [
        Measurement(
            device=device, problem=problem, variant="sdpa.flash", role="rival", status="ok", stage="final", ratio=1.0, ratio_low=1.0,
            ratio_high=1.0, seconds=took, incumbent="sdpa.flash", samples=(took,), incumbent_samples=(took,), error=6e-8, created=1.0,
        )
    ]  # fmt: skip
    for number, variant in enumerate(variants):
        ratio, is_final = 1 + 0.05 * number, number == count - 1
        found.append(
            Measurement(
                device=device, problem=problem, variant=variant, status="ok", stage="final" if is_final else "trial", ratio=ratio,
                ratio_low=ratio - 0.01, ratio_high=ratio + 0.01, seconds=took / ratio, samples=(took / ratio,), incumbent="sdpa.flash",
                incumbent_samples=(took,), error=3e-8, digest=f"d{number}", provenance=peaks, created=2.0 + number,
            )
        )  # fmt: skip
    refused = [("wrong", HOSTILE), ("pruned", "69 stack stores"), ("pruned", "69 stack stores")]
    for number, (status, reason) in enumerate(refused):
        variant = str(next(every))
        found.append(
            Measurement(
                device=device,
                problem=problem,
                variant=variant,
                status=status,
                reason=reason,
                created=90.0 + number,
            )
        )
    return found


@pytest.fixture
def measured(home: Path) -> Path:
    """A home in which two problems were tuned."""
    with Database.for_writing() as database:
        for m in [*searched(LONG), *searched(SHORT)]:
            database.record(m)
    return home


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli.main, arguments)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def test_a_chapter_says_what_its_measurements_say(measured: Path) -> None:
    short, long = contents().chapters
    assert (str(short.problem), str(long.problem)) == (SHORT, LONG)
    tried = searched(LONG)
    assert long.outcome.winner is not None and long.outcome.winner.variant == tried[14].variant
    assert [m.variant for m in long.contenders][:2] == [tried[14].variant, tried[13].variant]
    assert len(long.contenders) == 15 and {m.variant for m in long.contenders if m.is_rival} == {"sdpa.flash"}
    assert [(one.status, len(one.variants)) for one in long.rejections] == [("pruned", 2), ("wrong", 1)]
    assert long.peaks == {"gflops": 230.0, "gbytes": 30.0}
    assert long.outcome.limit == pytest.approx(long.outcome.winner.ratio / 4, rel=1e-3)
    assert [str(one.problem) for one in contents(problems=[SHORT]).chapters] == [SHORT]


def test_figures_draw_what_was_measured(measured: Path) -> None:
    (chapter,) = contents(problems=[LONG]).chapters
    with figures.plain():
        drawn = {one.title: json.loads(one.drawn) for one in figures.of(chapter)}
    ratios = [m.ratio for m in searched(LONG) if m.ratio and m.variant.startswith("cpp.")]
    history = drawn["cpp: ratio over trials"]["data"]
    assert history[0]["y"] == ratios, "each trial"
    assert history[1]["y"][: len(ratios)] == ratios and max(history[1]["y"]) == ratios[-1], "and the best so far"
    assert drawn["cpp: axes that mattered"]["data"] and drawn["cpp: axis by axis"]["data"]

    (heat,) = [figure["data"][0] for title, figure in drawn.items() if title.startswith("cpp: best ratio by")]
    title = next(title for title in drawn if title.startswith("cpp: best ratio by"))
    first, second = re.findall(r"by (\w+) and (\w+)", title)[0]
    best: dict[tuple[str, str], float] = {}
    for m in chapter.tried:
        if m.ratio and m.variant.startswith("cpp."):
            values = dict(Space.read("cpp").parse(m.variant).values)
            pair = str(values[first]), str(values[second])
            best[pair] = max(best.get(pair, 0.0), m.ratio)
    cells = {
        (x, y): z for y, row in zip(heat["y"], heat["z"], strict=True) for x, z in zip(heat["x"], row, strict=True)
    }
    assert {pair: z for pair, z in cells.items() if z is not None} == pytest.approx(best)

    roof, *dots = drawn["Roofline: every contender"]["data"]
    assert sum(len(one["x"]) for one in dots) == len(chapter.contenders)
    intensity = chapter.problem.flops / chapter.problem.bytes
    for one in dots:
        assert one["x"] == pytest.approx([intensity] * len(one["x"]))
        assert all(0 < y <= min(230.0, 30.0 * intensity) * 1.0001 for y in one["y"])
    assert max(roof["y"]) == 230.0


def test_a_final_counts_in_place_of_the_trial_before_it(measured: Path) -> None:
    final = next(m for m in searched(LONG) if m.stage == "final" and m.variant.startswith("cpp."))
    with Database.for_writing() as database:
        database.record(replace(final, stage="trial", ratio=9.0, ratio_low=8.0, ratio_high=10.0, created=1.5))
    (chapter,) = contents(problems=[LONG]).chapters
    with figures.plain():
        drawn = next(one for one in figures.of(chapter) if "best ratio by" in one.title)
    shown = [z for row in json.loads(drawn.drawn)["data"][0]["z"] for z in row if z is not None]
    assert max(shown) == final.ratio and 9.0 not in shown


class Seen:
    """What a browser said while a page was open."""

    def __init__(self, page: Any, allowed: tuple[str, ...]) -> None:
        self.told: list[str] = []
        page.on("console", lambda message: self.told.append(message.text))
        page.on("pageerror", lambda error: self.told.append(str(error)))
        page.on("request", lambda asked: None if asked.url.startswith(allowed) else self.told.append(asked.url))


def until(tab: Any, expression: str) -> None:
    """Wait until an expression is true; the page's own policy lets no timer of a tester evaluate it there."""
    for _ in range(300):
        if tab.evaluate(expression):
            return
        tab.wait_for_timeout(100)
    raise AssertionError(f"never true: {expression}")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of two problems on one device, and of one of them on another, from files."""
    folder = tmp_path_factory.mktemp("report")
    first, second = folder / "first.jsonl", folder / "second.jsonl"
    lines.write([*searched(LONG), *searched(SHORT)], first)
    lines.write(searched(LONG, XEON), second)
    code, said = run("report", str(first), str(second), "-o", str(folder / "deep" / "report.html"))
    assert code == 0 and "2 problems" in said
    return folder / "deep" / "report.html"


@pytest.mark.parametrize(("width", "scheme"), [(360, "dark"), (1200, "light")])
def test_the_page_in_a_browser(page: Path, browser: Any, width: int, scheme: str) -> None:
    """No complaint, nothing fetched, nothing wider than the screen; every link leads somewhere, and every figure is drawn."""
    window = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
    tab = window.new_page()
    seen = Seen(tab, ("file:", "data:", "blob:"))
    tab.goto(page.as_uri())
    text = tab.inner_text("body")
    assert ZEN4 in text and XEON in text and "Side by side" in text
    assert f"elsa-tune --device {ZEN4} --problem {LONG}" in tab.locator("body").text_content()
    assert HOSTILE in tab.locator("body").text_content(), "what others wrote is text"

    links = tab.evaluate("[...document.querySelectorAll('a')].map(a => a.getAttribute('href'))")
    assert len(links) >= 8 and all(link.startswith("#") for link in links)
    for link in set(links):
        tab.evaluate(f"location.hash = {link!r}")
        target = tab.locator(f"[id='{link[1:]}']")
        assert target.count() == 1 and target.get_attribute("open") is not None, link
    figures_there = tab.locator("figure")
    assert figures_there.count() >= 3 * 5 + 2 + 1
    for number in range(figures_there.count()):
        figures_there.nth(number).scroll_into_view_if_needed()
    until(tab, "[...document.querySelectorAll('figure .plot')].every(p => p.querySelector('.main-svg'))")
    empty = tab.evaluate(
        "[...document.querySelectorAll('figure')].filter(f => !f.querySelector('.trace, .heatmaplayer image, .barlayer path, .scatterlayer path'))"
        ".map(f => f.innerText)"
    )
    assert not empty, empty
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    ground = sum(map(int, re.findall(r"\d+", tab.evaluate("getComputedStyle(document.body).backgroundColor"))[:3]))
    assert (ground < 3 * 128) == (scheme == "dark")
    code = tab.locator("pre.code").first
    assert "Exact softmax attention" in code.inner_text() and code.locator("span").count() > 100, "highlighted"
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    tab.screenshot(path=SCREENSHOTS / f"report-{width}-{scheme}.png", full_page=True)
    window.close()
    assert not seen.told, seen.told


def test_colours_follow_the_system_while_the_page_is_open(page: Path, browser: Any) -> None:
    tab = browser.new_page(color_scheme="light")
    tab.goto(page.as_uri())
    tab.locator("figure .main-svg").first.wait_for()
    ink = "getComputedStyle(document.querySelector('figure .xtick text')).fill"
    before = tab.evaluate(ink)
    tab.emulate_media(color_scheme="dark")
    until(tab, f"{ink} !== {before!r}")
    tab.close()


def test_side_by_side(measured: Path, tmp_path: Path) -> None:
    """Layers and files, each a column; only what several know is compared."""
    others = tmp_path / "others.jsonl"
    lines.write([replace(m, created=m.created + 1000) for m in searched(LONG)], others)
    found = contents(["own", str(others)])
    assert [column.layer for column in found.columns] == ["own", str(others)]
    ((problem, row),) = found.side_by_side.items()
    assert str(problem) == LONG and all(chapter and chapter.outcome.winner for chapter in row)
    text = Writer().page(found)
    assert "Side by side" in text and text.count("Roofline: winners") == 2
    assert "Side by side" not in Writer().page(contents())


def test_nothing_to_tell(measured: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    for arguments, told in (
        (["report", "--problem", "fp32.d96@b1.h1.q7.k7"], "run elsa-tune"),
        (["report", "--problem", "fp99"], "fp99"),
        (["report", "--device", "zen5"], ZEN4),
        (["report", str(tmp_path / "none.jsonl")], "none.jsonl"),
        (["report", str(tmp_path / "empty.jsonl")], "nothing was measured"),
        (["report", "-o", str(tmp_path / "empty.jsonl" / "r.html")], "-o"),
    ):
        code, said = run(*arguments)
        assert code == 2 and told in said and len(said.strip().splitlines()) == 1, (arguments, said)


def test_who_left_everything_out_says_why(measured: Path, tmp_path: Path) -> None:
    file = tmp_path / "theirs.jsonl"
    file.write_text("hello\n")
    code, said = run("report", str(file))
    assert code == 2 and "left out 1" in said and "JSON" in said


def test_a_database_that_is_not_readable_is_not_one_without_measurements(home: Path) -> None:
    home.mkdir(exist_ok=True)
    (home / "measurements.db").write_bytes(b"no database" * 1000)
    code, said = run("report")
    assert code == 2 and "measurements.db" in said and len(said.strip().splitlines()) == 1, said


def test_a_ratio_of_nothing_is_a_failed_trial(measured: Path, tmp_path: Path) -> None:
    file = tmp_path / "theirs.jsonl"
    file.write_text(replace(searched(LONG)[0], ratio=0.0, ratio_low=0.0, ratio_high=0.0).line + "\n")
    code, said = run("report", str(file), "-o", str(tmp_path / "r.html"))
    assert code == 0 and "1 problem;" in said, said


def test_a_layer_that_is_misspelled_and_a_disk_that_fills(
    measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers are named where none is meant, and a page that is there is replaced as a whole or not at all."""
    code, said = run("report", "shiped")
    assert code == 2 and "own, imported, team, shipped" in said
    page = tmp_path / "report.html"
    page.write_text("what was there")

    def full(self: Path, content: bytes) -> int:
        with self.open("wb") as file:
            file.write(content[:1000])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        code, said = run("report", "-o", str(page))
    assert code == 2 and "free some space" in said and page.read_text() == "what was there"
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ""] == ["report.html"]


def test_what_another_version_recorded_is_a_note(measured: Path) -> None:
    """A winner that this version cannot spell has no code; a problem that it cannot read has no chapter."""
    with Database.for_writing() as database:
        database.record(replace(searched(LONG)[0], problem="fp32.d64.ring@b1.h1.q9.k9"))
    found = contents()
    assert len(found.chapters) == 2 and any("ring" in note for note in found.notes)
    assert "ring" in Writer().page(found)


# While it is tuned.


def so_far(*others: str) -> Progress:
    """Of a run of LONG and other problems, 30 seconds before its end."""
    task = Task(Problem.parse(LONG), [], trials=3, target=12)
    for m in searched(LONG)[:4]:
        task.note(m)
    return Progress([task, *(Task(Problem.parse(one), []) for one in others)], f"{LONG}  building", 70.0, 100.0)


@pytest.fixture
def served(measured: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[live.Live]:
    monkeypatch.setattr(live, "EDITION_LASTS", 0.0)
    monkeypatch.setattr(live, "FAREWELL", 0.0)
    with live.Live() as server:
        yield server


def fetched(address: str, **headers: str) -> str:
    with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=10) as answer:
        return str(answer.read().decode())


def test_only_this_machine_is_answered(served: live.Live) -> None:
    assert served.address.startswith("http://127.0.0.1:")
    with pytest.raises(urllib.error.HTTPError, match="403"):
        fetched(served.address, Host="evil.example:80")
    with pytest.raises(urllib.error.HTTPError, match="404"):
        fetched(served.address + "../../etc/passwd")
    port = int(served.address.rsplit(":", 1)[1].strip("/"))
    with pytest.raises(ElsaTuneError, match="--watch=PORT"):
        live.Live(port)


def test_who_goes_away_before_an_answer_is_nobodys_news(served: live.Live, capfd: pytest.CaptureFixture[str]) -> None:
    """A tab that is closed while it loads resets its connection: no trace on the terminal, and others are answered."""
    port = int(served.address.rsplit(":", 1)[1].strip("/"))
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", port)) as browser:
            browser.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            browser.sendall(f"GET /plotly.js HTTP/1.0\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode())
            browser.recv(1)
    fetched(served.address + "plotly.js")
    time.sleep(0.2)
    assert capfd.readouterr().err == ""


def test_nothing_is_written_while_nobody_looks(served: live.Live) -> None:
    served(so_far())
    assert "Nothing is measured" in served._page
    news = json.loads(fetched(served.address + "news"))
    assert news["families"][0]["family"] == "fp32.d64" and 0 < news["left"] <= 30 and not news["ended"]
    served(so_far())
    assert LONG in fetched(served.address)


def test_no_fault_of_a_page_ends_a_run(served: live.Live, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched(served.address + "news")
    served(so_far())
    page = fetched(served.address)
    monkeypatch.setattr(figures, "of", lambda chapter: 1 / 0)
    with Database.for_writing() as database:
        database.record(replace(searched(LONG)[3], created=500.0))
    served(so_far())
    assert LONG in page and fetched(served.address) == page, "the last one serves"


def test_everybody_who_looks_on_gets_the_last_page(
    measured: Path, browser: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with live.Live() as server:
        tabs = [browser.new_page(), browser.new_page()]
        for tab in tabs:
            tab.goto(server.address)
        server(so_far())
        for tab in tabs:
            tab.locator("#live table").wait_for()
        monkeypatch.setattr(
            live.time, "sleep", lambda seconds: [tab.wait_for_timeout(1000 * seconds / 2) for tab in tabs]
        )
    for tab in tabs:
        assert "Tuning has ended" in tab.inner_text("#live") and tab.locator("details").count() >= 1
        tab.close()


def test_the_page_goes_along(served: live.Live, browser: Any) -> None:
    """What is new appears, and what its reader opened stays open."""
    tab = browser.new_page()
    seen = Seen(tab, (served.address, "data:", "blob:"))
    tab.goto(served.address)
    served(so_far())
    tab.locator("#live table").wait_for()
    assert "fp32.d64" in tab.inner_text("#live")
    tab.locator("details", has_text=LONG).first.locator("summary").click()
    with Database.for_writing() as database:
        for m in searched("fp32.d64.causal@b1.h8.q1024.k1024"):
            database.record(m)
    served(so_far("fp32.d64.causal@b1.h8.q1024.k1024"))
    tab.get_by_text("fp32.d64.causal@b1.h8.q1024.k1024").first.wait_for()
    assert tab.locator("details[open]").count() == 1
    tab.locator("details[open] .main-svg").first.wait_for()
    served.__exit__(None, None, None)
    tab.get_by_text("does not answer any more").wait_for()
    tab.close()
    assert all("ERR_CONNECTION_REFUSED" in line for line in seen.told), seen.told


@pytest.mark.parametrize(("width", "height"), [(120, 40), (80, 24), (40, 12), (20, 5)])
def test_the_board_fits_the_screen(width: int, height: int) -> None:
    """However many families there are, and however long their names."""
    names = [
        f"fp32.d{d}{mask}@b1.h8.q1024.k1024"
        for d in (32, 64, 96, 128)
        for mask in ("", ".causal", ".dense.alibi+softcap")
    ]
    tasks = [
        Task(Problem.parse(name + (".softcap50" if "softcap" in name else "")), [], trials=12, target=12)
        for name in names
    ]
    tasks[5].trials = 3
    console = Console(width=width, height=height, force_terminal=True, record=True)
    board = progress.Board(Progress(tasks, "fp32.d64  building", 10.0, 100.0), 0.0)
    with console.capture() as drawn:
        console.print(board)
    shown = re.sub(r"\x1b\[[0-9;]*m", "", drawn.get()).rstrip("\n").split("\n")
    assert len(shown) < height and all(len(line) <= width for line in shown)
    assert any("3/12" in line for line in shown), "who is at work is shown"
    assert any("s left" in line for line in shown)


def test_optuna_dashboard_opens_the_study_of_a_run(tmp_path: Path) -> None:
    """`elsa-tune --storage sqlite:///...`, without a fleet: what was told is there for Optuna's own pages."""
    dashboard = pytest.importorskip(
        "optuna_dashboard", reason="optuna-dashboard is not installed: pip install optuna-dashboard"
    )
    url, problem = f"sqlite:///{tmp_path / 'study.db'}", Problem.parse(LONG)
    with fleet.Fleet(url, "worker", host_cpu()) as joined:
        (found,) = [one for one in search.searches(problem, host_cpu(), [], fleet=joined) if one.backend == "cpp"]
        told = found.ask(3)
        for number, variant in enumerate(told):
            found.tell(variant, 1.5 + number)
    application = dashboard.wsgi(optuna.storages.RDBStorage(url))

    def answered(path: str) -> Any:
        environment = {
            "REQUEST_METHOD": "GET",
            "PATH_INFO": path,
            "SERVER_NAME": "x",
            "SERVER_PORT": "1",
            "wsgi.url_scheme": "http",
        }
        status: list[str] = []
        body = b"".join(application(environment, lambda said, headers, error=None: status.append(said)))
        assert status == ["200 OK"], (path, status)
        return json.loads(body)

    studies = {one["study_name"]: one["study_id"] for one in answered("/api/studies")["study_summaries"]}
    (number,) = [number for name, number in studies.items() if LONG in name]
    trials = answered(f"/api/studies/{number}")["trials"]
    assert [trial["values"][0] for trial in trials] == pytest.approx([math.log(1.5), math.log(2.5), math.log(3.5)])
    assert {p["name"] for p in trials[0]["params"]} == {axis.name for axis in Space.read("cpp").axes}


def test_where_the_page_of_a_home_is_looked_for(
    measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without -o it is report.html in the current folder, of one's own database."""
    monkeypatch.chdir(tmp_path)
    code, said = run("report")
    assert code == 0 and said.startswith("report.html: 2 problems")
    assert places.database().is_relative_to(measured) and (tmp_path / "report.html").stat().st_size > 1 << 20


def test_contents_without_columns_compare_nothing() -> None:
    assert Contents((), ()).side_by_side == {}
