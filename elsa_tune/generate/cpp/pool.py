"""torch's OpenMP pool, in which kernels compute.

Generated code starts its threads through GOMP_parallel of the runtime that torch loaded, so that there is one pool and no second
runtime is ever linked.
"""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache


@cache
def openmp() -> tuple[str, int]:
    """The file and GOMP_parallel address of the loaded OpenMP runtime; ("", 0) where it has none."""
    import threadpoolctl

    for pool in threadpoolctl.threadpool_info():
        if pool["user_api"] == "openmp":
            entry = getattr(ctypes.CDLL(pool["filepath"]), "GOMP_parallel", None)
            if entry is not None:
                return pool["filepath"], ctypes.cast(entry, ctypes.c_void_p).value or 0
    return "", 0


class Pool:
    """Whether kernels may start threads here. An OpenMP pool does not survive a fork, and starting one in a child whose
    parent had used it hangs; so a child computes on its own thread unless it knows that its parent never computed."""

    usable = True

    @classmethod
    def forked(cls) -> None:
        """This process is a child: it must not start threads."""
        cls.usable = False

    @classmethod
    def parent_never_computed(cls) -> None:
        """It may after all."""
        cls.usable = True


if sys.platform != "win32":
    os.register_at_fork(after_in_child=Pool.forked)
