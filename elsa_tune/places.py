"""Where things are: the visible folders of a checkout or a wheel, and the user's own folder."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import platformdirs

PACKAGE = Path(__file__).resolve().parent


@cache
def data(folder: str) -> Path:
    """The folder ``templates``, ``search_spaces`` or ``cache``, beside the package in a checkout, inside it in a wheel."""
    beside = PACKAGE.parent / folder
    return beside if (PACKAGE.parent / "pyproject.toml").is_file() and beside.is_dir() else PACKAGE / "data" / folder


def home() -> Path:
    """The user's folder for the database and built kernels; ELSA_TUNE_HOME overrides it. Not created here."""
    return Path(os.environ.get("ELSA_TUNE_HOME") or platformdirs.user_cache_path("elsa-tune"))


def database() -> Path:
    """The user's own measurement database."""
    return home() / "measurements.db"


def kernels() -> Path:
    """The user's folder of built kernels."""
    return home() / "kernels"
