"""torch's CPU operator for attention, answered without Python: the extension of native.cpp, built once for each torch."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from elsa_tune.errors import BuildFailed
from elsa_tune.generate import kernel_cache
from elsa_tune.generate.backends import Counts, Kernel
from elsa_tune.generate.cpp import compiler as _compiler
from elsa_tune.generate.cpp import huge_pages
from elsa_tune.generate.cpp.call import CppKernel
from elsa_tune.parts.operand import Operands

SOURCE = Path(__file__).with_name("native.cpp")
LIBRARY = "native.so"
FLAGS = ("-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden")
BUILD_SECONDS = 60
_AXES = 4

_I64, _Words = ctypes.c_int64, ctypes.POINTER(ctypes.c_int64)


def _build() -> Path:
    """The extension, from the kernel cache or the compiler. Raises BuildFailed, CompilerMissing, KernelCacheUnsafe."""
    text, compiler, torchs = SOURCE.read_bytes(), _compiler.find(), Path(torch.__file__).parent
    parts = [text, *(x.encode() for x in (*FLAGS, compiler.version, torch.__version__))]
    name = hashlib.sha256(b"\0".join(parts)).hexdigest()[:20]
    if found := kernel_cache.find(name, LIBRARY):
        return found[0]

    def fill(folder: Path) -> Mapping[str, int]:
        include, lib = ["-isystem", str(torchs / "include")], ["-L", str(torchs / "lib"), "-ltorch_cpu"]
        for command in (
            [*FLAGS, *include, "-c", str(SOURCE), "-o", "native.o"],
            ["-shared", "native.o", *lib, "-o", LIBRARY],
        ):
            compiler.run(command, "torch's operator", seconds=BUILD_SECONDS, folder=folder)
        return {}

    return kernel_cache.add(name, LIBRARY, fill)[0]


class Native:
    """The extension, loaded. What it cannot answer it asks the operator ``elsa_tune::decide`` of, which must be registered."""

    def __init__(self, path: Path) -> None:
        try:
            library = ctypes.CDLL(str(path))
        except OSError as error:
            raise BuildFailed(f"torch's operator: {error}") from error
        self._library = library
        library.elsa_enable.argtypes, library.elsa_enable.restype = [ctypes.c_char_p], ctypes.c_int
        library.elsa_aside.argtypes = [ctypes.c_int]
        library.elsa_fail.argtypes = [ctypes.c_char_p]
        library.elsa_row.restype = _I64
        library.elsa_counts.argtypes = [_I64, _Words, _Words]
        library.elsa_bind.argtypes = [
            _Words, ctypes.c_void_p, ctypes.c_char_p, _I64, _Words, _Words, ctypes.c_double, _I64, ctypes.c_int, _I64,
        ]  # fmt: skip
        library.elsa_bind_roughly.argtypes = [_Words, _I64]
        library.elsa_ask.argtypes = [ctypes.c_int]
        self.disable, self.forget, self.ask = library.elsa_disable, library.elsa_forget, library.elsa_ask
        self.aside = ctypes.PyDLL(str(path)).elsa_aside
        """Answers calls of this thread by torch's own kernel, ``aside(1)``, until ``aside(-1)``."""

    def enable(self, name: str) -> None:
        """Answer torch's operator from now on, registered under a name. Raises BuildFailed."""
        if error := self._library.elsa_enable(name.encode()):
            raise BuildFailed(f"torch's operator cannot be overridden: torch says {error}")

    def fail(self, why: str) -> None:
        """The call of this thread that is asked about fails, and this is to be said of it."""
        self._library.elsa_fail(why.encode(errors="replace"))

    def counts(self) -> Counts:
        """Of somebody new who answers."""
        return _Row(self._library)

    def bind(
        self, tensors: tuple[Tensor, Tensor, Tensor], is_causal: bool, mask: Tensor | None, counts: Counts,
        kernel: Kernel | None = None, results: tuple[Tensor, Tensor] | None = None, operands: Operands = (),
    ) -> None:  # fmt: skip
        """As elsa_tune.generate.backends.Interposer says: C++ kernels, whose only tensor among operands is the mask itself."""
        text = _layout(tensors, is_causal, mask)
        if kernel is None:
            self._library.elsa_bind(text, None, None, 0, None, None, 0.0, -1, 0, counts.number)
            return
        made_anew = any(_address(x) not in (None, _address(mask)) for x in operands)
        if made_anew or results is None or not isinstance(kernel, CppKernel):
            return
        query, key, value = tensors
        output, lse = results
        whole = kernel.whole(query, key, value, output.stride(), operands)
        if whole is not None:
            outer = (_I64 * _AXES)(*output.stride()), (_I64 * _AXES)(*lse.stride(), 0)
            self._library.elsa_bind(
                text, whole.function, whole.text, len(whole.text) // 8, *outer, whole.scale, whole.mask,
                output.nbytes >= huge_pages.FRESH, counts.number,
            )  # fmt: skip

    def bind_roughly(
        self, tensors: tuple[Tensor, Tensor, Tensor], is_causal: bool, mask: Tensor | None, counts: Counts
    ) -> None:
        """As elsa_tune.generate.backends.Interposer says."""
        self._library.elsa_bind_roughly(_layout(tensors, is_causal, mask), counts.number)


class _Row:
    """A row of the extension: called, how many calls somebody answered, and in how many seconds."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library, self.number = library, library.elsa_row()

    def __call__(self) -> tuple[int, float]:
        calls, spent = _I64(), _I64()
        self._library.elsa_counts(self.number, calls, spent)
        return calls.value, spent.value / 1e9


def _layout(
    tensors: tuple[Tensor, Tensor, Tensor], is_causal: bool, mask: Tensor | None
) -> ctypes.Array[ctypes.c_int64]:
    """What a call's tensors look like, in the words of native.cpp."""
    words = [_number_of(tensors[0].dtype), int(is_causal), _number_of(mask.dtype) if mask is not None else -1]
    for x in (*tensors, mask):
        words += _axes(x)
    return (_I64 * len(words))(*words)


def _address(x: object) -> int | None:
    """Of a tensor's memory."""
    return x.data_ptr() if isinstance(x, Tensor) else None


def _axes(x: Tensor | None) -> list[int]:
    """Sizes and strides of four axes, of a tensor of so many or fewer, as native.cpp sees them."""
    if x is None:
        return [0] * 2 * _AXES
    before = _AXES - x.dim()
    return [*[1] * before, *x.shape, *[0] * before, *x.stride()]


@cache
def _number_of(dtype: torch.dtype) -> int:
    """What torch's C interface calls a dtype."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    function = getattr(library, f"aoti_torch_dtype_{str(dtype).removeprefix('torch.')}")
    function.restype = ctypes.c_int32
    return int(function())


@cache
def load() -> Native:
    """The extension for this torch, built now if it must be. Raises BuildFailed, CompilerMissing, KernelCacheUnsafe, OSError."""
    return Native(_build())
