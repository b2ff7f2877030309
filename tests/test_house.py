"""The rules of the house: who may import what, what importing costs, and that the documents are complete."""

from __future__ import annotations

import ast
import re
import subprocess
import sys

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib
from pathlib import Path

import pytest

from elsa_tune import errors
from elsa_tune.generate import backends
from elsa_tune.parts import element, mask, scan, score
from elsa_tune.shell import cli
from elsa_tune.space import Space

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "elsa_tune").rglob("*.py"))
NOUNS = {"problem", "device", "variant", "measurement", "errors"}
OWNERS = {
    "jinja2": "render.py",
    "optuna": {"search.py", "fleet.py"},  # its samplers, its storages
    "sqlite3": "winners.py",
    "pydantic": "exchange.py",
    "fsspec": "exchange.py",
    "pebble": "worker.py",
    "rich": "report.py",
    "archspec": "device.py",
    "cuda": "drivers.py",
}


def imported(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@pytest.mark.parametrize("library", OWNERS)
def test_each_foreign_library_lives_behind_one_file(library: str) -> None:
    users = {p.name for p in SOURCES if any(n.split(".")[0] == library for n in imported(p))}
    owners = OWNERS[library]
    assert users == (owners if isinstance(owners, set) else {owners})


MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in SOURCES}
FOLDERS = (
    {"shell", "integrations"},
    {"tuning", "dispatch", "ship"},
    {"remember", "prove"},
    {"generate"},
    {"nouns"},  # files that stand in no folder
    {"parts"},
    {"errors"},
)
"""Arrows point down: a file imports from its own folder and from the rows below."""

CIRCLES = [
    {"elsa_tune.remember.exchange", "elsa_tune.remember.layers"},
]
"""Knots that are not untied yet. Strike them out; add none."""


def arrows(module: str) -> set[str]:
    """The files of ours that a file imports, when it is imported or in a call; what only a type checker reads is none."""
    found: set[str] = set()

    def walk(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.Import):
                found.update(alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert not child.level, (module, "imports are spelled in full")
                names = {f"{child.module}.{alias.name}" for alias in child.names}
                found.update(names & set(MODULES) or {str(child.module)})
            walk(child)

    walk(ast.parse(MODULES[module].read_text()))
    return found & set(MODULES) - {module}


def test_no_files_import_each_other_in_a_circle() -> None:
    graph = {module: arrows(module) for module in MODULES}

    def reach(module: str) -> set[str]:
        seen, pending = set[str](), [module]
        while pending:
            new = graph[pending.pop()] - seen
            seen |= new
            pending += new
        return seen

    reached = {module: reach(module) for module in MODULES}
    circles = [{m, *(n for n in reached[m] if m in reached[n])} for m in MODULES if m in reached[m]]
    assert all(circle in CIRCLES for circle in circles), circles
    assert all(circle in circles for circle in CIRCLES), "untied: strike it out"


def test_arrows_between_folders_point_down() -> None:
    def row(module: str) -> tuple[int, str]:
        name = module.removeprefix("elsa_tune.").split(".")[0]
        folder = name if any(name in row for row in FOLDERS) else "nouns"
        assert folder != "nouns" or MODULES[module].parent == ROOT / "elsa_tune", f"which row is {name} in?"
        return next(n for n, row in enumerate(FOLDERS) if folder in row), folder

    for module in MODULES.keys() - {"elsa_tune"}:
        here, folder = row(module)
        for other in arrows(module) - {"elsa_tune"}:
            below, its = row(other)
            assert below > here or its == folder, f"{module} imports {other}"


def test_nouns_import_nothing_of_ours_but_errors_orders_and_parts() -> None:
    for noun in NOUNS:
        ours = arrows(f"elsa_tune.{noun}")
        allowed = ("elsa_tune.errors", "elsa_tune.order", "elsa_tune.parts")
        assert all(n.startswith(allowed) for n in ours), (noun, ours)


def compared(path: Path) -> set[str]:
    """The words that a file compares anything but a device's kind or a dialect with."""
    words: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            asked = {getattr(side, "attr", getattr(side, "id", "")) for side in sides}
            if not asked & {"kind", "dialect"}:
                words |= {leaf.value for side in sides for leaf in ast.walk(side) if isinstance(leaf, ast.Constant)}
    return words


@pytest.mark.parametrize("name", backends.names())
def test_only_a_backend_knows_itself(name: str) -> None:
    """No other file imports it or compares anything with its name: the Backend protocol is asked."""
    own = ROOT / "elsa_tune" / "generate" / name
    for path in SOURCES:
        if own not in path.parents:
            of_it = {n for n in imported(path) if f"{n}.".startswith(f"elsa_tune.generate.{name}.")}
            assert not of_it and name not in compared(path), path


def test_dispatch_never_tunes() -> None:
    reach, pending = set(), ["elsa_tune.dispatch.attention"]
    while pending:
        name = pending.pop()
        reach.add(name)
        path = ROOT / f"{name.replace('.', '/')}.py"
        if path.is_file():
            pending += [n for n in imported(path) if n.startswith("elsa_tune.") and n not in reach]
    tuning = {f"elsa_tune.tuning.{name}" for name in ("tune", "trial", "search", "worker", "race")}
    assert "elsa_tune.remember.winners" in reach
    assert not reach & {*tuning, "elsa_tune.shell.report", "elsa_tune.shell.cli"}


def test_every_file_opens_with_one_sentence() -> None:
    for path in SOURCES:
        first = (ast.get_docstring(ast.parse(path.read_text())) or "").splitlines()
        assert first and first[0].endswith((".", ":")), path
    for path in (ROOT / "templates").rglob("*.j2"):
        assert path.read_text().lstrip().startswith(("//", "{#", "{%")), path


LONG = {"cpp", "cuda", "triton"}
"""Folders of templates in which lines are still longer."""


def test_lines_of_templates_fit_a_page() -> None:
    folder = ROOT / "templates"
    for path in folder.rglob("*.j2"):
        if path.relative_to(folder).parts[0] not in LONG:
            assert all(len(line) <= 120 for line in path.read_text().splitlines()), path


def test_importing_does_nothing() -> None:
    program = """
import sys, os
before = set(sys.modules)
import elsa_tune
assert elsa_tune.attention and elsa_tune.load and elsa_tune.Problem
loaded = {name.split('.')[0] for name in set(sys.modules)}
assert not loaded & {'optuna', 'triton', 'pyopencl', 'pebble', 'rich', 'click_default_group'}, loaded
assert not os.path.exists(os.environ['ELSA_TUNE_HOME'])
"""
    environment = {"ELSA_TUNE_HOME": "/nonexistent/home", "PATH": "/usr/bin:/bin"}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)


def test_every_command_axis_scan_backend_and_exception_is_documented() -> None:
    readme = (ROOT / "README.md").read_text()
    docs = readme + "".join(p.read_text() for p in (ROOT / "docs").rglob("*.md"))
    for command in cli.main.commands:
        assert f"elsa-tune {command}" in docs or command == "tune", command
    for option in cli.main.commands["tune"].params:
        assert option.opts[0] in docs, option.opts
    for name in backends.names():
        for axis in Space.load(name).axes:
            assert f"`{axis.name}`" in docs, axis.name
    for part in (*scan.names(), *mask.names(), *score.names(), *element.names()):
        assert f"`{part}`" in docs, part
    for error in vars(errors).values():
        if isinstance(error, type) and issubclass(error, errors.ElsaTuneError):
            assert f"`{error.__name__}`" in docs, error.__name__


def test_readme_commands_exist() -> None:
    readme, makefile = (ROOT / "README.md").read_text(), (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.M))
    used = set(re.findall(r"^\s*(?:\$ )?make ([a-z-]+)", readme, re.M))
    assert {"tune", "test"} <= used <= targets


def test_links_in_documents_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), (page.name, target)


def test_the_wheel_carries_the_visible_folders() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    included = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert included == {f: f"elsa_tune/data/{f}" for f in ("templates", "search_spaces", "cache")}


def test_no_machine_paths_in_tracked_files() -> None:
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=False).stdout.split()
    home = re.compile(r"/(root|home/\w+|work)/\w")
    for name in tracked:
        path = ROOT / name
        if path.suffix in {".py", ".md", ".toml", ".j2", ".json", ".jsonl", ".cpp"} and path.is_file():
            assert not home.search(path.read_text()), name
