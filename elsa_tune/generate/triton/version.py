"""Which Triton is installed, asked without importing it."""

from __future__ import annotations

import importlib.metadata

from elsa_tune.errors import CompilerMissing


def version() -> str:
    """Triton's. Raises CompilerMissing."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        raise CompilerMissing("Triton is not installed; pip install 'elsa-tune[triton]'") from None
