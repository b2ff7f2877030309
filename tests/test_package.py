"""The package: a wheel that anybody builds equally, complete, and at home where nothing but what it requires is installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterator
from email.parser import BytesParser
from importlib.metadata import Distribution, distribution
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

import elsa_tune
from elsa_tune.generate.cpp import compiler

ROOT = Path(__file__).resolve().parent.parent
BUILDS = (
    "import os, sys, hatchling.build; os.umask(int(sys.argv[2], 8)); print(hatchling.build.build_wheel(sys.argv[1]))"
)
SEALED = 'mount --bind "$0" "$0"; mount -o remount,ro,bind "$0"; exec "$@"'
"""Runs a command to which the folder $0 may only be read."""


def built(folder: Path, when: int, umask: str, **environment: str) -> Path:
    """A wheel of a copy of this project that is as old as said."""
    copy, dist = folder / "copy", folder / "dist"
    left_out = shutil.ignore_patterns(".*", "__pycache__", "results", "golden", "site", "dist")
    shutil.copytree(ROOT, copy, ignore=left_out)
    for path in copy.rglob("*"):
        os.chmod(path, (0o777 if path.is_dir() else 0o666) & ~int(umask, 8))
        os.utime(path, (when, when))
    dist.mkdir()
    command = [sys.executable, "-c", BUILDS, str(dist), umask]
    name = subprocess.run(
        command, cwd=copy, env={**os.environ, **environment}, check=True, capture_output=True, text=True
    ).stdout.split()[-1]
    return dist / name


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory.mktemp("wheel"), 1_000_000_000, "022", LC_ALL="C.UTF-8", TZ="UTC", PYTHONHASHSEED="1")


def test_a_wheel_built_twice_is_the_same_bytes(wheel: Path, tmp_path: Path) -> None:
    other = built(tmp_path, 1_700_000_000, "077", LC_ALL="C", TZ="Pacific/Apia", PYTHONHASHSEED="2", LANGUAGE="de")
    assert other.name == wheel.name and other.read_bytes() == wheel.read_bytes()


def test_a_wheel_is_complete(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        told = BytesParser().parsebytes(file.read(next(n for n in names if n.endswith(".dist-info/METADATA"))))
        scripts = file.read(next(n for n in names if n.endswith("/entry_points.txt"))).decode()
    tracked = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "elsa_tune").rglob("*")
        if path.suffix in {".py", ".cpp", ".typed"}
    }
    assert tracked <= names and "elsa_tune/py.typed" in names and "elsa_tune_autoload.py" in names
    for folder in ("templates", "search_spaces", "cache"):
        files = {
            f"elsa_tune/data/{path.relative_to(ROOT).as_posix()}"
            for path in (ROOT / folder).rglob("*")
            if path.is_file()
        }
        assert files and files <= names, folder
    assert not [name for name in names if "__pycache__" in name or name.startswith(("tests", "docs", "benchmarks"))]
    assert "elsa-tune = elsa_tune.shell" in scripts and "elsa_tune = elsa_tune_autoload:load" in scripts
    assert told["Requires-Python"] == ">=3.10" and told["Version"] == elsa_tune.__version__
    assert (ROOT / "README.md").read_text().splitlines()[0] in str(told.get_payload())


def closure(requirements: list[str], extras: frozenset[str] = frozenset()) -> dict[str, Distribution]:
    """What some requirements, and theirs, ask for here."""
    found: dict[str, Distribution] = {}
    pending = [(Requirement(text), extras) for text in requirements]
    while pending:
        wanted, asked = pending.pop()
        if wanted.marker and not any(wanted.marker.evaluate({"extra": extra}) for extra in asked or {""}):
            continue
        if wanted.name not in found:
            found[wanted.name] = distribution(wanted.name)
            pending += [(Requirement(text), frozenset(wanted.extras)) for text in found[wanted.name].requires or []]
    return found


def lend(found: Distribution, folder: Path) -> None:
    """Links to what a distribution installed."""
    for top in {path.parts[0] for path in found.files or [] if path.parts[0] not in ("..", "__pycache__")}:
        source, target = Path(str(found.locate_file(top))).resolve(), folder / top
        if not target.exists():
            target.symlink_to(source, target_is_directory=source.is_dir())


@pytest.fixture(scope="session")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages of an environment that holds the wheel and what its metadata requires."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    packages = next(folder.glob("lib/python*/site-packages"))
    with zipfile.ZipFile(wheel) as file:
        metadata = BytesParser().parsebytes(file.read(next(n for n in file.namelist() if n.endswith("/METADATA"))))
    for found in closure(metadata.get_all("Requires-Dist")).values():
        lend(found, packages)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(folder / "bin" / "python"),
        "install",
        "--no-deps",
        "--no-index",
        "--quiet",
        str(wheel),
    ]
    subprocess.run(pip, check=True)
    return packages


@pytest.fixture(scope="session")
def sealed(site: Path) -> Iterator[list[str]]:
    """What runs a command where the environment may only be read and no network is: a namespace, or permissions where none may be made."""
    spaces = [
        "unshare",
        *([] if os.geteuid() == 0 else ["--map-root-user"]),
        "--mount",
        "--net",
        "sh",
        "-ec",
        SEALED,
        str(site),
    ]
    if shutil.which("unshare") and subprocess.run([*spaces, "true"], capture_output=True, check=False).returncode == 0:
        yield spaces
        return
    for path in (site, *(p for p in site.rglob("*") if p.is_dir() and not p.is_symlink())):
        path.chmod(0o555)
    yield []
    for path in (site, *(p for p in site.rglob("*") if p.is_dir() and not p.is_symlink())):
        path.chmod(0o755)


def run(site: Path, sealed: list[str], *words: str, **environment: str) -> str:
    """Stdout of a Python of the environment: no compiler on the path, no home."""
    folder = site.parents[2]
    tools = folder / "tools"
    tools.mkdir(exist_ok=True)
    for tool in ("sh", "mount"):  # which seal it; no compiler is among them
        if not (tools / tool).is_symlink():
            (tools / tool).symlink_to(str(shutil.which(tool)))
    path = f"{folder / 'bin'}{os.pathsep}{tools}"
    plain = {"PATH": path, "HOME": "/dev/null/home", "OMP_WAIT_POLICY": "passive", "LC_ALL": "C.UTF-8"}
    command = [*(str(shutil.which(word)) for word in sealed[:1]), *sealed[1:], str(folder / "bin" / "python"), *words]
    done = subprocess.run(
        command, env={**plain, **environment}, capture_output=True, text=True, check=False, cwd=folder
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def told(site: Path, sealed: list[str], what: str, folder: Path, **environment: str) -> dict[str, Any]:
    """What tests/installed.py found there."""
    found: dict[str, Any] = json.loads(
        run(site, sealed, str(ROOT / "tests" / "installed.py"), what, str(folder), **environment).splitlines()[-1]
    )
    return found


def test_without_compiler_home_network_or_extras(site: Path, sealed: list[str], tmp_path: Path) -> None:
    found = told(site, sealed, "bare", tmp_path)
    assert (
        Path(found["package"]).parent == site and Path(found["templates"]) == site / "elsa_tune" / "data" / "templates"
    )
    assert found["extras"] == [] and (found["offline"] or not sealed)
    assert found["error"] < 1e-5 and found["error after"] < 1e-5 and set(found["served"]) == {"torch"}
    code, _, err = found["homeless"]
    assert code == 2 and err.count("\n") == 1 and "ELSA_TUNE_HOME" in err and "/dev/null/home" in err
    assert found["winners"][0] == 0
    code, out, err = found["tuned"]
    assert code == 0 and json.loads(out)["outcomes"][0]["winner"]["variant"].startswith("sdpa."), err
    assert "elsa-tune[compiler]" in out + err
    assert (
        found["versions"][1].startswith(f"elsa-tune {elsa_tune.__version__}\n")
        and "no C++ compiler" in found["versions"][1]
    )
    assert sealed == [] or not [*site.rglob("installed*.pyc")]


def test_the_compiler_of_the_extra_serves(site: Path, sealed: list[str], tmp_path: Path) -> None:
    extra = tmp_path / "extra"
    extra.mkdir()
    for one in closure(
        [text for text in distribution("elsa-tune").requires or [] if "ziglang" in text], frozenset({"compiler"})
    ).values():
        lend(one, extra)
    assert (extra / "ziglang").is_dir()
    kept = os.environ.get(
        "ZIG_GLOBAL_CACHE_DIR", os.path.expanduser("~/.cache/zig")
    )  # of other tests: its first kernel takes long
    found = told(site, sealed, "zig", tmp_path / "home", PYTHONPATH=str(extra), ZIG_GLOBAL_CACHE_DIR=kept)
    assert found["loaded"] == found["won"] and found["rung"] == "exact" and found["error"] < 1e-5
    assert found["won"] in found["served"] and "torch" not in found["served"]
    assert found["tuned"][0] == 0 and "ziglang" not in found["tuned"][2]
    assert found["compiler"] in found["versions"][1]


def test_zig_keeps_what_it_built_where_there_is_no_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ziglang", reason="needs the compiler extra: pip install 'elsa-tune[compiler]'")
    monkeypatch.setenv("ZIG_GLOBAL_CACHE_DIR", "mine")
    monkeypatch.setenv("HOME", "/dev/null/home")
    compiler._candidates()
    assert os.environ["ZIG_GLOBAL_CACHE_DIR"] == "mine"
    monkeypatch.delenv("ZIG_GLOBAL_CACHE_DIR")
    compiler._candidates()
    assert os.environ["ZIG_GLOBAL_CACHE_DIR"] == str(home / "zig")


def test_python_m_and_the_script(site: Path, sealed: list[str]) -> None:
    assert run(site, sealed, "-m", "elsa_tune", "db", "--help").startswith("Usage: elsa-tune db")
    script = str(site.parents[2] / "bin" / "elsa-tune")
    assert run(site, sealed, script, "winners", "--help").startswith("Usage: elsa-tune winners")
