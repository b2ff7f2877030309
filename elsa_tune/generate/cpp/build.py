"""Building C++ kernels: text to assembly, which is read for spills, to a library in the kernel cache."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from elsa_tune.generate import kernel_cache as _kernel_cache
from elsa_tune.generate.backends import Built
from elsa_tune.generate.cpp import compiler as _compiler
from elsa_tune.generate.cpp import machine_code as _machine_code
from elsa_tune.generate.cpp.compiler import FLAGS, WARNINGS
from elsa_tune.generate.cpp.laws import ISAS
from elsa_tune.variant import Variant

LIBRARY = "kernel.so"


def _built(digest: str, found: tuple[Path, Mapping[str, int]]) -> Built:
    """What the kernel cache holds, and what its assembly says against it."""
    path, resources = found
    return Built(digest, path, resources, _machine_code.flaw(resources))


def find(digest: str) -> Built | None:
    """The kernel built earlier under ``digest``, or None."""
    found = _kernel_cache.find(digest, LIBRARY)
    return _built(digest, found) if found else None


def build_text(text: str, name: str, variant: Variant) -> Built:
    """Compile C++ text under the digest ``name``: to assembly, which is read for spills, then to a library."""

    def fill(folder: Path) -> Mapping[str, int]:
        (folder / "kernel.cpp").write_text(text)
        compiler, flags = _compiler.find(), [*FLAGS, *WARNINGS, *ISAS[str(variant.axes["isa"])].flags]
        movable = [flag for flag in FLAGS if flag == "-fPIC"]
        for arguments in (  # by names without a folder, so that equal text is equal work to who remembers a compiler's
            [*flags, "-S", "kernel.cpp", "-o", "kernel.s"],
            ["-shared", *movable, *compiler.link, "kernel.s", "-o", LIBRARY],
        ):
            compiler.run(arguments, str(variant), folder=folder)
        return _machine_code.hot_loops((folder / "kernel.s").read_text())

    return _built(name, _kernel_cache.add(name, LIBRARY, fill))
