"""What this machine has and lacks, each lack with its remedy."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import entry_points

import torch
from torch import Tensor

from elsa_tune import device, places
from elsa_tune.device import Device, host_cpu
from elsa_tune.dispatch import handovers
from elsa_tune.errors import HookMissing, KernelCacheUnsafe
from elsa_tune.generate import backends, incumbent, lawful
from elsa_tune.generate.backends import Finding, Kernel
from elsa_tune.integrations import override
from elsa_tune.problem import Problem
from elsa_tune.prove import reference
from elsa_tune.remember import layers
from elsa_tune.shell import versions
from elsa_tune.space import Space
from elsa_tune.tuning import contender as contenders
from elsa_tune.tuning import worker as workers


def examine() -> Iterator[Finding]:
    """Devices, instruction sets, what each backend needs (compilers, the OpenMP runtime), a launch of each language on each GPU,
    database layers, the kernel cache, calls that torch answered in a kernel's place, ways to reach programs, versions."""
    here = host_cpu()
    yield _device(here)
    yield _isa(here)
    yield from _gpus()
    yield from _opencl()
    for name in backends.names():
        yield from backends.get(name).examine()
    yield from _launches()
    yield from examine_databases(here)
    yield _handovers()
    yield from _ways()
    yield Finding("versions", True, ", ".join(f"{name} {version}" for name, version in versions.installed()))


def examine_databases(here: Device) -> Iterator[Finding]:
    """Database layers and the kernel cache."""
    yield from _layers(here)
    yield _kernels()


def _device(here: Device) -> Finding:
    caches = ", ".join(f"L{level} {size >> 10} KiB" for level, size in enumerate(here.caches, 1))
    detail = f"{here} ({here.name}), {here.cores} cores, {here.memory >> 30} GiB, {caches or 'caches unknown'}"
    return Finding("device", True, detail)


def _isa(here: Device) -> Finding:
    if here.isas == ("portable",):
        return Finding(
            "instruction set", False, f"archspec does not know vectors of {here.arch}", "kernels use portable code"
        )
    return Finding("instruction set", True, ", ".join(here.isas))


def _gpus() -> Iterator[Finding]:
    """Every GPU that torch can use, or why there is none: a CPU-only torch, no GPU, a broken driver."""
    try:
        found = list(device.find_gpus())
    except Exception as error:
        yield Finding(
            "GPU", False, f"{type(error).__name__}: {error}", "mend the driver; CPUs and torch serve until then"
        )
        return
    for gpu in found:
        detail = f"{gpu} ({gpu.name}), {gpu.cores} multiprocessors, {gpu.memory >> 30} GiB"
        yield Finding("GPU", True, detail)
    if not found:
        yield Finding("GPU", True, "torch can use none here")


def _opencl() -> Iterator[Finding]:
    """Every OpenCL device, or why there is none."""
    try:
        found = list(device.find_opencl_devices())
    except ImportError:
        yield Finding(
            "OpenCL", True, "pyopencl is not installed", "pip install 'elsa-tune[opencl]' to tune OpenCL devices"
        )
        return
    except Exception as error:
        yield Finding("OpenCL", True, f"none: {error}", "install a driver, or pocl-opencl-icd for the CPU")
        return
    for one in found:
        yield Finding("OpenCL", True, f"{one} ({one.name})")
    if not found:
        yield Finding("OpenCL", True, "no device")


TINY = Problem.parse("fp32.d32@b1.h2.q48.k48")
"""What a launch is tried with."""


def launch(backend: str, here: Device) -> float:
    """Build the first starting variant that TINY may have, call it on a thread that has done nothing yet, as a user's may, and
    return its error of max|v|. Raises whatever building or launching raises."""
    variant = lawful.starts(Space.read(backend), TINY, here)[0]
    kernel = backends.get(backend).load(contenders.build(variant, TINY, here), variant, TINY)
    assert isinstance(kernel, Kernel)
    inputs = reference.random_inputs(TINY, torch.Generator().manual_seed(0))

    def call() -> Tensor:
        there = inputs.to(here.torch)
        return kernel(there.query, there.key, there.value, there.scale).cpu()

    with ThreadPoolExecutor(1) as thread:
        found = thread.submit(call).result()
    query, key, value = (x.double() for x in (inputs.query, inputs.key, inputs.value))
    expected = incumbent.attention(query, key, value, scale=inputs.scale)
    return float((found - expected).abs().max() / inputs.value.abs().max())


def _launches() -> Iterator[Finding]:
    """For each GPU and each language that serves it: whether a kernel of ours can be started, in a process of its own."""
    for gpu in device.gpus():
        for name in backends.candidates():
            if backends.get(name).refusal(TINY, gpu):
                continue
            topic = f"launch, {name}"
            try:
                with workers.Worker(memory=0) as worker:
                    error = worker.run(launch, name, gpu, timeout=120.0)
            except workers.WorkerFailed as failure:
                yield Finding(topic, False, f"{gpu}: {failure.reason}", "torch's SDPA serves what these kernels would")
                continue
            good = error < 1e-5
            yield Finding(topic, good, f"{gpu}: error {error:.1e} of max|v|", "" if good else "report it, please")


def _handovers() -> Finding:
    """Calls in which a kernel of ours raised and torch answered, as processes of this user wrote them down."""
    found = handovers.written()
    if not found:
        return Finding("hand-overs", True, "no kernel had to hand a call over to torch")
    newest = found[-1]
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(float(newest["at"])))
    kinds = Counter(f"{entry['asked']}: {entry['reason']}" for entry in found)
    often = ", ".join(f"{text} ({n})" for text, n in kinds.most_common(3))
    return Finding(
        "hand-overs",
        False,
        f"kernels raised and torch answered, in {len(found)} cases; most often {often}; last {when}",
        f"answers were right, but not by the kernel that won; report it, then remove {handovers.file()}",
    )


def _ways() -> Iterator[Finding]:
    """How programs that are not changed reach kernels of ours: torch's operator overridden, by what, and whether a variable does it."""
    was_on = override.is_on()
    try:
        override.enable()
        good, told = override.state()
        remedy = (
            "" if good else "import the other package first, or call elsa_tune.enable() after it: the last one wins"
        )
        yield Finding("elsa_tune.enable()", good, told, remedy)
    except HookMissing as error:
        yield Finding("elsa_tune.enable()", False, str(error), "with elsa_tune.sdpa(): serves in this torch")
    finally:
        if not was_on:
            override.disable()
    loaded = any(one.name == "elsa_tune" for one in entry_points(group="torch.backends"))
    if not loaded:
        yield Finding(
            "ELSA_TUNE=1",
            False,
            "torch does not find this package's entry point",
            "install it by pip, or call elsa_tune.enable()",
        )
    elif os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1") != "1":
        yield Finding("ELSA_TUNE=1", False, "TORCH_DEVICE_BACKEND_AUTOLOAD turns it off", "call elsa_tune.enable()")
    else:
        yield Finding(
            "ELSA_TUNE=1", True, f"enables it in any program; here it is {os.environ.get('ELSA_TUNE') or 'not set'}"
        )


def _layers(here: Device) -> Iterator[Finding]:
    for layer in layers.layers():
        known = layers.known_winners(here, [layer])
        exact = sum(w.rung == "exact" for w in known)
        topic, detail = (
            f"database, {layer.name}",
            f"{layer.place}: {exact} winners for this device, {len(known) - exact} for its kin",
        )
        if layer.trouble:
            remedy = "a corrupt file is set aside by the next elsa-tune; the next layer serves until then"
            yield Finding(topic, False, layer.trouble, remedy)
        elif layer.database is None:
            yield Finding(topic, False, f"{layer.place}: nothing is tuned yet; run elsa-tune")
        else:
            yield Finding(topic, True, detail)


def _kernels() -> Finding:
    folder = places.kernels()
    if not folder.is_dir():
        return Finding("kernel cache", True, f"{folder}: empty")
    try:
        built = [path.name for path in folder.iterdir() if not path.name.startswith(".")]
        for digest in built:
            for name in backends.names():
                backends.get(name).find(digest)
    except KernelCacheUnsafe as error:
        return Finding("kernel cache", False, str(error), f"remove {folder}; kernels are built again when needed")
    return Finding("kernel cache", True, f"{folder}: {len(built)} kernels")
