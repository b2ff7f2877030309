"""A report that is served on this machine alone while it is tuned: who looks on sees every problem as it goes."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from elsa_tune.errors import ElsaTuneError
from elsa_tune.shell.report import page
from elsa_tune.shell.report.contents import contents
from elsa_tune.tuning.task import Progress

LOOPBACK = "127.0.0.1"
EDITION_LASTS = 10.0
"""Seconds that a page serves before a new one is written, between two measurements, never beside one."""

WATCHED = 15.0
"""Seconds since somebody asked for news, after which nobody looks on and no page is written."""

FAREWELL = 4.0
"""Seconds that those who look on have to fetch the last page: they ask every two."""

NOTHING_YET = """<!doctype html><html lang="en"><meta charset="utf-8"><meta http-equiv="refresh" content="2"><title>elsa-tune report</title>
<link rel="icon" href="data:,"><body><main><p>Nothing is measured yet.</p></main>"""


class Live:
    """Serves the report while it is entered, on a free port or the one given; called with progress, it takes that over.

    Only what names this machine's own loopback address is answered, so that no page of another site reads it.
    """

    def __init__(self, port: int = 0) -> None:
        try:
            self._server = _Server((LOOPBACK, port), _handler(self))
        except OSError as error:
            raise ElsaTuneError(f"port {port}: {error.strerror}; name another, --watch=PORT") from error
        self._thread = threading.Thread(target=self._server.serve_forever, name="elsa-tune-watch", daemon=True)
        self._writer = page.Writer()
        self._page = NOTHING_YET
        self._news: dict[str, Any] = {"families": [], "doing": ""}
        self._edition, self._ended = 0, False
        self._end = time.monotonic()  # of the budget
        self._written = self._asked = float("-inf")
        self._problems: list[str] = []

    @property
    def address(self) -> str:
        """Where a browser finds it."""
        return f"http://{LOOPBACK}:{self._server.server_address[1]}/"

    def __enter__(self) -> Live:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and self._is_watched():
            self._write()
            self._ended = True
            time.sleep(FAREWELL)
        self._server.shutdown()
        self._server.server_close()

    def __call__(self, progress: Progress) -> None:
        """Take over what a run knows; called between measurements, where a page may be written."""
        self._news = {"families": [asdict(family) for family in progress.families], "doing": progress.doing}
        self._end = time.monotonic() + progress.left
        self._problems = [str(task.problem) for task in progress.tasks]
        if self._is_watched() and time.monotonic() - self._written > EDITION_LASTS:
            self._write()

    def _is_watched(self) -> bool:
        return time.monotonic() - self._asked < WATCHED

    def _write(self) -> None:
        self._written = time.monotonic()
        with suppress(Exception):  # nothing is measured yet, a locked database, a fault of ours: no page ends a run
            self._page = self._writer.page(contents(problems=self._problems), live=True)
            self._edition += 1

    # What is asked of it.

    def answer(self, path: str) -> tuple[str, str] | None:
        """Content type and content of an address's path; None for one that is not there."""
        self._asked, path = time.monotonic(), urlsplit(path).path
        answers: dict[str, Callable[[], tuple[str, str]]] = {
            "/": lambda: ("text/html", self._page),
            "/news": lambda: ("application/json", json.dumps(self._told())),
            "/plotly.js": lambda: ("text/javascript", page.plotly_js()),
        }
        return answers[path]() if path in answers else None

    def _told(self) -> dict[str, Any]:
        left = max(0.0, self._end - time.monotonic())
        return {**self._news, "left": left, "edition": self._edition, "ended": self._ended}


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that went away before it was answered is nobody's news."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


def _handler(live: Live) -> type[BaseHTTPRequestHandler]:
    """What answers requests from what is served."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if urlsplit(f"//{self.headers.get('Host')}").hostname not in (LOOPBACK, "localhost"):
                self.send_error(HTTPStatus.FORBIDDEN)
            elif (found := live.answer(self.path)) is None:
                self.send_error(HTTPStatus.NOT_FOUND)
            else:
                kind, text = found
                body = text.encode()
                self.send_response(HTTPStatus.OK)
                self.send_header("Content-Type", f"{kind}; charset=utf-8")
                self.send_header("Content-Length", str(len(body)))
                self.send_header("Cache-Control", "no-store")
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, format: str, *arguments: Any) -> None:
            """Requests are nobody's news."""

    return Handler
