"""What an installed elsa-tune does where little else is; run by an environment of its own, it prints one JSON line.

Run with ``bare`` (no compiler) or ``zig`` (the extra `compiler`), and a folder that may be written to.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from click.testing import CliRunner
from torch.nn.functional import scaled_dot_product_attention

import elsa_tune
from elsa_tune import places
from elsa_tune.device import host_cpu
from elsa_tune.dispatch import serving
from elsa_tune.generate import backends
from elsa_tune.generate.lawful import starts
from elsa_tune.measurement import Measurement
from elsa_tune.problem import Problem
from elsa_tune.remember.database import Database
from elsa_tune.shell import cli
from elsa_tune.space import Space

SMALL = "fp32.d16@b1.h2.q96.k96"
OF_EXTRAS = (
    "triton",
    "pynvml",
    "pyopencl",
    "cuda",
    "aiohttp",
    "s3fs",
    "psycopg",
    "onnx",
    "transformers",
    "ziglang",
    "mypy",
    "pytest",
)


def command(*words: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a command."""
    result = CliRunner().invoke(cli.main, words)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def error_of_attention() -> float:
    """Beside torch's own."""
    query = torch.randn(3, 1, 2, 96, 16).unbind()
    return float((elsa_tune.attention(*query) - scaled_dot_product_attention(*query)).abs().max())


def is_offline() -> bool:
    """Whether no network answers."""
    try:
        socket.create_connection(("192.0.2.1", 9), timeout=0.2).close()
    except OSError as error:
        return not isinstance(error, TimeoutError)
    return False


def bare(folder: Path) -> dict[str, object]:
    """Without a compiler: first without a place to write to, then with one."""
    told: dict[str, object] = {
        "package": str(places.PACKAGE), "templates": str(places.data("templates")), "home": str(places.home()), "offline": is_offline(),
        "extras": [name for name in OF_EXTRAS if find_spec(name)], "error": error_of_attention(), "homeless": command("--problem", SMALL),
        "winners": command("winners"),
    }  # fmt: skip
    os.environ["ELSA_TUNE_HOME"] = str(folder)
    serving.refresh()
    told["tuned"] = command("--problem", SMALL, "--budget", "3", "--json")
    told["error after"], told["served"] = error_of_attention(), [row.kernel for row in elsa_tune.served()]
    told["versions"] = command("--version")
    return told


def zig(folder: Path) -> dict[str, object]:
    """With the compiler of the extra: a kernel that is said to have won is built, proven and serves; then a short run."""
    os.environ["ELSA_TUNE_HOME"] = str(folder)
    problem, here = Problem.parse(SMALL), host_cpu()
    variant = next(one for one in starts(Space.read("cpp"), problem, here) if "portable" not in str(one))
    with Database.for_writing() as database:
        database.record(Measurement(
            device=str(here), problem=SMALL, variant=str(variant), digest=backends.get("cpp").digest(variant, problem), status="ok", stage="final",
            error=1e-7, seconds=1e-5, ratio=3.0, ratio_low=2.9, ratio_high=3.1, samples=(1e-5,), incumbent="sdpa.flash", incumbent_samples=(3e-5,),
        ))  # fmt: skip
    kernel = elsa_tune.load(SMALL)
    return {
        "compiler": backends.get("cpp").toolchain()["compiler"], "won": str(variant), "loaded": str(kernel.variant), "rung": kernel.rung,
        "error": error_of_attention(), "served": [row.kernel for row in elsa_tune.served()],
        "tuned": command("--problem", "fp32.d16@b1.h2.q80.k80", "--budget", "3", "--json"), "versions": command("--version"),
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps({"bare": bare, "zig": zig}[sys.argv[1]](Path(sys.argv[2]))))
