"""C++ kernels for CPUs: laws, compiling, and calling with torch's own OpenMP pool."""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
import struct
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elsa_tune.device import Device, host_cpu
from elsa_tune.generate import kernel_cache as _kernel_cache
from elsa_tune.generate.backends import Built, Call, Kernel, Operands
from elsa_tune.generate.cpp import compiler as _compiler
from elsa_tune.generate.laws import dims_are_generated, parts_have_text, scan_has_states
from elsa_tune.generate.parts import of_family
from elsa_tune.generate.render import Source, render
from elsa_tune.generate.tensors import check_dims, kernel_arguments, new_output, rows_contiguous
from elsa_tune.parts import element as elements
from elsa_tune.parts import exp2, scan
from elsa_tune.parts.operand import Array, arguments
from elsa_tune.problem import Problem
from elsa_tune.variant import Variant

TEMPLATE = "cpp/attention.cpp.j2"
LIBRARY = "kernel.so"
SCRATCH_BYTES = 64 << 20
SPILL_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class Isa:
    """An instruction set: floats in its widest vector, its vector registers, and the compiler's flags for it."""

    lanes: int
    registers: int
    flags: tuple[str, ...]


ISAS = {
    "avx512": Isa(
        16, 32, ("-mavx512f", "-mavx512vl", "-mavx512dq", "-mavx512bw", "-mfma", "-mprefer-vector-width=512")
    ),
    "avx2": Isa(8, 16, ("-mavx2", "-mfma")),
    "neon": Isa(4, 32, ()),
    "portable": Isa(4, 16, ()),
}
FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-exceptions",
    "-fvisibility=hidden",
)
WARNINGS = ("-Wall", "-Wextra", "-Wno-psabi")


# Laws: each says in one sentence why a combination cannot work or cannot win.


def isa_is_here(isa: str, device: Device) -> str | None:
    if isa not in device.isas:
        return f"{device} has {', '.join(device.isas)}, not {isa}"
    if isa == "portable" and len(device.isas) > 1:
        return f"the same code compiled for {device.isas[0]} is faster"
    return None


def lanes_fit_isa(isa: str, lanes: int) -> str | None:
    widest = ISAS[isa].lanes
    if lanes > widest or lanes * 2 < widest:
        return f"{isa} vectors hold {widest} floats; {lanes} lanes waste or split them"
    return None


def chunk_divides(lanes: int, chunk: int, problem: Problem) -> str | None:
    if chunk > lanes:
        return f"a row cannot take {chunk} of {lanes} lanes"
    if problem.head_dim % chunk or problem.value_dim % chunk:
        return f"chunk {chunk} does not divide head_dim {problem.head_dim} and value_dim {problem.value_dim}"
    return None


def rows_fill_vectors(lanes: int, chunk: int, problem: Problem) -> str | None:
    rows, per_vector = problem.q_len * problem.group, lanes // chunk
    if rows >= lanes and chunk > 1:
        return f"{rows} query rows fill {lanes} lanes; a chunk would only repeat work"
    if rows < lanes and per_vector > 2 * rows:
        return f"{rows} query rows leave most of {per_vector} row lanes empty"
    return None


def tiles_fill_registers(
    isa: str, lanes: int, chunk: int, query_vectors: int, key_tile: int, value_tile: int
) -> str | None:
    registers = ISAS[isa].registers
    for tile in (key_tile, value_tile):
        accumulators = query_vectors * tile
        operands = query_vectors + (chunk > 1)
        if accumulators + operands > registers:
            return f"{accumulators} accumulators and {operands} operands exceed {registers} registers"
        if accumulators < 4:
            return f"{accumulators} accumulators cannot hide the latency of a multiply-add"
    return None


def leaf_holds_key_tiles(key_tile: int, block_n: int) -> str | None:
    return f"a leaf of {block_n} keys is no multiple of {key_tile}" if block_n % key_tile else None


def value_tile_fits(value_tile: int, chunk: int, problem: Problem) -> str | None:
    steps = problem.value_dim // chunk
    return f"{value_tile} value columns at once, of {steps}" if value_tile > steps else None


def packed_heads_are_read_again(
    lanes: int, chunk: int, query_vectors: int, splits: int, packing: str, problem: Problem
) -> str | None:
    if packing != "head":
        return None
    if splits > 1:
        return "splits of a head are taken by several threads, each of which would pack its own"
    rows, block_m = problem.q_len * problem.group, query_vectors * lanes // chunk
    return f"{rows} query rows are one tile, which reads every key once" if rows <= block_m else None


def packed_heads_fit(block_n: int, packing: str, problem: Problem, device: Device) -> str | None:
    leaves = math.ceil(problem.kv_len / block_n)
    size = 4 * device.cores * leaves * block_n * (problem.head_dim + problem.value_dim)
    if packing == "head" and size > SCRATCH_BYTES:
        return f"a head for each thread takes {size >> 20} MiB, more than {SCRATCH_BYTES >> 20}"
    return None


def narrow_elements_are_packed(packing: str, problem: Problem) -> str | None:
    if packing == "direct" and problem.dtype != "fp32":
        return f"keys and values of {problem.dtype} are widened as they are packed"
    return None


def head_parts_are_long(chunk: int, head_parts: int, problem: Problem) -> str | None:
    steps = problem.head_dim // chunk
    if head_parts > 1 and steps < 16 * head_parts:
        return f"{steps} products are a short sum; {head_parts} parts of it cost more than they save"
    return None


def exp_is_exact(exp_degree: int, problem: Problem) -> str | None:
    if float(exp2.COEFFICIENTS[exp_degree][0]) != 1:
        return f"2^0 by a polynomial of degree {exp_degree} is not 1: every leaf would change what was folded before it"
    error = exp2.relative_error(exp_degree)
    if problem.precision in ("strict", "fp32") and error > 8 * 2.0**-24:
        return f"a polynomial of degree {exp_degree} errs by {error:.1e}; {problem.precision} allows 8 units in the last place"
    return None


LAWS = (
    isa_is_here,
    lanes_fit_isa,
    chunk_divides,
    rows_fill_vectors,
    tiles_fill_registers,
    leaf_holds_key_tiles,
    value_tile_fits,
    scan_has_states,
    packed_heads_are_read_again,
    packed_heads_fit,
    narrow_elements_are_packed,
    head_parts_are_long,
    exp_is_exact,
)
generated = True


def refusal(problem: Problem, device: Device) -> str | None:
    """C++ serves float32, and bfloat16 and float16 with float32 states, forward, masks and scores that it has texts of, dimensions up
    to 256, on CPUs."""
    if device.kind != "cpu":
        return f"the C++ backend runs on CPUs, not on {device}"
    if problem.precision not in elements.get(problem.dtype).classes or problem.precision not in (
        "strict",
        problem.dtype,
    ):
        return f"the C++ backend multiplies and adds floats; {problem.dtype} has no class {problem.precision} there"
    if problem.direction != "forward":
        return "the C++ backend has no backward kernels"
    return parts_have_text("cpp", problem) or dims_are_generated(problem)


@cache
def source(variant: Variant, problem: Problem) -> Source:
    """The C++ text for the problem's family."""
    axes = variant.axes
    strategy = scan.get(str(axes["scan"]))
    return render(
        TEMPLATE,
        {
            **axes,
            "scan": strategy,
            "block_scan": scan.get(strategy.block or strategy.name),
            "grid_scan": scan.get(strategy.grid or strategy.name),
            "variant": variant,
            "family": problem.family,
            "head_dim": problem.head_dim,
            "value_dim": problem.value_dim,
            **of_family(problem),
            "dtype": problem.dtype,
            "block_m": int(axes["query_vectors"]) * int(axes["lanes"]) // int(axes["chunk"]),
            "exp2_coefficients": exp2.COEFFICIENTS[int(axes["exp_degree"])],
            "scratch_bytes": SCRATCH_BYTES,
        },
    )


def command(variant: Variant) -> list[str]:
    """The compile command for a shared library, without input and output. Raises CompilerMissing."""
    return [*_compiler.find().command, *FLAGS, *WARNINGS, *ISAS[str(variant.axes["isa"])].flags, "-shared"]


def digest(variant: Variant, problem: Problem, device: Device | None = None) -> str:
    """What a built kernel is filed under: code, compile command and compiler version."""
    parts = [source(variant, problem).digest, *command(variant), _compiler.find().version]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def _built(digest: str, found: tuple[Path, Mapping[str, int]]) -> Built:
    path, resources = found
    spills, fmas = resources["hot_spills"], resources["hot_fmas"]
    spill = f"{spills} stack stores for {fmas} multiply-adds in hot loops" if spills > SPILL_SHARE * fmas else ""
    return Built(digest, path, resources, spill)


def find(digest: str) -> Built | None:
    """The kernel built earlier under ``digest``, or None."""
    found = _kernel_cache.find(digest, LIBRARY)
    return _built(digest, found) if found else None


def build_text(text: str, name: str, variant: Variant) -> Built:
    """Compile C++ text under the digest ``name``: to assembly, which is read for spills, then to a library."""

    def fill(folder: Path) -> Mapping[str, int]:
        (folder / "kernel.cpp").write_text(text)
        compiler, flags = _compiler.find(), [*FLAGS, *WARNINGS, *ISAS[str(variant.axes["isa"])].flags]
        compiler.run([*flags, "-S", str(folder / "kernel.cpp"), "-o", str(folder / "kernel.s")], str(variant))
        compiler.run(
            ["-shared", "-fPIC", *compiler.link, str(folder / "kernel.s"), "-o", str(folder / LIBRARY)], str(variant)
        )
        return _compiler.hot_loops((folder / "kernel.s").read_text())

    return _built(name, _kernel_cache.add(name, LIBRARY, fill))


def build(variant: Variant, problem: Problem, device: Device | None = None) -> Built:
    """The compiled family, from the cache or the compiler."""
    name = digest(variant, problem)
    built = find(name) or build_text(source(variant, problem).text, name, variant)
    return replace(built, resources={**built.resources, **_network(variant)})


def _network(variant: Variant) -> dict[str, int]:
    """Depth and merges of the scan of one query tile: among the workers of a core, then among splits."""
    strategy = scan.get(str(variant.axes["scan"]))
    counts = {"depth": 0, "merges": 0}
    for level, axis in (("block", "workers"), ("grid", "splits")):
        n = int(variant.axes[axis])
        rounds = scan.get(getattr(strategy, level) or strategy.name).total(n)
        counts["depth"] += scan.depth(rounds, n)
        counts["merges"] += sum(r.merges(n) for r in rounds)
    return counts


# Calling. The generated code starts its threads through GOMP_parallel of the OpenMP runtime that torch
# loaded, so there is one pool, torch's, and no second runtime is ever linked.


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
        cls.usable = False

    @classmethod
    def parent_never_computed(cls) -> None:
        cls.usable = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=Pool.forked)

# struct Call of templates/cpp/call.j2: five pointers that change with every call, then what a layout decides.
_POINTERS = struct.Struct("<5q").pack
_LAYOUT = struct.Struct("<17qdqq").pack


class CppKernel:
    """A compiled family: call it with any shape, or bind a shape for repeated calls."""

    def __init__(self, library: Path, problem: Problem) -> None:
        function = ctypes.CDLL(str(library)).elsa_attention
        function.argtypes, function.restype = [ctypes.c_char_p], ctypes.c_int
        self._function, self._problem = function, problem
        # appended to the call where there are any
        letters = "".join("d" if a.kind == "real" else "q" for a in arguments(problem.declared))
        self._operands = struct.Struct(f"<{letters}").pack

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None = None,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        operands: Operands = (),
    ) -> Tensor:
        check_dims(self._problem, query, key, value)
        query, key, value = map(rows_contiguous, (query, key, value))
        return self.bind(query, key, value)(query, key, value, scale, out, lse, operands)

    def bind(self, query: Tensor, key: Tensor, value: Tensor) -> Call:
        """A call for exactly these shapes and strides. What the scale and torch's threads decide is computed when they change."""
        if not query.stride(3) == key.stride(3) == value.stride(3) == 1:
            return self  # rows are copied at every call
        function, threads, pool, empty_like = self._function, torch.get_num_threads, Pool, torch.empty_like
        value_dim, launch = self._problem.value_dim, openmp()[1]
        default_scale = 1 / math.sqrt(self._problem.head_dim)
        alike = value_dim == self._problem.head_dim and empty_like(query, device="meta").stride(3) == 1
        batch, heads, q_len, _ = query.shape
        _, kv_heads, kv_len, _ = value.shape
        strides = *query.stride()[:3], *key.stride()[:3], *value.stride()[:3]
        known: tuple[object, bytes] = (None, b"")
        problem, more = self._problem, self._operands
        has_arrays = any(isinstance(one, Array) for one in problem.declared)

        def packed(out: Sequence[int], scale: float | None, given: Sequence[Any]) -> bytes:
            return _LAYOUT(
                batch, heads, kv_heads, q_len, kv_len, *strides, *out,
                default_scale if scale is None else scale, threads(), launch if pool.usable else 0,
            ) + more(*(x.data_ptr() if isinstance(x, Tensor) else x for x in given))  # fmt: skip

        def call(
            query: Tensor,
            key: Tensor,
            value: Tensor,
            scale: float | None = None,
            out: Tensor | None = None,
            lse: Tensor | None = None,
            operands: Operands = (),
        ) -> Tensor:
            nonlocal known
            if query.is_neg() or key.is_neg() or value.is_neg():
                return self(query, key, value, scale, out, lse, operands)
            if out is None and not has_arrays:  # always laid out alike
                out, settings = (
                    empty_like(query) if alike else new_output(query, value_dim),
                    (scale, threads(), pool.usable, operands),
                )
                decided = known
                if settings != decided[0]:
                    given = kernel_arguments(problem, operands, query, key)
                    decided = known = (settings, packed(out.stride()[:3], scale, given))
                layout = decided[1]
            else:
                out = new_output(query, value_dim) if out is None else out
                layout = packed(out.stride()[:3], scale, kernel_arguments(problem, operands, query, key))
            sums = lse.data_ptr() if lse is not None else 0
            if function(_POINTERS(query.data_ptr(), key.data_ptr(), value.data_ptr(), out.data_ptr(), sums) + layout):
                raise MemoryError("the kernel could not allocate its split states; free memory or use splits=1")
            return out

        return call


def load(built: Built, variant: Variant, problem: Problem) -> Kernel:
    """The kernel of the problem's family."""
    assert built.path is not None
    return CppKernel(built.path, problem)


def peak(seconds: float) -> dict[str, float]:
    """Measured limits of this CPU with torch's threads: multiply-add ``gflops`` and read ``gbytes`` a second."""
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
    function(torch.get_num_threads(), openmp()[1], seconds, memory.data_ptr(), size, rates)
    return {"gflops": rates[0], "gbytes": rates[1]}


def toolchain(device: Device | None = None) -> dict[str, str]:
    """Compiler and OpenMP runtime."""
    return {"compiler": _compiler.find().version, "openmp": Path(openmp()[0]).name, "python": sys.version.split()[0]}
