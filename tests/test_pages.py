"""What pages of the documentation compute: every result is on a page, a loss says so, pictures show what is counted, kernels are those that
`elsa-tune show` prints."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner

from docs.macros import _results, figures, gallery, performance
from elsa_tune.parts import scan as scans
from elsa_tune.shell import cli

ROOT = Path(__file__).resolve().parent.parent
SVG = "{http://www.w3.org/2000/svg}"


def test_every_file_of_results_is_on_a_page() -> None:
    pages = "".join(path.read_text() for path in (ROOT / "docs").rglob("*.md"))
    assert {path.stem for path in _results.FOLDER.glob("*.json")} <= set(re.findall(r'\{\{ \w+\("([\w.-]+)"', pages))


def test_losses_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    goals = [
        dict(goal="won", asked=2.0, geometric_mean=2.5, worst=2.1, worst_at="a", reached=True, ceiling_geometric_mean=3.0),
        dict(goal="lost", asked=2.0, geometric_mean=1.5, worst=1.1, worst_at="a", reached=False),
        dict(goal="lost by its worst", asked=0.9, geometric_mean=1.0, worst=0.5, worst_at="a", reached=False),
        dict(goal="errors", asked=1.0, at_most=True, geometric_mean=0.9, worst=2.2, worst_at="a", reached=False),
        dict(goal="seconds", asked=198, at_most=True, worst=182.2, reached=True),
        dict(goal="nobody there", asked=1.0, measured=None),
    ]  # fmt: skip
    monkeypatch.setattr(performance, "read", lambda name: {"goals": goals})
    rows = [re.sub(r"</?code[^>]*>", "", line) for line in performance.goals("x").splitlines()[2:]]
    assert rows == [
        "| won | at least 2.00 | 2.50 | 2.10 at a | 3.00 |",
        "| lost | at least 2.00 | 1.50 (**short**) | 1.10 at a |  |",
        "| lost by its worst | at least 0.90 | 1.00 | 0.50 (**short**) at a |  |",
        "| errors | at most 1.00 | 0.90 | 2.20 (**more**) at a |  |",
        "| seconds | at most 198 |  | 182 |  |",
        "| nobody there | 1.00 | not measured |  |  |",
    ]


@pytest.mark.parametrize("name", scans.names())
def test_a_network_is_drawn_merge_by_merge(name: str) -> None:
    scan = scans.get(name)
    for n in (2, 7, 16):
        root = ElementTree.fromstring(scans.svg(scan, n))
        groups = root.findall(f"{SVG}g")
        assert [len(group.findall(f"{SVG}circle")) for group in groups] == [r.merges(n) for r in scan.prefixes(n)]
        strong = [r for r, group in zip(scan.prefixes(n), groups, strict=True) if group.get("class") != "rest"]
        assert strong == scan.total(n)
        heights = {float(dot.get("cy", 0)) for dot in root.iter(f"{SVG}circle")}
        assert len(heights) == scans.depth(scan.prefixes(n), n), "as many steps as merges follow one another"


def test_figures_of_results_show_every_number() -> None:
    (name,) = (path.stem for path in _results.FOLDER.glob("error-*.json"))
    errors = _results.read(name)["errors"]
    drawn = figures.errors_drawn(name)
    assert all(f">{who}</text>" in drawn for who in errors)
    lines = re.findall(r'<path class="line"[^>]* d="M([\d. L]+)"', drawn)
    assert [len(line.split("L")) for line in lines] == [len(of) for of in errors.values()]
    assert figures.errors_by_length(name).count("e-0") == sum(map(len, errors.values()))
    for path in _results.FOLDER.glob("cpu-*.json"):
        root = ElementTree.fromstring(re.sub(r".*?(<svg.*</svg>).*", r"\1", figures.roofline(path.stem), flags=re.S))
        dots = [dot for dot in root.iter(f"{SVG}circle") if dot.find(f"{SVG}title") is not None]
        assert len(dots) == 2 * len(_results.read(path.stem)["results"])
        assert all(0 <= float(dot.get(side, -1)) <= most for dot in dots for side, most in (("cx", 360), ("cy", 215)))


def test_the_gallery_shows_what_the_program_prints() -> None:
    shown = gallery.kernels("fp32.d16@b1.h1.q8.k8")
    commands = re.findall(r"^ *elsa-tune (show \S+ \S+)$", shown, re.M)
    assert len(commands) == 3
    for command in commands:
        printed = CliRunner().invoke(cli.main, command.split()).stdout
        lines = {line.strip() for line in shown.splitlines()}
        assert all(line.strip() in lines for line in printed.splitlines() if "-o kernel.so" not in line)
    causal = gallery.changes("fp32.d16.causal@b1.h1.q8.k8", than="fp32.d16@b1.h1.q8.k8")
    assert causal.count("=== ") == 3 and causal.count("position + 1") >= 3
    paired = gallery.changes("fp32.d16@b1.h1.q8.k8", axes={"state": "pair"}, without={"state": "triple"})
    assert "Nothing: there is no axis `state` there." in paired and paired.count("```diff") == 2
