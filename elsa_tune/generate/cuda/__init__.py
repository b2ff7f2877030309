"""CUDA C kernels, and the same body as HIP and OpenCL: rendering, compiling for any target, and calling."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from elsa_tune import device as devices
from elsa_tune.device import Device
from elsa_tune.errors import CompilerMissing
from elsa_tune.generate import gpu_report as _gpu_report
from elsa_tune.generate import kernel_cache as _kernel_cache
from elsa_tune.generate.backends import Built, Call, Kernel, Operands
from elsa_tune.generate.cuda import opencl as _opencl
from elsa_tune.generate.cuda import rtc as _rtc
from elsa_tune.generate.cuda import runtimes as _cuda_runtimes
from elsa_tune.generate.cuda.laws import LAWS, Tiling
from elsa_tune.generate.cuda.runtimes import Launch, Runtime
from elsa_tune.generate.laws import SCRATCH_BYTES, dims_are_generated, parts_have_text
from elsa_tune.generate.parts import of_family
from elsa_tune.generate.render import Source, render
from elsa_tune.generate.tensors import check_dims, kernel_arguments, new_output, rows_contiguous
from elsa_tune.parts import exp2, scan
from elsa_tune.parts.operand import arguments
from elsa_tune.problem import Problem
from elsa_tune.variant import Variant

__all__ = ["LAWS"]
generated = True
TEMPLATES = {"cuda": "cuda/attention.cu.j2", "hip": "cuda/attention.cu.j2", "opencl": "cuda/attention.cl.j2"}
BINARIES = {"cuda": "kernel.cubin", "hip": "kernel.hsaco", "opencl": "kernel.cl"}
FINISH_THREADS = 128
_ATTEND, _FINISH = "pppppppff" + 12 * "q" + 9 * "i", "pppqqqiiiii"
_MOST_PLANS = 64
ELEMENTS = {"int64": "index_t", "int32": "int", "float32": "float", "bool": "unsigned char"}
"""What the text calls torch's dtypes, of what arrays hold."""
PRECISIONS = {"fp32": ("strict", "fp32"), "fp16": ("fp16", "approx"), "bf16": ("bf16",)}


def refusal(problem: Problem, device: Device) -> str | None:
    """CUDA C serves float32, float16 and bfloat16, forward, masks in closed form, dimensions up to 256, on GPUs and OpenCL
    devices."""
    if device.kind not in TEMPLATES:
        return f"the CUDA C backend runs on GPUs and OpenCL devices, not on {device}"
    if problem.precision not in PRECISIONS[problem.dtype]:
        return f"the CUDA C backend multiplies and adds without a matrix unit; {problem.dtype} has no class {problem.precision} there"
    if problem.dtype != "fp32" and problem.precision != "approx" and device.kind == "cuda" and device.capability >= 80:
        return f"{device.arch} multiplies {problem.dtype} on a matrix unit, which multiply-adds alone do not reach; Triton uses it"
    if problem.direction != "forward":
        return "the CUDA C backend has no backward kernels"
    return parts_have_text("cuda", problem) or dims_are_generated(problem)


@cache
def source(variant: Variant, problem: Problem) -> Source:
    """The text for the problem's family, in the variant's dialect."""
    axes = variant.axes
    strategy, tiling = scan.get(str(axes["scan"])), Tiling.of(axes, problem)
    return render(
        TEMPLATES[str(axes["dialect"])],
        {
            **axes,
            "scan": strategy,
            "block_scan": scan.get(strategy.block or strategy.name),
            "grid_scan": scan.get(strategy.grid or strategy.name),
            "variant": variant,
            "family": problem.family,
            "dtype": problem.dtype,
            "head_dim": problem.head_dim,
            "value_dim": problem.value_dim,
            **of_family(problem),
            "elements": ELEMENTS,
            "tiling": tiling,
            "parts": [""] if tiling.words == 1 else [".x", ".y", ".z", ".w"][: tiling.words],
            "exp2_coefficients": exp2.COEFFICIENTS[5],
        },
    )


def command(variant: Variant) -> list[str]:
    """No command: the text is compiled by a library, for the device at hand."""
    return []


def digest(variant: Variant, problem: Problem, device: Device | None = None) -> str:
    """What a built kernel is filed under: code, target, register cap and compiler."""
    assert device is not None
    target = str(device) if device.kind == "opencl" else device.arch
    made = [source(variant, problem).digest, str(variant.axes["registers"]), target, _compiler(device)]
    return hashlib.sha256("\0".join(made).encode()).hexdigest()[:20]


def _compiler(device: Device) -> str:
    """The compiler that serves the device. Raises CompilerMissing."""
    return _opencl.version(device) if device.kind == "opencl" else _rtc.find(device).version


def find(digest: str) -> Built | None:
    """The kernel built earlier under ``digest``, or None."""
    for binary in BINARIES.values():
        if found := _kernel_cache.find(digest, binary):
            return _built(digest, *found)
    return None


def _built(digest: str, path: Path, resources: Mapping[str, int]) -> Built:
    precision = "strict" if resources.get("strict") else ""
    return Built(digest, path, resources, _gpu_report.flaw(resources, precision) if "registers" in resources else "")


def build(variant: Variant, problem: Problem, device: Device | None = None) -> Built:
    """The compiled family, from the cache or the device's compiler. Raises BuildFailed, CompilerMissing."""
    assert device is not None, "a kernel of this backend is built for a device"
    name = digest(variant, problem, device)
    if built := find(name):
        return built
    text = source(variant, problem).text
    warps = -(-int(variant.axes["threads"]) // device.warp)

    def fill(folder: Path) -> Mapping[str, int]:
        binary = folder / BINARIES[device.kind]
        if device.kind == "opencl":
            binary.write_text(text)
            (folder / _cuda_runtimes.DEVICE_FILE).write_text(str(device))
            return _opencl.compile_report(text, device, str(variant))
        code, report = _rtc.compile_for(device, text, int(variant.axes["registers"]), str(variant))
        binary.write_bytes(code)
        shared = Tiling.of(variant.axes, problem).shared_bytes
        return {**report, "shared": shared, "warps": warps, "strict": int(problem.precision == "strict")}

    return _built(name, *_kernel_cache.add(name, BINARIES[device.kind], fill))


class Turn(NamedTuple):
    """Some heads of a call, as many as there is scratch for: blocks, tiles and plain arguments of the kernel, and of the second
    one, if there is one."""

    blocks: int
    tiles: int
    plain: tuple[Any, ...]
    finish_blocks: int
    finish_plain: tuple[Any, ...]


class Plan(NamedTuple):
    """What shapes, strides and scale decide of a call: floats of scratch, and its turns."""

    scratch: int
    turns: list[Turn]


class CudaKernel:
    """A compiled family: call it with any shape. What a memory layout decides is computed once."""

    def __init__(self, runtime: Runtime, variant: Variant, problem: Problem) -> None:
        self._runtime, self._problem = runtime, problem
        self._splits, self._schedule = int(variant.axes["splits"]), str(variant.axes["schedule"])
        self._tiling = Tiling.of(variant.axes, problem)
        self._plans: dict[tuple[Any, ...], Plan] = {}
        letters = {"integer": "q", "real": "f", "pointer": "p"}
        self._types = _ATTEND + "".join(letters[a.kind] for a in arguments(problem.declared))
        self._scored = bool(of_family(problem)["scored"])

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
        if not query.stride(3) == key.stride(3) == value.stride(3) == 1:
            query, key, value = map(rows_contiguous, (query, key, value))
        if out is None:
            out = new_output(query, self._problem.value_dim)
        self._runtime.run(self._launches(query, key, value, scale, out, lse, operands))
        return out

    def bind(self, query: Tensor, key: Tensor, value: Tensor) -> Call:
        """The kernel itself: it remembers what it computed for shapes and strides."""
        return self

    def _launches(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, out: Tensor, lse: Tensor | None,
        operands: Operands = (),
    ) -> list[Launch]:  # fmt: skip
        """The kernels to start, in order; as many heads at a time as the states of splits have memory for."""
        width = self._tiling.vector * query.element_size()
        begins = tuple(x.data_ptr() % width == 0 for x in (query, key, value))
        strides = (query.stride(), key.stride(), value.stride(), out.stride())
        layout = (query.shape, value.shape, strides, scale, begins)
        plan = self._plans.get(layout)
        if plan is None:
            if len(self._plans) >= _MOST_PLANS:
                self._plans.clear()
            plan = self._plans[layout] = self._plan(*layout)
        more = kernel_arguments(self._problem, operands, query, key) if operands or self._types != _ATTEND else ()
        tiling, partial, arrivals, launches = self._tiling, None, None, []
        if plan.scratch:
            partial = self._runtime.floats(query, plan.scratch)
        for turn in plan.turns:
            if self._schedule == "last_block":
                arrivals = self._runtime.counters(query, turn.tiles)
            given = (query, key, value, out, lse, partial, arrivals, *turn.plain, *more)
            launches.append(Launch("attend", turn.blocks, tiling.threads, tiling.shared_bytes, self._types, given))
            if turn.finish_blocks:
                merged = (partial, out, lse, *turn.finish_plain)
                launches.append(Launch("finish", turn.finish_blocks, FINISH_THREADS, 0, _FINISH, merged))
        return launches

    def _plan(
        self, query_shape: Sequence[int], value_shape: Sequence[int], strides: Sequence[Sequence[int]],
        scale: float | None, begins: Sequence[bool],
    ) -> Plan:  # fmt: skip
        tiling, splits = self._tiling, self._splits
        batch, heads, q_len, head_dim = query_shape
        _, kv_heads, kv_len, value_dim = value_shape
        factor = 1 / math.sqrt(head_dim) if scale is None else scale
        c, sign = (abs(factor), math.copysign(1.0, factor)) if factor else (1.0, 0.0)
        if factor and not self._scored:  # a score is of products times the scale, and meets log2(e) afterwards
            c *= math.log2(math.e)
        group, pairs = heads // kv_heads, batch * kv_heads
        rows = group * q_len
        tiles = -(-rows // tiling.block_m)
        floats = splits * rows * (value_dim + 2) if splits > 1 else 0
        slots = max(1, min(pairs, SCRATCH_BYTES // (4 * floats))) if floats else pairs
        outer = [n for stride in strides for n in stride[:3]]
        shapes = (query_shape, (batch, kv_heads, kv_len), (batch, kv_heads, kv_len))
        aligned = [
            int(begin and _keeps_aligned(stride, shape, tiling.vector))
            for begin, stride, shape in zip(begins, strides[:3], shapes, strict=True)
        ]
        turns = []
        for first in range(0, pairs, slots):
            now = min(slots, pairs - first)
            plain = (c, sign, *outer, kv_heads, group, q_len, kv_len, first, now, *aligned)
            finish = -(-now * rows * value_dim // FINISH_THREADS) if self._schedule == "two_kernels" else 0
            merged = (*strides[3][:3], kv_heads, group, q_len, first, now)
            turns.append(Turn(now * tiles * splits, now * tiles, plain, finish, merged))
        return Plan(slots * floats, turns)


def _keeps_aligned(strides: Sequence[int], shape: Sequence[int], vector: int) -> bool:
    """Whether, where the first vector of a tensor is aligned, those of every row are."""
    return all(stride % vector == 0 for stride, size in zip(strides[:3], shape, strict=False) if size > 1)


def load(built: Built, variant: Variant, problem: Problem) -> Kernel:
    """The kernel of the problem's family."""
    assert built.path is not None
    return CudaKernel(_cuda_runtimes.load(str(variant.axes["dialect"]), built.path), variant, problem)


def toolchain(device: Device | None = None) -> dict[str, str]:
    """The compiler that serves the device; without one, those of NVIDIA and OpenCL found. Raises CompilerMissing, also where the
    device is here and nothing could start what is built."""
    if device is None or device.kind not in BINARIES:
        found = {**_rtc.versions(), **_opencl.versions()}
        if not found:
            raise CompilerMissing(f"no compiler of GPU kernels was found; {_rtc.REMEDY}, 'elsa-tune[opencl]' pyopencl")
        return found
    if device in devices.gpus():
        _cuda_runtimes.needed(device.kind)
    return _opencl.versions() if device.kind == "opencl" else {"rtc": _rtc.find(device).version}
