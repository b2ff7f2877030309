"""Huge pages for outputs so large that the allocator takes them from the system anew.

Who first writes to a page waits until the system has zeroed it; of 4 KiB each, that takes as long as attention over short windows does.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Callable
from functools import cache

from torch import Tensor

FRESH = 32 << 20
"""Bytes from which glibc's malloc always takes fresh memory (its DEFAULT_MMAP_THRESHOLD_MAX)."""

HUGE = 2 << 20
"""Bytes of a huge page of x86-64, and of AArch64 with pages of 4 KiB."""


@cache
def _advise() -> Callable[[int, int], object] | None:
    """The system's madvise for an address and bytes, where there are huge pages to ask for."""
    if sys.platform != "linux" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return lambda start, bytes: function(start, bytes, mmap.MADV_HUGEPAGE)


def ask_for(output: Tensor) -> None:
    """Let the system back a new output by huge pages. A system that has none to give says no, and nothing is lost."""
    if advise := _advise():
        start = -(-output.data_ptr() // HUGE) * HUGE
        end = (output.data_ptr() + output.nbytes) // HUGE * HUGE
        if start < end:
            advise(start, end - start)
