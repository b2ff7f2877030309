"""ROCm's libraries, as torch's wheel or the system brings them, and what its code object manager reads in machine code."""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import importlib.util
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from elsa_tune.generate.gpu import machine_code as _machine_code

_EXECUTABLE, _SOURCE, _DISASSEMBLE = 0x8, 0x1, 0xC
"""amd_comgr.h: kinds of data, and the action that makes source of an executable."""


class _Handle(ctypes.Structure):
    """What the code object manager names its objects by."""

    _fields_ = (("handle", ctypes.c_uint64),)


def libraries(*names: str) -> Iterator[ctypes.CDLL]:
    """Those of ROCm's libraries called so that can be loaded: torch's own first, then the system's."""
    spec = importlib.util.find_spec("torch")
    folders = [Path(spec.origin).parent / "lib"] if spec and spec.origin else []
    for name in names:
        own = [str(folder / f"lib{name}.so") for folder in folders]
        for file in (*own, ctypes.util.find_library(name), f"/opt/rocm/lib/lib{name}.so"):
            with contextlib.suppress(OSError):
                if file:
                    yield ctypes.CDLL(file)


@cache
def _comgr() -> ctypes.CDLL | None:
    """The code object manager, or None."""
    return next(libraries("amd_comgr"), None)


def _ask(name: str, *arguments: object) -> None:
    """Call a function of the code object manager. Raises RuntimeError."""
    if failed := getattr(_comgr(), f"amd_comgr_{name}")(*arguments):
        raise RuntimeError(f"amd_comgr_{name} answered {failed}")


@cache
def archs() -> tuple[str, ...]:
    """What ROCm's compiler serves (gfx900, ...), where that can be asked."""
    if _comgr() is None:
        return ()
    count, name = ctypes.c_size_t(), ctypes.c_char_p()
    _ask("get_isa_count", ctypes.byref(count))
    found = []
    for i in range(count.value):
        _ask("get_isa_name", ctypes.c_size_t(i), ctypes.byref(name))
        found.append((name.value or b"").decode().rpartition("-")[2])
    return tuple(found)


def report(code: bytes) -> dict[str, int]:
    """Registers, spills and instructions of a code object; nothing where no code object manager reads it."""
    if _comgr() is None:
        return {}
    with contextlib.suppress(RuntimeError):
        return _read(code)
    return {}


def _read(code: bytes) -> dict[str, int]:
    """What its notes and instructions say. Raises RuntimeError."""
    data = _Handle()
    _ask("create_data", _EXECUTABLE, ctypes.byref(data))
    try:
        _ask("set_data", data, ctypes.c_size_t(len(code)), code)
        _ask("set_data_name", data, b"kernel.hsaco")
        return _machine_code.of_code_object(_disassembly(data), list(_notes(data)))
    finally:
        _ask("release_data", data)


def _disassembly(data: _Handle) -> str:
    """Its instructions as text. Raises RuntimeError."""
    action, given, made, text = _Handle(), _Handle(), _Handle(), _Handle()
    _ask("create_action_info", ctypes.byref(action))
    _ask("create_data_set", ctypes.byref(given))
    _ask("create_data_set", ctypes.byref(made))
    try:
        _ask("action_info_set_isa_name", action, _text("get_data_isa_name", data))
        _ask("data_set_add", given, data)
        _ask("do_action", _DISASSEMBLE, action, given, made)
        _ask("action_data_get_data", made, _SOURCE, ctypes.c_size_t(0), ctypes.byref(text))
        try:
            return _text("get_data", text).decode()
        finally:
            _ask("release_data", text)
    finally:
        _ask("destroy_data_set", made)
        _ask("destroy_data_set", given)
        _ask("destroy_action_info", action)


def _text(name: str, of: _Handle) -> bytes:
    """A text that a function first tells the size of."""
    size = ctypes.c_size_t()
    _ask(name, of, ctypes.byref(size), None)
    text = ctypes.create_string_buffer(size.value)
    _ask(name, of, ctypes.byref(size), text)
    return text.raw.rstrip(b"\0")


def _notes(data: _Handle) -> Iterator[dict[str, int]]:
    """What the compiler noted of each kernel."""
    notes, kernels, count = _Handle(), _Handle(), ctypes.c_size_t()
    _ask("get_data_metadata", data, ctypes.byref(notes))
    _ask("metadata_lookup", notes, b"amdhsa.kernels", ctypes.byref(kernels))
    _ask("get_metadata_list_size", kernels, ctypes.byref(count))
    for i in range(count.value):
        kernel, found = _Handle(), {}
        _ask("index_list_metadata", kernels, ctypes.c_size_t(i), ctypes.byref(kernel))
        for name in _machine_code.NOTES.values():
            value = _Handle()
            _ask("metadata_lookup", kernel, f".{name}".encode(), ctypes.byref(value))
            found[name] = int(_text("get_metadata_string", value))
            _ask("destroy_metadata", value)
        yield found
        _ask("destroy_metadata", kernel)
    _ask("destroy_metadata", kernels)
    _ask("destroy_metadata", notes)
