"""What stands around the program: the page of installation, citation, changelog, workflows and forms for reports name what there is."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from click import Group

import elsa_tune
from elsa_tune.errors import ElsaTuneError
from elsa_tune.shell import cli
from tests import typed_user

ROOT = Path(__file__).resolve().parent.parent
FORMS = sorted(path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.stem != "config")
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))


def read(path: Path) -> dict[Any, Any]:
    content = yaml.safe_load(path.read_text())
    assert isinstance(content, dict)
    return content


def test_every_extra_is_in_the_table_with_its_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    macros = runpy.run_path(str(ROOT / "docs" / "macros" / "install.py"))
    project = (ROOT / "pyproject.toml").read_text()
    section = project.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    names = re.findall(r"^([\w-]+) = \[", section, re.M)
    rows = {row.split("`")[1]: row for row in macros["extras"]().splitlines()[2:]}
    assert len(names) > 5 and [*rows] == [f"elsa-tune[{name}]" for name in names]
    assert "`ziglang" in rows["elsa-tune[compiler]"] and all(
        len(row.split("|")[2].strip()) > 5 for row in rows.values()
    )
    unexplained = tmp_path / "pyproject.toml"
    unexplained.write_text(re.sub(r"(compiler = \[.*?\]).*", r"\1", project))
    monkeypatch.setitem(macros["extras"].__globals__, "PROJECT", unexplained)
    with pytest.raises(ValueError, match="compiler"):
        macros["extras"]()


def test_the_citation_is_of_this_version() -> None:
    citation = read(ROOT / "CITATION.cff")
    assert {"cff-version", "message", "title", "type", "abstract", "authors", "version"} <= set(citation)
    assert (
        citation["cff-version"] == "1.2.0"
        and citation["type"] == "software"
        and citation["version"] == elsa_tune.__version__
    )
    for reference in citation["references"]:
        assert {"type", "title", "authors"} <= set(reference)
    assert "2604.23798" in citation["references"][0]["url"]


def test_the_changelog_has_this_version_and_kinds() -> None:
    titles = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert titles[0] == "Unreleased" and titles[1] == elsa_tune.__version__
    assert f'version = "{elsa_tune.__version__}"' in (ROOT / "pyproject.toml").read_text()
    kinds = {one.partition(":")[0] for one in re.findall(r"^### (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.M)}
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_run_what_there_is(path: Path) -> None:
    workflow = read(path)
    assert set(workflow[True]) == {"push", "pull_request"}  # what YAML 1.1 makes of the key `on`
    commands = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    assert commands
    for words in map(shlex.split, commands):
        if words[0] == "make":
            assert words[1] in TARGETS, path
        else:
            assert (ROOT / words[-1]).stat().st_mode & 0o100, path


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.name)
def test_forms_ask_for_what_the_doctor_says(path: Path) -> None:
    form = read(path)
    asked = [field["attributes"]["label"] for field in form["body"]]
    assert form["name"] and form["description"] and len({field["id"] for field in form["body"]}) == len(form["body"])
    assert any("elsa-tune doctor --json" in label for label in asked)
    for command, option in re.findall(r"`elsa-tune (\w+)(?: (--\w+))?", path.read_text()):
        assert command in cli.main.commands
        assert not option or any(option in param.opts for param in cli.main.commands[command].params)


def test_contributing_names_what_there_is() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    assert set(re.findall(r"\bmake (?:-j 2 )?([a-z-]+)", text)) - {"it"} <= TARGETS | {"docs"}
    for target in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (ROOT / target).exists(), target
    for test in re.findall(r"tests/\w+\.py", text):
        assert (ROOT / test).is_file(), test
    golden = re.search(r"test_golden\[([^\]]+)\]", text)
    assert golden and [*(ROOT / "tests" / "golden").rglob(f"{golden[1]}.*")]
    assert "eighteen" in text and len([path for path in (ROOT / "tests" / "golden").rglob("*") if path.is_file()]) == 18


def test_a_users_program_runs() -> None:
    """What type checkers read does what it says, but for its mistakes, which they reject."""
    import torch

    query, key, value = torch.randn(3, 1, 2, 24, 16)
    out = typed_user.calls(query, key, value)
    assert torch.allclose(
        out, torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True), atol=1e-5
    )
    for mask in typed_user.composed(query, torch.full((1, 1, 24, 1), 24)):
        assert elsa_tune.attention(query, key, value, mask).shape == query.shape, mask
    typed_user.kernels(query)
    typed_user.scopes(query)
    assert not isinstance(ElsaTuneError("x"), typed_user.WrongArguments)


def test_help_names_everything_public() -> None:
    page = elsa_tune.__doc__ or ""
    for name in elsa_tune.__all__:
        assert name.startswith("__") or re.search(rf"\b{name}\b", page), name
    assert isinstance(cli.main, Group) and "elsa-tune --help" in page
