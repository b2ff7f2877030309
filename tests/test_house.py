"""The rules of the house: who may import what, what importing costs, and that documents lead somewhere."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterable

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from pathlib import Path

import jinja2
import pytest

from elsa_tune import errors
from elsa_tune.generate import backends

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "elsa_tune").rglob("*.py"))
KINDS = sorted(path.parent.name for path in (ROOT / "elsa_tune" / "parts").glob("*/__init__.py"))
"""Kinds of parts."""

NOUNS = {"problem", "device", "variant", "measurement", "errors"}
OWNERS = {
    "jinja2": {"generate/render.py", "shell/report/page.py"},  # code, a page
    "markupsafe": {"shell/report/page.py"},
    "optuna": {
        "tuning/search.py",
        "tuning/fleet.py",
        "shell/report/figures.py",
    },  # its samplers, its storages, its figures
    "plotly": {"shell/report/figures.py", "shell/report/page.py"},  # what draws, and what draws in a browser
    "pygments": {"shell/report/page.py"},
    # who writes; dispatch, which does not wait for sqlite-utils; formats gone
    "sqlite3": {"remember/database.py", "remember/reading.py", "remember/earlier.py"},
    "sqlite_utils": {"remember/database.py"},
    "pydantic": {"remember/foreign.py", "remember/traffic.py"},
    "fsspec": {"remember/fetch.py"},
    "pebble": {"tuning/worker.py"},
    "filelock": {"tuning/trial.py"},
    "pynvml": {"tuning/telemetry.py"},
    "rich": {"shell/screen.py", "shell/progress.py"},
    "click": {
        f"shell/{name}.py"
        for name in ("cli", "cli_db", "cli_report", "cli_run", "cli_ship", "completions", "manual", "options")
    },
    "click_default_group": {"shell/manual.py"},
    "archspec": {"device.py"},
    "platformdirs": {"places.py"},
    "tomli": {"places.py"},
    "transformers": {f"integrations/transformers/{name}.py" for name in ("__init__", "calls", "masks", "offloaded")},
    "triton": {"generate/triton/compiler.py"},  # what it generates imports it, too
    "cuda": {"generate/cuda/drivers.py"},
    "pyopencl": {"device.py", "generate/cuda/opencl.py"},  # which devices there are; compiling and launching
    "threadpoolctl": {"generate/cpp/pool.py"},
    "timm": {"integrations/timm.py"},
}
"""Who may import what others wrote, by path."""

EVERYWHERE = {"torch", "numpy"}


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def users(library: str) -> set[str]:
    """The files that import a library."""
    return {
        path.relative_to(ROOT / "elsa_tune").as_posix()
        for path in SOURCES
        if any(name.split(".")[0] == library for name in imported(path))
    }


@pytest.mark.parametrize("library", OWNERS)
def test_each_foreign_library_lives_behind_its_owners(library: str) -> None:
    assert users(library) == OWNERS[library]


def test_every_foreign_library_has_an_owner() -> None:
    found = {name.split(".")[0] for path in SOURCES for name in imported(path)}
    assert found - set(sys.stdlib_module_names) - {"elsa_tune", "elsa_tune_autoload"} == {*OWNERS, *EVERYWHERE} - set(
        sys.stdlib_module_names
    )


MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in SOURCES}
FOLDERS = (
    {"__main__"},  # python -m elsa_tune
    {"shell"},
    {"integrations", "nn"},  # nn: what people build models of
    {"tuning", "dispatch", "ship"},
    {"remember", "prove"},
    {"scores"},  # what people write
    {"masks"},
    {"generate"},
    {"nouns"},  # files that stand in no folder
    {"parts"},
    {"errors"},
)
"""Arrows point down: a file imports from its own folder and from the rows below."""

CIRCLES: list[set[str]] = []
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

    walk(parsed(MODULES[module]))
    return found & set(MODULES) - {module}


def reach(module: str, graph: Mapping[str, set[str]]) -> set[str]:
    """What a file imports, and what that imports in turn."""
    seen, pending = set[str](), [module]
    while pending:
        new = graph[pending.pop()] - seen
        seen |= new
        pending += new
    return seen


def test_no_files_import_each_other_in_a_circle() -> None:
    graph = {module: arrows(module) for module in MODULES}
    reached = {module: reach(module, graph) for module in MODULES}
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


def names_of(kind: str) -> set[str]:
    """The names of a kind of parts."""
    return set(import_module(f"elsa_tune.parts.{kind}").names())


def told_apart(tree: jinja2.nodes.Template, kind: str) -> set[str]:
    """Names of a kind that a template holds as a string, its own or one of the language it writes, or as a file of that kind."""
    strings = {str(node.value) for node in tree.find_all(jinja2.nodes.Const) if isinstance(node.value, str)}
    for text in tree.find_all(jinja2.nodes.TemplateData):
        strings |= set(re.findall(r"[\"']([a-z0-9_]+)[\"']", text.data))
    return {name for name in names_of(kind) if name in strings or any(f"/{kind}/{name}." in s for s in strings)}


@pytest.mark.parametrize("kind", KINDS)
def test_no_template_but_a_kinds_own_tells_its_parts_apart(kind: str) -> None:
    """Facts may be asked: a name that a template compares makes every other name the other one."""
    for path in (ROOT / "templates").rglob("*.j2"):
        if path.parent.name != kind:
            found = told_apart(jinja2.Environment().parse(path.read_text()), kind)
            assert not found, f"{path.relative_to(ROOT)} tells {kind} apart by name: {', '.join(found)}"


def listed(tree: ast.AST, names: set[str]) -> set[str]:
    """Names that a list, set, tuple, dict or choice of a file holds two or more of."""
    for node in ast.walk(tree):
        within: list[ast.AST | None] = []
        if isinstance(node, ast.List | ast.Set | ast.Tuple):
            within = [*node.elts]
        elif isinstance(node, ast.Dict):
            within = [*node.keys, *node.values]
        elif isinstance(node, ast.IfExp):
            within = [node.body, node.orelse]
        held = words(within) & names
        if len(held) > 1:
            return held
    return set()


def words(nodes: Iterable[ast.AST | None]) -> set[str]:
    """The strings among some nodes."""
    return {x.value for x in nodes if isinstance(x, ast.Constant) and isinstance(x.value, str)}


def registries(tree: ast.AST, kind: str) -> set[str]:
    """What a file calls the kind, where it imports it."""
    found = [
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "elsa_tune.parts"
        for alias in node.names
        if alias.name == kind
    ]
    return set(found)


def singled_out(tree: ast.AST, kind: str) -> set[str]:
    """Names of a kind that a file compares anything with, matches it against, or asks the kind for: one is enough."""
    within: list[ast.AST] = []
    asked = registries(tree, kind)
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare | ast.MatchValue):
            within += ast.walk(node)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            within += node.args if getattr(node.func.value, "id", "") in asked else []
    return words(within) & names_of(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_no_file_but_a_kinds_own_tells_its_parts_apart(kind: str) -> None:
    written = {ROOT / "elsa_tune" / name for name in ("masks.py", "scores.py")}  # what people write of each
    for path in set(SOURCES) - written:
        if path.parent != ROOT / "elsa_tune" / "parts" / kind:
            tree = parsed(path)
            found = listed(tree, names_of(kind)) | singled_out(tree, kind)
            assert not found, f"{path.relative_to(ROOT)} tells {kind} apart by name: {', '.join(found)}"


def test_the_rules_about_parts_see_what_breaks_them() -> None:
    parse = jinja2.Environment().parse
    for text in (
        '{% if schedule == "last_block" %}x{% endif %}',
        '{% include "cuda/schedule/last_block.j2" %}',
        "if (s == 'last_block')",
    ):
        assert told_apart(parse(text), "schedule") == {"last_block"}
    assert not told_apart(parse('{% include "cuda/schedule/" ~ schedule.name ~ ".j2" %}'), "schedule")
    for program in ('["fp16", "x", "bf16"]', '{"fp16": 1, "bf16": 2}', 'f("fp16" if x else "bf16")'):
        assert listed(ast.parse(program), names_of("element")) == {"fp16", "bf16"}
    assert not listed(ast.parse('f("fp16", {"fp16": 1}, "fp16" if x else y)'), names_of("element"))
    for program in (
        'x == "fp16"',
        '(x, y) != ("fp16", 3)',
        'x in {"fp16"}',
        'match x:\n    case "fp16": pass',
        'from elsa_tune.parts import element as elements\nelements.get("fp16")',
    ):
        assert singled_out(ast.parse(program), "element") == {"fp16"}
    assert not singled_out(ast.parse('x.get("fp16") or x.bytes == 2 or f("fp16")'), "element")


@pytest.mark.parametrize("name", backends.names())
def test_every_law_says_what_it_forbids(name: str) -> None:
    assert [law.__name__ for law in backends.get(name).LAWS if not law.__doc__] == []


def test_generating_never_imports_what_proves_or_tunes() -> None:
    above = tuple(f"elsa_tune.{folder}" for folder in ("prove", "tuning", "remember", "dispatch", "ship", "shell"))
    for path in SOURCES:
        if "generate" in path.parts or "parts" in path.parts:
            assert not [name for name in imported(path) if name.startswith(above)], path


def test_parts_import_nothing_of_ours_but_errors_and_parts() -> None:
    for path in (ROOT / "elsa_tune" / "parts").rglob("*.py"):
        ours = {name for name in imported(path) if name.startswith("elsa_tune.")}
        assert all(name.startswith(("elsa_tune.errors", "elsa_tune.parts")) for name in ours), (path, ours)


def test_nouns_import_nothing_of_ours_but_errors_orders_and_parts() -> None:
    for noun in NOUNS:
        ours = arrows(f"elsa_tune.{noun}")
        allowed = ("elsa_tune.errors", "elsa_tune.order", "elsa_tune.parts")
        assert all(n.startswith(allowed) for n in ours), (noun, ours)


def compared(path: Path) -> set[str]:
    """The words that a file compares anything but a device's kind or a dialect with."""
    words: set[str] = set()
    for node in ast.walk(parsed(path)):
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
    graph = {module: arrows(module) for module in MODULES}
    for module in graph:
        if module.startswith("elsa_tune.dispatch."):
            found = [
                n for n in reach(module, graph) if f"{n}.".split(".")[1] in ("tuning", "shell", "ship", "integrations")
            ]
            assert not found, f"{module} reaches {', '.join(sorted(found))}"
    assert "elsa_tune.remember.reading" in reach("elsa_tune.dispatch.attention", graph)


def test_every_file_opens_with_one_sentence() -> None:
    for path in SOURCES:
        first = (ast.get_docstring(parsed(path)) or "").splitlines()
        assert first and first[0].endswith((".", ":")), path
    for path in (ROOT / "templates").rglob("*.j2"):
        assert path.read_text().lstrip().startswith(("//", "{#", "{%")), path


def test_lines_of_templates_fit_a_page() -> None:
    folder = ROOT / "templates"
    for path in folder.rglob("*.j2"):
        assert all(len(line) <= 120 for line in path.read_text().splitlines()), path


def test_importing_does_nothing() -> None:
    program = """
import sys, os
before = set(sys.modules)
import elsa_tune
assert elsa_tune.attention and elsa_tune.load and elsa_tune.Problem
loaded = {name.split('.')[0] for name in set(sys.modules)}
assert not loaded & {'optuna', 'triton', 'pyopencl', 'pebble', 'rich', 'click_default_group', 'sqlite_utils', 'pydantic'}, loaded
from elsa_tune.dispatch import serving
here = serving.of_tensor('cpu', None)
assert serving.explain(elsa_tune.Problem.parse('fp32.d64@b1.h8.q1024.k1024'), here).steps
assert not {'sqlite_utils', 'pydantic', 'fsspec'} & {name.split('.')[0] for name in sys.modules}, 'a first call waits for them'
assert not os.path.exists(os.environ['ELSA_TUNE_HOME'])
"""
    environment = {"ELSA_TUNE_HOME": "/nonexistent/home", "PATH": "/usr/bin:/bin"}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)


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
    autoload = project["project"]["entry-points"]["torch.backends"]["elsa_tune"].partition(":")[0] + ".py"
    assert included == {autoload: autoload} | {
        f: f"elsa_tune/data/{f}" for f in ("templates", "search_spaces", "cache")
    }


def test_no_machine_paths_in_tracked_files() -> None:
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=False).stdout.split()
    home = re.compile(r"/(root|home/\w+|work)/\w")
    for name in tracked:
        path = ROOT / name
        if path.suffix in {".py", ".md", ".toml", ".j2", ".json", ".jsonl", ".cpp"} and path.is_file():
            assert not home.search(path.read_text()), name


def test_nobody_tells_torchs_kernels_by_their_name() -> None:
    """Rival or candidate is a role that a measurement stores (elsa_tune.measurement.ROLES)."""
    for path in SOURCES:
        for node in ast.walk(parsed(path)):
            text = node.value if isinstance(node, ast.Constant) else ""
            assert not (isinstance(text, str) and re.search(r"sdpa\.%|^sdpa\.$", text)), (path, text)


REMEDIES = re.compile(r"; |: use |\bmust ")
"""A message goes on to say what to do, or says how it must be."""

PASSED_ON = {"error", "reason", "problem", "failure", "trouble"}
"""Names of messages that were made elsewhere, and end as those do."""


def without_a_remedy(tree: ast.AST) -> list[str]:
    """Messages of errors of ours that neither say what to do nor end in a message that was made elsewhere."""
    ours = {
        name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, errors.ElsaTuneError)
    }
    found = []
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and ast.unparse(node.exc.func) in ours):
            continue
        said = node.exc.args[0] if node.exc.args else node.exc
        last = said.values[-1] if isinstance(said, ast.JoinedStr) else said
        made_elsewhere = {
            leaf.id if isinstance(leaf, ast.Name) else leaf.attr.strip("_")
            for leaf in ast.walk(last)
            if isinstance(leaf, ast.Name | ast.Attribute)
        }
        if not made_elsewhere & PASSED_ON and not any(REMEDIES.search(word) for word in words(ast.walk(said))):
            found.append(ast.unparse(said))
    return found


def test_every_error_says_what_to_do() -> None:
    assert {path.name: found for path in SOURCES if (found := without_a_remedy(parsed(path)))} == {}


def test_the_rule_about_errors_sees_what_breaks_it() -> None:
    for program in ("raise BadProblem('it is wrong')", "raise BadDevice(f'{device} is not here')", "raise NoRoom()"):
        assert without_a_remedy(ast.parse(program)), program
    for program in (
        "raise BadProblem('it is wrong; take another')",
        "raise BadDevice(f'x: {error}')",
        "raise KernelMissing(reason)",
        "raise TypeError('x')",
    ):
        assert not without_a_remedy(ast.parse(program)), program
