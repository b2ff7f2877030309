"""What pages of the documentation ask the program: every public function of this folder's public files is a macro."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules
from typing import Any


def define_env(env: Any) -> None:
    """Offer them to pages whose front matter says ``render_macros: true``."""
    for file in iter_modules(__path__):
        if file.name.startswith("_"):
            continue
        module = import_module(f"{__name__}.{file.name}")
        for name, value in vars(module).items():
            ours = getattr(value, "__module__", "") == module.__name__ and not isinstance(value, type)
            if callable(value) and ours and not name.startswith("_"):
                env.macro(value, name)
