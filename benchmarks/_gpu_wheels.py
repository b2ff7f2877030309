"""What elsa-tune needs and a GPU machine without network may lack: downloaded as wheels here, installed from a folder there.

Here:   python benchmarks/_gpu_wheels.py download .wheels     (`make wheels-gpu`; for Python 3.12 on x86-64 Linux)
There:  python benchmarks/_gpu_wheels.py install .wheels SITE  (benchmarks/gpu.sh), then SITE on PYTHONPATH

Only what is lacking is installed, into SITE alone. torch, Triton, numpy and NVIDIA's packages are never touched: the machine's own
fit its driver.
"""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import tomllib

PYTHON = "3.12"
PLATFORMS = (
    "manylinux_2_28_x86_64",
    "manylinux_2_27_x86_64",
    "manylinux_2_17_x86_64",
    "manylinux2014_x86_64",
    "manylinux1_x86_64",
)
KEPT = re.compile(r"torch|triton|numpy|nvidia-(?!ml-py).*|cuda-.*|pip|setuptools")
ROOT = Path(__file__).resolve().parent.parent
IMPORTED = (
    "elsa_tune.tuning.tune",
    "elsa_tune.shell.doctor",
    "elsa_tune.shell.cli",
    "elsa_tune.remember.foreign",
    "pebble",
    "sqlite_utils",
    "archspec.cpu",
)
"""What must be importable: everything elsa-tune is made of, and what it imports late."""


def plain(name: str) -> str:
    """A distribution's name as PyPI compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def name_of(requirement: str) -> str:
    """The distribution that a requirement is of."""
    return plain(re.split(r"[<>=;\[ ]", requirement)[0])


def wanted(*extras: str) -> list[str]:
    """pyproject.toml's requirements, those of extras too, without what is never touched."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    every = [*project["dependencies"], *(one for extra in extras for one in project["optional-dependencies"][extra])]
    return [text for text in every if "python_version <" not in text and not KEPT.fullmatch(name_of(text))]


def download(folder: Path) -> int:
    """Fetch wheels of everything wanted and what that needs; no sources, nothing that is never touched."""
    folder.mkdir(exist_ok=True)
    target = ["--python-version", PYTHON, "--implementation", "cp", *(x for p in PLATFORMS for x in ("--platform", p))]
    constraints = ["--constraint", str(ROOT / "constraints.txt")]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:", *target, *constraints]
    subprocess.run([*command, "--dest", str(folder), *wanted("gpu")], check=True)
    for wheel in folder.glob("*.whl"):
        name = plain(wheel.name.split("-")[0])
        if KEPT.fullmatch(name):
            wheel.unlink()
    sizes = [wheel.stat().st_size for wheel in folder.glob("*.whl")]
    print(f"{len(sizes)} wheels, {sum(sizes) / 2**20:.0f} MiB in {folder}")
    return 0


def lacking(folder: Path) -> list[Path]:
    """The wheels whose distributions are not here in any version."""
    found = []
    for wheel in sorted(folder.glob("*.whl")):
        name = plain(wheel.name.split("-")[0])
        if KEPT.fullmatch(name):
            continue
        try:
            version(name)
        except PackageNotFoundError:
            found.append(wheel)
    return found


def install(folder: Path, site: Path) -> int:
    """Install what is lacking into ``site`` and import everything; the exit code, after naming what is still missing."""
    if wheels := lacking(folder):
        print("installing", *(wheel.name for wheel in wheels), flush=True)
        options = ["--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--target", str(site)]
        command = [sys.executable, "-m", "pip", "install", "--quiet", *options]
        if subprocess.run([*command, *map(str, wheels)], check=False).returncode:
            for wheel in wheels:  # one that does not fit keeps nobody else out
                subprocess.run([*command, str(wheel)], check=False)
    program = (
        f"import sys, importlib.metadata; sys.path[:0] = [{str(site)!r}, {str(ROOT)!r}]\n"
        f"for name in {[*map(name_of, wanted())]}: importlib.metadata.version(name)\n"
        f"import {', '.join(IMPORTED)}"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines()[-1:]
        print(f"lacking: {''.join(said)}; `make wheels-gpu` fills {folder.name}, carry it along", flush=True)
    return done.returncode


if __name__ == "__main__":
    verb, *places = sys.argv[1:]
    sys.exit({"download": download, "install": install}[verb](*map(Path, places)))
