"""A home that an earlier commit tuned: this code serves from its database, with kernels as that commit wrote and compiled them.

tests/recorded/parent_home holds what commit 87c2853, the last one before parts, left behind on a processor with AVX2:
measurements.db as it was, the text of every winner under its digest, and kernels.json: the flags of its compiler and what
its report said. A calling convention that recorded kernels were built for must stay, or they would read wrong memory.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import archspec.cpu
import pytest
import torch
from contracts import kernels

import elsa_tune
from elsa_tune import device, places, space
from elsa_tune.dispatch import attention as dispatch
from elsa_tune.generate import backends
from elsa_tune.generate.cpp import compiler
from elsa_tune.problem import Problem
from elsa_tune.prove import reference
from elsa_tune.remember.database import Database

RECORDED = Path(__file__).parent / "recorded" / "parent_home"
DEVICE = device.Device("cpu", "amd_f25m17", "x86_64_v3", 2)
WINNERS = {
    "fp32.d64.causal@b1.h4.q256.k256": ("cpp.serial.avx2.l8.q3.k4.v4.n96.e6", "42e83fda2f37e1d4db32"),
    "fp32.d64@b1.h8.kv2.q1.k1024": ("cpp.hybrid.avx2.l8.c8.q4.k1.v2.n32.w2.s2", "ab81cb07658b64ddb8d9"),
    "fp32.d64@b1.h4.q200.k200.bshd": ("cpp.serial.avx2.l8.q3.k4.v4.n120.head", "7cc46e9f61cf3cf8d365"),
}

pytestmark = pytest.mark.skipif("avx2" not in device.host_cpu().isas, reason="the recorded kernels are of AVX2")


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernels' folder of that home: each text compiled by its recorded flags, under its recorded digest."""
    folder = tmp_path_factory.mktemp("kernels")
    found = compiler.find()
    for digest, kernel in json.loads((RECORDED / "kernels.json").read_text()).items():
        (folder / digest).mkdir(mode=0o700)
        text, library = RECORDED / f"{digest}.cpp", folder / digest / "kernel.so"
        found.run([*kernel["flags"], *found.link, str(text), "-o", str(library)], digest)
        library.chmod(0o755)
        (folder / digest / "resources.json").write_text(json.dumps(kernel["resources"]))
    return folder


@pytest.fixture
def inherited(home: Path, libraries: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """That home, on a machine that takes itself for the one which tuned it, and where nothing can be rendered or built."""
    home.mkdir(mode=0o700)
    shutil.copy(RECORDED / "measurements.db", places.database())
    places.database().chmod(0o600)
    shutil.copytree(libraries, places.kernels())
    places.kernels().chmod(0o700)
    monkeypatch.setattr(device, "_cpu_model", lambda cpuinfo: DEVICE.model)
    monkeypatch.setattr(archspec.cpu, "host", lambda: archspec.cpu.TARGETS[DEVICE.arch])
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(DEVICE.cores)))

    def refused(*arguments: object, **more: object) -> None:
        raise AssertionError("a home that is tuned needs no rendering, no compiler and no tuning")

    for work in ("source", "build"):
        monkeypatch.setattr(backends.get("cpp"), work, refused)
    device.host_cpu.cache_clear()
    assert device.host_cpu() == DEVICE
    yield home
    monkeypatch.undo()
    device.host_cpu.cache_clear()


@pytest.mark.parametrize("spelled", WINNERS)
def test_it_serves_as_it_is(spelled: str, inherited: Path) -> None:
    """Opened as the next run of elsa-tune would, which may rewrite the file, and then asked as callers ask."""
    Database.for_writing()
    dispatch.refresh()
    problem, variant = Problem.parse(spelled), WINNERS[spelled][0]
    chosen = elsa_tune.load(problem)
    assert (str(chosen.variant), chosen.rung) == (variant, "exact") and chosen.ratio and chosen.ratio > 1
    x = reference.random_inputs(problem, torch.Generator().manual_seed(0)).ordered(problem.orders)
    options = {"is_causal": problem.mask == "causal", "enable_gqa": problem.group > 1}
    torchs = torch.nn.functional.scaled_dot_product_attention
    truth = torchs(*(t.double() for t in x.tensors), **options)
    served = elsa_tune.attention(*x.tensors, **options)
    assert torch.equal(served, chosen(*x.tensors)) and float((served - truth).abs().max()) < 1e-5
    assert not torch.equal(served, torchs(*x.tensors, **options)), "torch answers, not the inherited kernel"


@pytest.mark.parametrize("spelled", WINNERS)
def test_every_slot_of_a_call_is_where_it_was(spelled: str, inherited: Path) -> None:
    """Batches, groups, lengths, strides, scale and log-sum-exp that all differ."""
    problem, (variant, digest) = Problem.parse(spelled), WINNERS[spelled]
    built = backends.get("cpp").find(digest)
    assert built is not None
    kernel = backends.get("cpp").load(built, space.parse(variant), problem)
    for aligned in (True, False):
        _, _, error = kernels.compute(kernel, problem, aligned)
        assert error < 1
    posed = problem.reshaped(batch=3, heads=4, kv_heads=2, q_len=5, kv_len=11)
    x = reference.random_inputs(posed, torch.Generator().manual_seed(1))
    truth = torch.nn.functional.scaled_dot_product_attention(
        *(t.double() for t in x.tensors), scale=0.3, is_causal=problem.mask == "causal", enable_gqa=True
    )
    assert float((kernel(*x.tensors, 0.3) - truth).abs().max()) < 1e-5
