"""Homes that earlier commits tuned: this code serves from their databases, with kernels as those commits wrote and compiled them.

A folder of tests/recorded holds what a commit left behind on a processor with AVX2: measurements.db as it was, the text of every
winner under its digest, and kernels.json: the flags of its compiler and what its report said. A calling convention that recorded
kernels were built for must stay, or they would read wrong memory.

    parent_home   87c2853, the last commit before parts; a database of format 2
    bounded_home  6dddd8a: windows, lengths and soft caps, whose operands follow the tensors, and bfloat16; finals alone

    python tests/test_inherited_home.py FOLDER PROBLEM ...    tunes here as if on that processor, and keeps such a folder
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import archspec.cpu
import pytest
import torch
from contracts import kernels

import elsa_tune
from elsa_tune import device, places, space
from elsa_tune.dispatch import serving
from elsa_tune.generate import backends, cpp
from elsa_tune.generate import operands as given
from elsa_tune.generate.cpp import compiler
from elsa_tune.masks import AttnMask
from elsa_tune.parts import element
from elsa_tune.problem import Problem
from elsa_tune.prove import reference
from elsa_tune.remember.database import Database

RECORDED = Path(__file__).parent / "recorded"
DEVICE = device.Device("cpu", "amd_f25m17", "x86_64_v3", 2)
WINNERS = {
    "parent_home": {
        "fp32.d64.causal@b1.h4.q256.k256": ("cpp.serial.avx2.l8.q3.k4.v4.n96.e6", "42e83fda2f37e1d4db32"),
        "fp32.d64@b1.h8.kv2.q1.k1024": ("cpp.hybrid.avx2.l8.c8.q4.k1.v2.n32.w2.s2", "ab81cb07658b64ddb8d9"),
        "fp32.d64@b1.h4.q200.k200.bshd": ("cpp.serial.avx2.l8.q3.k4.v4.n120.head", "7cc46e9f61cf3cf8d365"),
    },
    "bounded_home": {
        "bf16.d64.causal@b1.h4.q256.k256": ("cpp.hybrid.avx2.l8.q2.k5.v6.n120.w2.s2.packed", "8843490d7801910c6a64"),
        "fp32.d64.causal+window@b1.h4.q512.k512.left63.right0": (
            "cpp.serial.avx2.l8.q3.k4.v4.n96.p8",
            "f05644c17bbca7cf12a0",
        ),
        "fp32.d32.lengths+window.softcap@b2.h4.kv2.q128.k192.left40.right9.softcap20": (
            "cpp.serial.avx2.l8.q2.k5.v5.n120.head",
            "0d88db2d92140945a66e",
        ),
    },
}
of_every_winner = pytest.mark.parametrize(
    ("name", "spelled"), [(name, spelled) for name, won in WINNERS.items() for spelled in won], scope="module"
)

pytestmark = pytest.mark.skipif("avx2" not in device.host_cpu().isas, reason="the recorded kernels are of AVX2")


def taken_for_that_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_cpu_model", lambda cpuinfo: DEVICE.model)
    monkeypatch.setattr(archspec.cpu, "host", lambda: archspec.cpu.TARGETS[DEVICE.arch])
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(DEVICE.cores)))
    device.host_cpu.cache_clear()
    assert device.host_cpu() == DEVICE


@pytest.fixture(scope="module")
def libraries(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernels' folder of a home: each text compiled by its recorded flags, under its recorded digest."""
    folder = tmp_path_factory.mktemp("kernels")
    found = compiler.find()
    for digest, kernel in json.loads((RECORDED / name / "kernels.json").read_text()).items():
        (folder / digest).mkdir(mode=0o700)
        text, library = RECORDED / name / f"{digest}.cpp", folder / digest / "kernel.so"
        found.run([*kernel["flags"], *found.link, str(text), "-o", str(library)], digest)
        library.chmod(0o755)
        (folder / digest / "resources.json").write_text(json.dumps(kernel["resources"]))
    return folder


@pytest.fixture
def inherited(name: str, home: Path, libraries: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A home, on a machine that takes itself for the one which tuned it, and where nothing can be rendered or built."""
    home.mkdir(mode=0o700)
    shutil.copy(RECORDED / name / "measurements.db", places.database())
    places.database().chmod(0o600)
    shutil.copytree(libraries, places.kernels())
    places.kernels().chmod(0o700)

    def refused(*arguments: object, **more: object) -> None:
        raise AssertionError("a home that is tuned needs no rendering, no compiler and no tuning")

    for work in ("source", "build"):
        monkeypatch.setattr(backends.get("cpp"), work, refused)
    taken_for_that_processor(monkeypatch)
    yield home
    monkeypatch.undo()
    device.host_cpu.cache_clear()


def errs(out: torch.Tensor, problem: Problem, inputs: reference.Inputs) -> float:
    """The largest error of an output, as a share of what is allowed of normal values."""
    rows = reference.every_row(problem)
    truth = reference.attention_rows(problem, inputs, rows)
    difference = (out[rows.batch, rows.head, rows.position].double() - truth).abs().max()
    return float(difference) / (160 * element.precision(problem.precision).unit)


@of_every_winner
def test_it_serves_as_it_is(name: str, spelled: str, inherited: Path) -> None:
    """Opened as the next run of elsa-tune would, which may rewrite the file, and then asked as callers ask."""
    Database.for_writing()
    serving.refresh()
    problem, (variant, _) = Problem.parse(spelled), WINNERS[name][spelled]
    chosen = elsa_tune.load(problem)
    assert (str(chosen.variant), chosen.rung) == (variant, "exact") and chosen.ratio and chosen.ratio > 1
    x = reference.random_inputs(problem, torch.Generator().manual_seed(0)).ordered(problem.orders)
    own = AttnMask(problem.mask, problem.score, given.named(problem, x.operands))
    served = chosen(*x.tensors, attn_mask=own if problem.declared else None)
    assert errs(served, problem, x) < 1
    if not problem.declared:
        options = {"is_causal": problem.mask == "causal", "enable_gqa": problem.group > 1}
        assert torch.equal(served, elsa_tune.attention(*x.tensors, **options))
        torchs = torch.nn.functional.scaled_dot_product_attention(*x.tensors, **options)
        assert not torch.equal(served, torchs), "torch answers, not the inherited kernel"


@of_every_winner
def test_every_slot_of_a_call_is_where_it_was(name: str, spelled: str, inherited: Path) -> None:
    """Batches, groups, lengths, strides, scale, log-sum-exp and operands that all differ."""
    problem, (variant, digest) = Problem.parse(spelled), WINNERS[name][spelled]
    built = backends.get("cpp").find(digest)
    assert built is not None
    kernel = backends.get("cpp").load(built, space.parse(variant), problem)
    for aligned in (True, False):
        _, _, error = kernels.compute(kernel, problem, aligned)
        assert error < 1
    posed = given.with_example(problem).reshaped(batch=3, heads=4, kv_heads=2, q_len=5, kv_len=11)
    x = reference.random_inputs(posed, torch.Generator().manual_seed(1))
    x = replace(x.ordered(["bshd", "cache", "bhsd"]), scale=0.3, operands=given.example(posed, 3))
    out = x.query.new_full((3, 4, 5, posed.value_dim), float("nan"))
    assert len({t.stride()[:3] for t in (*x.tensors, out)}) == 4
    assert errs(kernel(*x.tensors, x.scale, out, operands=x.operands), posed, x) < 1


def record(folder: Path, problems: list[str]) -> None:
    """Tune those problems in ELSA_TUNE_HOME, and keep in a folder what that leaves behind of winners and torch's kernels."""
    from elsa_tune.tuning.tune import tune

    taken_for_that_processor(pytest.MonkeyPatch())
    tune(problems, device="cpu", budget=60.0 * len(problems))
    folder.mkdir(parents=True)
    kept = {}
    with Database.for_writing() as home, Database.for_writing(folder / "measurements.db") as database:
        for won in home.winners():
            print(f'"{won.problem}": ("{won.variant}", "{won.measurement.digest}"),')
            built = cpp.find(won.measurement.digest)
            assert built is not None and built.path is not None, "torch won"
            shutil.copy(built.path.with_suffix(".cpp"), folder / f"{built.digest}.cpp")
            flags = cpp.ISAS[str(space.parse(won.variant).axes["isa"])].flags
            kept[built.digest] = {
                "flags": [*cpp.FLAGS, *cpp.WARNINGS, *flags, "-shared"], "resources": dict(built.resources)
            }  # fmt: skip
            for final in home.measurements(problem=won.problem, stage="final"):
                if final.is_rival or final.variant == won.variant:
                    database.record(final)
        database.pack()
    (folder / "kernels.json").write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    record(Path(sys.argv[1]), sys.argv[2:])
