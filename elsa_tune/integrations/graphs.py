"""Compiled programs that call torch's operator past the dispatcher: a graph pass puts an operator of ours in its place.

Inductor does so under cpp_wrapper, and AOTInductor always. Its settings take a second to import, so that the pass is put there when somebody
else imports them.
"""

from __future__ import annotations

import hashlib
import sys
from contextlib import suppress
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from elsa_tune.dispatch.torchs import OPERATOR

SETTINGS = "torch._inductor.config"
_SLOT = "post_grad_custom_pre_pass"


def install() -> None:
    """Put the pass where Inductor finds it, now or when its settings are imported."""
    if SETTINGS in sys.modules:
        _put(sys.modules[SETTINGS])
    elif not any(isinstance(one, _AtImport) for one in sys.meta_path):
        sys.meta_path.insert(0, _AtImport())


def remove() -> None:
    """Take it away again, unless somebody put another in its place."""
    sys.meta_path[:] = [one for one in sys.meta_path if not isinstance(one, _AtImport)]
    settings: Any = sys.modules.get(SETTINGS)
    found: Any = getattr(settings, _SLOT, None)
    if hasattr(found, "before_elsa_tune"):
        setattr(settings, _SLOT, found.before_elsa_tune)


class _AtImport(MetaPathFinder):
    """Watches for Inductor's settings."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != SETTINGS:
            return None
        with suppress(ValueError):  # taken away meanwhile
            sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Then(spec.loader)
        return spec


class _Then(Loader):
    """Loads a module as another loader does, then puts the pass there."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        try:
            _put(module)
        except Exception as error:  # another Inductor than the one we know
            sys.stderr.write(f"elsa-tune has no pass in this Inductor: {type(error).__name__}: {error}\n")


def _put(settings: Any) -> None:
    before = getattr(settings, _SLOT)  # AttributeError: an Inductor without
    if hasattr(before, "before_elsa_tune"):
        return
    base: Any = import_module("torch._inductor.custom_graph_pass").CustomGraphPass

    class Pass(base):  # type: ignore[misc]
        """Whoever was there before, then ours."""

        before_elsa_tune = staticmethod(before) if before else None

        def __call__(self, graph: torch.fx.Graph) -> None:
            if before is not None:
                before(graph)
            if settings.cpp_wrapper:
                replace(graph)

        def uuid(self) -> Any:
            """Names what it does, for Inductor's caches; None, so that nothing is kept, where whoever was there before says so."""
            its = before.uuid() if hasattr(before, "uuid") else None
            return None if before is not None and its is None else (its, _TEXT)

    setattr(settings, _SLOT, Pass())


_TEXT = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


def replace(graph: torch.fx.Graph) -> int:
    """Call ``elsa_tune::attend`` where torch's operator is called; how often."""
    torchs, ours = getattr(torch.ops.aten, OPERATOR).default, torch.ops.elsa_tune.attend.default
    found = graph.find_nodes(op="call_function", target=torchs)
    for node in found:
        node.target = ours
    return len(found)
