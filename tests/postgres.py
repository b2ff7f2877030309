"""A PostgreSQL server of a test's own: a temporary cluster, started as whoever may start one."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from pathlib import Path


def programs() -> Path | None:
    """The newest installed server's programs, or None."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    on_path = shutil.which("initdb")
    return found[-1].parent if found else Path(on_path).parent if on_path else None


class Cluster:
    """A server in ``folder``, which lies in a temporary folder of its own; stop and start it at will."""

    def __init__(self, folder: Path) -> None:
        bin = programs()
        assert bin is not None
        self.bin, self.folder = bin, folder
        folder.mkdir()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.as_user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []  # it refuses to run as root
        if self.as_user:
            shutil.chown(folder, "postgres")
            folder.parent.chmod(0o755)
        self._run("initdb", "-D", str(folder / "data"), "-A", "trust", "-U", "elsa", "--no-sync")
        self.start()

    def empty(self, name: str) -> str:
        """The URL of a new database."""
        self._run("createdb", "-h", "127.0.0.1", "-p", str(self.port), "-U", "elsa", name)
        return f"postgresql+psycopg://elsa@127.0.0.1:{self.port}/{name}"

    def start(self) -> None:
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={self.folder} -c fsync=off"
        self._run(
            "pg_ctl", "-D", str(self.folder / "data"), "-o", options, "-l", str(self.folder / "log"), "-w", "start"
        )

    def stop(self) -> None:
        self._run("pg_ctl", "-D", str(self.folder / "data"), "-m", "immediate", "-w", "stop")

    def _run(self, program: str, *arguments: str) -> None:
        subprocess.run(
            [*self.as_user, str(self.bin / program), *arguments], check=True, stdout=subprocess.DEVNULL, cwd=self.folder
        )
