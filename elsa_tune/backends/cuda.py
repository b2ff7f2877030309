"""CUDA C kernels, and the same body as HIP and OpenCL: rendering, compiling for any target, and calling."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from torch import Tensor

from elsa_tune import exp2, scan
from elsa_tune.backends import Built, Call, Kernel, _cuda_runtimes, _gpu_report, _kernel_cache, _opencl, _rtc
from elsa_tune.backends._cuda_laws import Tiling, laws
from elsa_tune.backends._cuda_runtimes import Launch, Runtime
from elsa_tune.backends._laws import SCRATCH_BYTES, dims_are_generated
from elsa_tune.backends._tensors import check_dims, new_output, rows_contiguous
from elsa_tune.device import Device
from elsa_tune.errors import CompilerMissing
from elsa_tune.problem import Problem
from elsa_tune.render import Source, render
from elsa_tune.variant import Variant

__all__ = ["laws"]
generated = True
TEMPLATES = {"cuda": "cuda/attention.cu.j2", "hip": "cuda/attention.cu.j2", "opencl": "cuda/attention.cl.j2"}
BINARIES = {"cuda": "kernel.cubin", "hip": "kernel.hsaco", "opencl": "kernel.cl"}
FINISH_THREADS = 128
PRECISIONS = {"fp32": ("strict", "fp32"), "fp16": ("fp16", "approx"), "bf16": ("bf16",)}


def refusal(problem: Problem, device: Device) -> str | None:
    """CUDA C serves float32, float16 and bfloat16, forward, no mask or causal, dimensions up to 256, on GPUs and OpenCL
    devices."""
    if device.kind not in TEMPLATES:
        return f"the CUDA C backend runs on GPUs and OpenCL devices, not on {device}"
    if problem.precision not in PRECISIONS[problem.dtype]:
        return f"the CUDA C backend multiplies and adds without a matrix unit; {problem.dtype} has no class {problem.precision} there"
    if problem.direction != "forward":
        return "the CUDA C backend has no backward kernels"
    return dims_are_generated(problem)


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
            "mask": problem.mask,
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


class CudaKernel:
    """A compiled family: call it with any shape."""

    def __init__(self, runtime: Runtime, variant: Variant, problem: Problem) -> None:
        self._runtime, self._problem, self._axes = runtime, problem, variant.axes
        self._tiling = Tiling.of(variant.axes, problem)

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None = None,
        out: Tensor | None = None,
        lse: Tensor | None = None,
    ) -> Tensor:
        check_dims(self._problem, query, key, value)
        if not query.stride(3) == key.stride(3) == value.stride(3) == 1:
            query, key, value = map(rows_contiguous, (query, key, value))
        if out is None:
            out = new_output(query, self._problem.value_dim)
        self._runtime.run(self._launches(query, key, value, scale, out, lse))
        return out

    def bind(self, query_shape: Sequence[int], value_shape: Sequence[int]) -> Call:
        """Nothing can be computed beforehand."""
        return self

    def _launches(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, out: Tensor, lse: Tensor | None
    ) -> list[Launch]:
        """The kernels to start, in order; as many heads at a time as the states of splits have memory for."""
        tiling, splits, schedule = self._tiling, int(self._axes["splits"]), str(self._axes["schedule"])
        batch, heads, q_len, head_dim = query.shape
        _, kv_heads, kv_len, value_dim = value.shape
        factor = 1 / math.sqrt(head_dim) if scale is None else scale
        c, sign = (abs(factor) * math.log2(math.e), math.copysign(1.0, factor)) if factor else (1.0, 0.0)
        group, pairs = heads // kv_heads, batch * kv_heads
        rows = group * q_len
        tiles, slots = -(-rows // tiling.block_m), pairs
        partial = arrivals = None
        if splits > 1:
            floats = splits * rows * (value_dim + 2)
            slots = max(1, min(pairs, SCRATCH_BYTES // (4 * floats)))
            partial = self._runtime.floats(query, slots * floats)
        strides = [n for x in (query, key, value, out) for n in x.stride()[:3]]
        aligned = [int(_aligned(x, tiling.vector)) for x in (query, key, value)]
        launches = []
        for first in range(0, pairs, slots):
            now = min(slots, pairs - first)
            if schedule == "last_block":
                arrivals = self._runtime.counters(query, now * tiles)
            launches.append(
                Launch(
                    "attend", now * tiles * splits, tiling.threads, tiling.shared_bytes,
                    "pppppppff" + 12 * "q" + 9 * "i",
                    (query, key, value, out, lse, partial, arrivals, c, sign, *strides, kv_heads, group, q_len, kv_len,
                     first, now, *aligned),
                )
            )  # fmt: skip
            if schedule == "two_kernels":
                launches.append(
                    Launch(
                        "finish", -(-now * rows * value_dim // FINISH_THREADS), FINISH_THREADS, 0, "pppqqqiiiii",
                        (partial, out, lse, *out.stride()[:3], kv_heads, group, q_len, first, now),
                    )
                )  # fmt: skip
        return launches


def _aligned(x: Tensor, vector: int) -> bool:
    """Whether every vector of ``vector`` elements of every row may be read at once."""
    strides = [stride for stride, size in zip(x.stride()[:3], x.shape[:3], strict=True) if size > 1]
    return x.data_ptr() % (vector * x.element_size()) == 0 and all(stride % vector == 0 for stride in strides)


def load(built: Built, variant: Variant, problem: Problem) -> Kernel:
    """The kernel of the problem's family."""
    assert built.path is not None
    return CudaKernel(_cuda_runtimes.load(str(variant.axes["dialect"]), built.path), variant, problem)


def toolchain(device: Device | None = None) -> dict[str, str]:
    """The compiler that serves the device; without one, every compiler found. Raises CompilerMissing, also where nothing could
    start what is built."""
    if device is None or device.kind not in BINARIES:
        found = {**_rtc.versions(), **_opencl.versions()}
        if not found:
            raise CompilerMissing(f"no compiler of GPU kernels was found; {_rtc.REMEDY}, 'elsa-tune[opencl]' pyopencl")
        return found
    _cuda_runtimes.needed(device.kind)
    return _opencl.versions() if device.kind == "opencl" else {"rtc": _rtc.find(device).version}
