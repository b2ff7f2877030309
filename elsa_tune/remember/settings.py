"""What a user has settled once: databases that a team shares, and whose signatures are trusted."""

from __future__ import annotations

import os
from typing import Any

from elsa_tune import places
from elsa_tune.errors import BadSettings

SEPARATOR = ";"
"""Between paths or URLs in ELSA_TUNE_DB: neither has one."""


def databases() -> list[str]:
    """Paths or URLs of databases to read beside one's own, in order: ELSA_TUNE_DB, or ``databases`` in the settings file.
    Raises BadSettings."""
    if (text := os.environ.get("ELSA_TUNE_DB")) is not None:
        return [one.strip() for one in text.split(SEPARATOR) if one.strip()]
    return _strings("databases")


def trusted() -> list[str]:
    """Public keys, as ``ssh-keygen`` writes them, whose signed exports are accepted; empty: signatures are not asked for.
    Raises BadSettings."""
    return _strings("trusted")


def _strings(name: str) -> list[str]:
    path = places.settings()
    if not path.is_file():
        return []
    try:
        content: dict[str, Any] = places.read_toml(path)
    except (OSError, ValueError) as error:
        raise BadSettings(f"{path}: {error}; mend or remove it") from error
    found = content.get(name, [])
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        raise BadSettings(f"{path}: {name} must be a list of strings; mend it")
    return found
