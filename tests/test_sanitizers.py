"""Every value of C++'s space, of every part and element, under AddressSanitizer and UndefinedBehaviorSanitizer: nothing is read or written
beyond what is given."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from contracts import covering

from elsa_tune.device import host_cpu
from elsa_tune.generate import cpp

HERE = Path(__file__).parent
ISA = host_cpu().isas[0]
LANES = f"{ISA}.l{cpp.ISAS[ISA].lanes}"
PLAIN = f"cpp.serial.{LANES}.q2.k4.v4.n24@fp32.d16"
KERNELS = [f"{variant}@{covering.family_of(row).family}" for row, variant in covering.kernels(1, "cpp")]
KERNELS += [
    f"cpp.serial.{LANES}.q2.k4.v4.n24@fp32.d16.causal.bias.backward",
    f"cpp.serial.{LANES}.q1.k4.v2.n16.g4.s4.packed@bf16.d33.v17.window.softcap+sinks.backward",
    f"cpp.serial.{LANES}.q2.k4.v2.n24.g4.products7.s2@fp32.d40.v24.lengths.alibi.backward",
]
# Exponents are put together by integer additions and shifts that wrap, as vectors of this compiler do.
FLAGS = "-fsanitize=address,undefined -fno-sanitize=signed-integer-overflow,shift -fno-sanitize-recover=all"


def libraries() -> list[str]:
    """Where g++ has the sanitizers' own, which a process that loads checked code loads first."""
    command = ["g++", "-print-file-name=libasan.so"], ["g++", "-print-file-name=libubsan.so"]
    try:
        found = [subprocess.run(one, capture_output=True, text=True, check=True).stdout.strip() for one in command]
    except (OSError, subprocess.CalledProcessError):
        return []
    return [name for name in found if Path(name).is_file()]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """For processes that run checked kernels; they are built."""
    if len(libraries()) < 2:
        pytest.skip("g++ has no sanitizers here")
    found = {
        **os.environ, "CXX": f"g++ {FLAGS}", "ELSA_TUNE_HOME": str(tmp_path_factory.mktemp("home")),
        "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0",
    }  # fmt: skip
    checked(found, "build", PLAIN, *KERNELS).check_returncode()
    return {**found, "LD_PRELOAD": " ".join(libraries())}


def checked(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(HERE / "sanitized.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_nothing_beyond_what_is_given_is_touched(environment: dict[str, str]) -> None:
    done = checked(environment, "run", *KERNELS)
    assert done.returncode == 0 and done.stdout.count("is done") == len(KERNELS), done.stderr[-3000:]


def test_a_key_too_many_is_seen(environment: dict[str, str]) -> None:
    done = checked(environment, "past", PLAIN)
    assert done.returncode and "heap-buffer-overflow" in done.stderr, done.stderr[-3000:]
