"""What starts a kernel of a dialect, loaded once in a process."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path

from elsa_tune.device import Device
from elsa_tune.errors import CompilerMissing
from elsa_tune.generate.cuda import opencl as _opencl
from elsa_tune.generate.cuda.drivers import CudaDriver, Driver, GpuRuntime, HipDriver
from elsa_tune.generate.cuda.launch import Runtime

DEVICE_FILE = "device"
"""Beside an OpenCL kernel: the device it was built for."""


def needed(dialect: str) -> None:
    """Raise CompilerMissing where the package that starts such kernels is not installed."""
    if dialect == "cuda" and (
        importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.bindings") is None
    ):
        raise CompilerMissing(
            "cuda-bindings is not installed, so no CUDA C kernel can start; pip install 'elsa-tune[cuda]'"
        )


@cache
def _driver(dialect: str) -> Driver:
    """What loads and starts a GPU's kernels of a dialect, made once. Raises CompilerMissing."""
    needed(dialect)
    if dialect == "hip":
        return HipDriver()
    return CudaDriver()


@cache
def load(dialect: str, path: Path) -> Runtime:
    """What starts the kernels built at ``path``, loaded once in a process."""
    if dialect == "opencl":
        return _opencl.OpenClRuntime(path.read_text(), Device.parse((path.parent / DEVICE_FILE).read_text()))
    return GpuRuntime(_driver(dialect), path.read_bytes())
