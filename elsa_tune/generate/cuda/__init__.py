"""CUDA C kernels, and the same body as HIP and OpenCL: what this backend answers.

Three dialects: CUDA C++ (C++14, nvcc 10.2 and later), HIP, and OpenCL C 1.2. Float32 multiply-adds alone, float16 and bfloat16 as storage
(pairs of halves where class `approx` asks for them); forward.

A tile has `threads / workers / lanes * rows` query rows and a leaf `lanes * keys` keys. All query heads of a KV head share a tile, in
decoding too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

from elsa_tune import device as devices
from elsa_tune.device import Device
from elsa_tune.errors import BuildFailed, CompilerMissing
from elsa_tune.generate import kernel_cache as _kernel_cache
from elsa_tune.generate.backends import Built, Finding, Kernel
from elsa_tune.generate.context import of_family
from elsa_tune.generate.cuda import opencl as _opencl
from elsa_tune.generate.cuda import rtc as _rtc
from elsa_tune.generate.cuda import runtimes as _cuda_runtimes
from elsa_tune.generate.cuda import work as _work
from elsa_tune.generate.cuda.call import FINISH_THREADS, STATE, CudaKernel
from elsa_tune.generate.cuda.laws import LAWS
from elsa_tune.generate.cuda.tiling import Tiling
from elsa_tune.generate.gpu import machine_code as _machine_code
from elsa_tune.generate.gpu.work import Work
from elsa_tune.generate.laws import SCRATCH_BYTES, dims_are_generated, family_has_text, mask_has_text
from elsa_tune.generate.portable import Blocks, Portable
from elsa_tune.generate.render import Source, render
from elsa_tune.parts import element as elements
from elsa_tune.parts import exp as exps
from elsa_tune.parts import operator as operators
from elsa_tune.parts import scan
from elsa_tune.parts import schedule as schedules
from elsa_tune.problem import Problem
from elsa_tune.variant import Variant

__all__ = ["LAWS"]
TEMPLATES = {"cuda": "cuda/attention.cu.j2", "hip": "cuda/attention.cu.j2", "opencl": "cuda/attention.cl.j2"}
BINARIES = {"cuda": "kernel.cubin", "hip": "kernel.hsaco", "opencl": "kernel.cl"}
HEADERS = {"cuda": "cu", "opencl": "cpp"}
"""Dialects that headers are written in, and how a program that includes one ends."""
ELEMENTS = {"int64": "index_t", "int32": "int", "float32": "float", "bool": "unsigned char"}
"""What the text calls torch's dtypes, of what arrays hold."""


def refusal(problem: Problem, device: Device) -> str | None:
    """CUDA C serves float32, float16 and bfloat16, forward, masks in closed form, dimensions up to 256, on GPUs and OpenCL
    devices."""
    if device.kind not in TEMPLATES:
        return f"the CUDA C backend runs on GPUs and OpenCL devices, not on {device}"
    element, precision = elements.get(problem.dtype), elements.precision(problem.precision)
    if precision not in element.precisions or precision.rounds_operands:
        return f"the CUDA C backend multiplies and adds without a matrix unit; {problem.dtype} has no class {problem.precision} there"
    if element.narrow and not precision.rounds_sums and device.kind == "cuda" and device.capability >= 80:
        return f"{device.arch} multiplies {problem.dtype} on a matrix unit, which multiply-adds alone do not reach; Triton uses it"
    if problem.direction != "forward":
        return "the CUDA C backend has no backward kernels"
    return family_has_text("cuda", problem) or dims_are_generated(problem)


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
            "operator": operators.get(problem.operator),
            "schedule": schedules.get(str(axes["schedule"])),
            "state": STATE,
            "variant": variant,
            "family": problem.family,
            "element": elements.get(problem.dtype),
            "head_dim": problem.head_dim,
            "value_dim": problem.value_dim,
            **of_family(problem),
            "elements": ELEMENTS,
            "tiling": tiling,
            "parts": [""] if tiling.words == 1 else [".x", ".y", ".z", ".w"][: tiling.words],
            "exp": exps.get(str(axes["exp"])),
            "exp_degree": exps.DEGREE,
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
    """What the kernel cache holds, and what the compiler's words say against it."""
    return Built(digest, path, resources, _machine_code.flaw(resources) if "registers" in resources else "")


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
        strict = int(elements.precision(problem.precision).ieee)
        return {**report, "shared": shared, "warps": warps, "strict": strict}

    return _built(name, *_kernel_cache.add(name, BINARIES[device.kind], fill))


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


def examine() -> Iterator[Finding]:
    """The GPU makers' compilers. AMD's only where such a GPU is: it brings an LLVM that ends a process where PoCL's is."""
    amd = any(gpu.kind == "hip" for gpu in devices.gpus())
    found = [rtc for rtc in (*_rtc.nvrtcs(), _rtc.hiprtc() if amd else None) if rtc]
    good, state = bool(found) or not devices.gpus(), ", ".join(map(str, found)) or "none"
    yield Finding("CUDA C and HIP compilers", good, state, "" if found else _rtc.REMEDY)


def work(variant: Variant, problem: Problem, resources: Mapping[str, int]) -> Work | None:
    """From the tiling: the report counts the hottest of the inner loops alone."""
    return _work.of(variant, problem, resources)


def speaks(device: Device) -> str:
    """CUDA C and OpenCL C, on devices of that kind."""
    return device.kind if device.kind in HEADERS else ""


def no_header(problem: Problem) -> str | None:
    """A header's function takes neither integers nor masks but causal."""
    return mask_has_text(problem)


def portable(variant: Variant, problem: Problem) -> Portable | None:
    """The text and its launch, which the header computes as a call from Python does."""
    axes, dialect = variant.axes, str(variant.axes["dialect"])
    if dialect not in HEADERS:
        return None
    tiling = Tiling.of(axes, problem)
    launch = Blocks(
        tiling.threads, tiling.block_m, tiling.vector, tiling.shared_bytes,
        int(axes["splits"]), schedules.get(str(axes["schedule"])), STATE.floats(problem.value_dim), SCRATCH_BYTES, FINISH_THREADS,
    )  # fmt: skip
    return Portable(dialect, HEADERS[dialect], source(variant, problem), launch=launch)


def spills(variant: Variant, problem: Problem, device: Device) -> bool:
    """NVRTC compiles for devices that are not here; what OpenCL's compilers say is not known before."""
    if device.kind != "cuda":
        return False
    try:
        built = build(variant, problem, device)
    except CompilerMissing:
        return False
    except BuildFailed:
        return True
    return bool(built.flaw or built.resources.get("spills"))
