"""Runs OpenCL kernels on Oclgrind's simulated device, which ends the process at the first races and stray accesses. Started by
test_cuda.py in a process of its own, since an OpenCL loader reads its settings once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from contracts import kernels

from elsa_tune import device, space
from elsa_tune.generate import cuda
from elsa_tune.generate.cuda import opencl as _opencl
from elsa_tune.problem import Problem

DRIVER = Path("/usr/lib/oclgrind/liboclgrind-rt-icd.so")


class Case(NamedTuple):
    """A variant, a family, and what to replace in the variant's text by what."""

    spelling: str
    family: str
    text: str = ""
    other: str = ""


class Report(NamedTuple):
    """The largest error of each case that ended, as a share of what is allowed, and Oclgrind's words."""

    errors: list[float]
    said: str


def report(cases: list[Case], folder: Path) -> Report:
    """What comes of them in a process where Oclgrind is the only OpenCL device; its settings and log are in ``folder``."""
    log = folder / "log"
    log.write_text("")
    (folder / "oclgrind.icd").write_text(str(DRIVER))
    environment = {
        **os.environ,
        "OCL_ICD_VENDORS": str(folder),
        "OCLGRIND_LOG": str(log),
        "OCLGRIND_DATA_RACES": "1",
        "OCLGRIND_STOP_ERRORS": "10",
        "OCLGRIND_LOCAL_MEM_SIZE": str(128 << 10),
    }
    command = [sys.executable, __file__, json.dumps(cases)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    said = log.read_text()
    assert said or done.returncode == 0, done.stderr[-2000:]
    return Report([float(line) for line in done.stdout.split()], said)


def main(cases: list[Case]) -> None:
    [simulator] = device.find_opencl_devices()
    for case in cases:
        variant, problem = space.parse(case.spelling), Problem.parse(case.family)
        source = cuda.source(variant, problem).text
        assert case.text in source
        changed = source.replace(case.text, case.other) if case.text else source
        kernel = cuda.CudaKernel(_opencl.OpenClRuntime(changed, simulator), variant, problem)
        _, _, error = kernels.compute(kernel, problem)
        print(error, flush=True)


if __name__ == "__main__":
    main([Case(*case) for case in json.loads(sys.argv[1])])
