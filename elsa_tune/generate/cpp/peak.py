"""This CPU's peaks, measured by a kernel of our own: multiply-adds and memory."""

from __future__ import annotations

import ctypes

import torch

from elsa_tune.device import host_cpu
from elsa_tune.generate.cpp import pool as _pool
from elsa_tune.generate.cpp.build import build_text, find
from elsa_tune.generate.cpp.laws import ISAS
from elsa_tune.generate.render import render
from elsa_tune.variant import Variant


def peak(seconds: float) -> dict[str, float]:
    """Measured peaks of this CPU with torch's threads: multiply-add ``gflops`` and read ``gbytes`` a second."""
    isa = host_cpu().isas[0]
    text = render("cpp/peak.cpp.j2", {"lanes": ISAS[isa].lanes})
    variant = Variant("cpp", (("isa", isa),), "cpp.peak")
    name = f"peak-{isa}-{text.digest}"
    built = find(name) or build_text(text.text, name, variant)
    function = ctypes.CDLL(str(built.path)).elsa_peak
    function.argtypes = [
        ctypes.c_int64,
        ctypes.c_void_p,
        ctypes.c_double,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_void_p,
    ]
    size = min(max(4 * host_cpu().last_cache, 128 << 20), 768 << 20) // 4  # floats: more than the caches hold
    memory, rates = torch.zeros(size), (ctypes.c_double * 2)()
    function(torch.get_num_threads(), _pool.openmp()[1], seconds, memory.data_ptr(), size, rates)
    return {"gflops": rates[0], "gbytes": rates[1]}
