"""Fixtures: a home of its own for every test session, and for tests that change the database."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

_SESSION_HOME = tempfile.TemporaryDirectory(prefix="elsa-tune-tests-")
os.environ["ELSA_TUNE_HOME"] = _SESSION_HOME.name  # before anything reads it: tests never touch the user's own
if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # as a shell starts what runs beside it: programs that tests start would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
for name in ("ELSA_TUNE_DB", "ELSA_TUNE_KERNELS"):
    os.environ.pop(name, None)
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait for work leave the cores to the other worker
os.environ["TRITON_INTERPRET"] = (
    "1"  # kernels of GPUs run here on the CPU, slowly; what compiles them does so elsewhere
)


@pytest.fixture(autouse=True)
def nothing_shipped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Tests choose among what they recorded themselves, whatever winners this version ships."""
    from elsa_tune import places

    visible = places.data
    monkeypatch.setattr(places, "data", lambda folder: tmp_path if folder == "cache" else visible(folder))


@pytest.fixture(autouse=True)
def no_opencl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenCL devices are here only for tests that ask for them."""
    if "opencl" not in request.keywords:
        from elsa_tune import device

        monkeypatch.setattr(device, "opencl_devices", lambda: ())
        monkeypatch.setattr(device, "find_opencl_devices", lambda: iter(()))  # a loader that found none stays that way
        monkeypatch.setenv("OCL_ICD_VENDORS", "none")  # for processes that tests start


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty home: no database, no kernels, nothing handed over to torch yet."""
    from elsa_tune.dispatch import handovers, serving

    monkeypatch.setenv("ELSA_TUNE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(handovers, "counts", type(handovers.counts)())
    serving.refresh()
    yield tmp_path / "home"
    serving.refresh()


@pytest.fixture(autouse=True)
def nothing_is_still_built(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test's calls left to be built beside them ends with it, before what it patched is put back."""
    yield
    for thread in threading.enumerate():
        if thread.name == "elsa-tune-build":  # shelf.BUILDER, which most tests never load
            thread.join()


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A browser without a window, for pages that people look at."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install playwright"
    )
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no chromium on this machine: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield started
        started.close()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many tests were skipped, even if none."""
    terminalreporter.write_line(f"skipped: {len(terminalreporter.stats.get('skipped', []))}")
