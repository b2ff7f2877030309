"""Files from wherever they lie: a path, or an address that fsspec opens."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from elsa_tune.errors import BadMeasurements, ElsaTuneError

SCHEMES = ("s3", "gs", "hf", "https", "http")
"""Where remote files may lie; what opens them comes with the extras ``remote``, ``s3``, ``gs`` and ``hf``."""

MOST_BYTES = 1 << 32
"""Of a file, and of what is unpacked from one."""


@contextmanager
def fetched(source: str) -> Iterator[Path]:
    """A local copy of a remote file, for as long as it is needed; a local one as it is. Raises BadMeasurements."""
    scheme, apart, _ = source.partition("://")
    if not apart:
        yield Path(source).expanduser()
        return
    if scheme not in SCHEMES or "::" in source:
        raise BadMeasurements(f"{source}: use a path, or a URL that begins with one of {', '.join(SCHEMES)}")
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "fetched"
        try:
            import fsspec

            opened: Any = fsspec.open(source, "rb")
            with opened as remote, target.open("wb") as local:
                while portion := remote.read(1 << 20):
                    if local.tell() > MOST_BYTES:
                        raise BadMeasurements(
                            f"{source} is larger than {MOST_BYTES >> 30} GiB; give a file of measurements"
                        )
                    local.write(portion)
        except ImportError as error:
            extra = scheme if scheme in ("s3", "gs", "hf") else "remote"
            raise BadMeasurements(f"{source}: {error}; pip install 'elsa-tune[{extra}]'") from error
        except ElsaTuneError:
            raise
        except Exception as error:  # each file system has errors of its own
            raise BadMeasurements(
                f"{source}: {type(error).__name__}: {error}; check the address and your access"
            ) from error
        yield target
