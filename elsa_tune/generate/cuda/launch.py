"""A start of a kernel and what it is given; what loads and starts kernels is a Runtime."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

C_TYPES: dict[str, Any] = {"p": ctypes.c_void_p, "q": ctypes.c_int64, "i": ctypes.c_int, "f": ctypes.c_float}


class Launch(NamedTuple):
    """One start of a kernel: its name, blocks, threads of a block, bytes of shared memory, and its arguments: a letter each
    (p pointer, q 64-bit and i 32-bit integer, f float), and values, tensors or None for pointers."""

    name: str
    blocks: int
    threads: int
    shared: int
    types: str
    arguments: tuple[Any, ...]


class Runtime(Protocol):
    """A loaded kernel's device."""

    def run(self, launches: list[Launch]) -> None:
        """Start them in order, on torch's current stream where there are streams."""

    def floats(self, like: Tensor, count: int) -> Tensor:
        """Memory for so many floats, where ``like`` lies."""
        ...

    def counters(self, like: Tensor, count: int) -> Tensor:
        """So many integers, zero, for launches that leave them zero."""
        ...


class TorchMemory:
    """Scratch from torch's allocator, which knows streams and graphs."""

    def floats(self, like: Tensor, count: int) -> Tensor:
        return torch.empty(count, dtype=torch.float32, device=like.device)


def _address(x: Tensor | None) -> int:
    """Where a tensor begins; 0 for none."""
    return 0 if x is None else x.data_ptr()


def values(launch: Launch) -> tuple[Any, ...]:
    """A launch's arguments as numbers."""
    return tuple(_address(x) if kind == "p" else x for kind, x in zip(launch.types, launch.arguments, strict=True))


@cache
def c_types(types: str) -> tuple[Any, ...]:
    """The C types of a launch's arguments."""
    return tuple(C_TYPES[letter] for letter in types)
