"""Side by side on this CPU, in one interleaved run: elsa-tune, torch's kernels, ONNX Runtime, OpenVINO.

Run it with `make bench`. Problems that are not tuned yet are tuned first. Ratios are medians of round-by-round ratios
with bootstrap intervals; the multiply-add peak and the read bandwidth are measured in the same rounds. Writes
benchmarks/results/<device>.json and prints losses like wins.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import elsa_tune
from _side_by_side import tune_first, write
from elsa_tune import workload
from elsa_tune.device import host_cpu
from elsa_tune.dispatch import serving
from elsa_tune.generate import cpp
from elsa_tune.generate.cpp import call as _call
from elsa_tune.generate.cpp import pool as _pool
from elsa_tune.order import CONTIGUOUS
from elsa_tune.problem import Problem
from elsa_tune.prove import reference
from elsa_tune.tuning import race

ROUNDS = 15
SECONDS_A_PROBLEM = 8.0
PAUSE = 0.003
"""Seconds between samples: other runtimes' threads spin for a while after they finish."""


@dataclass(frozen=True)
class Goal:
    """A set of problems and what is asked of them: against whom, at least which geometric mean and which worst ratio."""

    name: str
    against: tuple[str, ...]
    at_least: float
    worst: float
    problems: tuple[str, ...]


# In the memory orders of models (docs/memory-orders.md); what is contiguous there is contiguous here.
PREFILL = tuple(f"fp32.d{d}@b1.h8.q{n}.k{n}.bshd" for d in (64, 80, 128) for n in (1024, 2048, 4096))
SHORT = (
    "fp32.d64@b8.h12.q128.k128.bshd", "fp32.d64@b1.h12.q197.k197.fused", "fp32.d64@b8.h12.q197.k197.bshd",
    "fp32.d80@b1.h16.q257.k257.fused", "fp32.d64@b8.h12.q512.k512.bshd", "fp32.d64@b1.h16.q577.k577.fused",
)  # fmt: skip
CAUSAL = (
    "fp32.d64.causal@b1.h12.q1024.k1024.fused",
    "fp32.d64.causal@b1.h8.q4096.k4096.bshd",
    "fp32.d128.causal@b1.h32.kv8.q2048.k2048.bshd-bhsd-bhsd",
)
DECODE = ("fp32.d128@b1.h32.kv8.q1.k4096", "fp32.d128@b1.h32.kv8.q1.k32768")
LONGEST = ("fp32.d64@b1.h1.q16384.k16384", "fp32.d64.causal@b1.h1.q16384.k16384")
DEFAULT = tuple(str(p) for p in workload.read("default", host_cpu()) if p.dtype == "fp32" and not p.declared)
"""What other programs take too; masks and halves have a benchmark of their own."""
ORDERED = tuple(p for p in DEFAULT if Problem.parse(p).order != CONTIGUOUS)

GAIN = next((gain for model, gain in (("amd_f26", 2.2), ("amd_f25", 1.4)) if host_cpu().model.startswith(model)), 1.3)
"""What is asked against torch, by how much of the peak torch's own kernel leaves on this processor."""

TORCH = ("torch flash", "torch math")
GOALS = (
    Goal("N = 128..577, against the best torch backend", TORCH, GAIN, 1.0, SHORT),
    Goal("N >= 1024, against the best torch backend", TORCH, GAIN, 1.0, PREFILL),
    Goal("causal, N >= 1024, against the best torch backend", TORCH, GAIN, 1.0, CAUSAL),
    Goal("decoding, against the best torch backend", TORCH, 3.0, 1.0, DECODE),
    Goal("decoding, against torch with the group folded into q_len", ("torch folded",), 1.4, 1.0, DECODE),
    Goal("N >= 128, against ONNX Runtime's MultiHeadAttention", ("onnxruntime",), 1.15, 1.0, SHORT + PREFILL),
    Goal("N >= 128, against OpenVINO's SDPA", ("openvino",), 1.05, 0, SHORT + PREFILL),
    Goal("16K tokens, against the best torch backend", TORCH, 1.0, 1.0, LONGEST),
    Goal("never slower than torch, the default workload", TORCH, 1.0, 1.0, DEFAULT),
    Goal("in its order, against our own kernel on contiguous memory", ("elsa-tune contiguous",), 0.95, 0.95, ORDERED),
)


def torch_peers(problem: Problem, x: reference.Inputs) -> dict[str, Callable[[], object]]:
    """torch's fused kernel, its math backend, and grouped heads folded into the query length by hand."""
    causal, grouped = problem.mask == "causal", problem.group > 1

    def with_backend(backend: SDPBackend) -> Callable[[], object]:
        def call() -> object:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(x.query, x.key, x.value, is_causal=causal, enable_gqa=grouped)

        return call

    peers: dict[str, Callable[[], object]] = {"torch flash": with_backend(SDPBackend.FLASH_ATTENTION)}
    if problem.batch * problem.heads * problem.q_len * problem.kv_len < 1 << 28:
        peers["torch math"] = with_backend(SDPBackend.MATH)
    if grouped and problem.q_len == 1:
        folded = x.query.view(problem.batch, problem.kv_heads, problem.group, problem.head_dim)
        peers["torch folded"] = lambda: scaled_dot_product_attention(folded, x.key, x.value).view_as(x.query)
    return peers


def onnxruntime_peer(problem: Problem, x: reference.Inputs) -> Callable[[], object]:
    """com.microsoft.MultiHeadAttention on [batch, length, heads * dim], bound inputs and output, FP32."""
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper

    heads, width = problem.heads, problem.heads * problem.head_dim
    names = ("query", "key", "value")
    shapes = [(problem.batch, n, width) for n in (problem.q_len, problem.kv_len, problem.kv_len)]
    node = helper.make_node("MultiHeadAttention", names, ["output"], domain="com.microsoft", num_heads=heads)
    graph = helper.make_graph(
        [node],
        "attention",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in zip(names, shapes, strict=True)],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, shapes[0])],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    onnx.checker.check_model(model, full_check=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    flat = [t.transpose(1, 2).reshape(problem.batch, t.shape[2], width).contiguous() for t in (x.query, x.key, x.value)]
    out = torch.empty(shapes[0])
    for name, t in zip(names, flat, strict=True):
        binding.bind_input(name, "cpu", 0, "float32", t.shape, t.data_ptr())
    binding.bind_output("output", "cpu", 0, "float32", out.shape, out.data_ptr())

    def call(bound_inputs: object = flat) -> object:  # the binding itself keeps no tensor alive
        session.run_with_iobinding(binding)
        return out.view(problem.batch, problem.q_len, heads, problem.head_dim).transpose(1, 2)

    return call


def openvino_peer(problem: Problem, x: reference.Inputs) -> Callable[[], object]:
    """opset13 ScaledDotProductAttention on [batch, heads, length, dim], FP32, shared inputs."""
    import openvino
    from openvino import opset13

    parameters = [opset13.parameter(list(t.shape), openvino.Type.f32) for t in (x.query, x.key, x.value)]
    node = opset13.scaled_dot_product_attention(*parameters, causal=problem.mask == "causal")
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = openvino.Core().compile_model(openvino.Model([node.output(0)], parameters), "CPU", settings)
    request = compiled.create_infer_request()
    for index, t in enumerate((x.query, x.key, x.value)):
        request.set_input_tensor(index, openvino.Tensor(t.numpy(), shared_memory=True))

    def call() -> object:
        request.infer()
        return torch.from_numpy(request.get_output_tensor(0).data)

    return call


def ours(problem: Problem, x: reference.Inputs) -> Callable[[], object]:
    """elsa-tune on these tensors."""
    causal, grouped = problem.mask == "causal", problem.group > 1
    return lambda: elsa_tune.attention(x.query, x.key, x.value, is_causal=causal, enable_gqa=grouped)


@dataclass(frozen=True)
class Contender:
    """Who computes a problem, and what a model would have written just before: it is written again before every call."""

    call: Callable[[], Any]
    operands: tuple[torch.Tensor, ...] = ()


def from_memory(
    problem: Problem, make: Callable[[reference.Inputs], Callable[[], Any]], x: reference.Inputs
) -> Contender:
    """The same from operands that nobody has touched for longer than the last cache remembers."""
    copies = math.ceil(1.25 * host_cpu().last_cache / problem.bytes)
    calls = itertools.cycle([make(x.ordered(problem.orders)) for _ in range(max(1, copies))])
    return Contender(lambda: next(calls)())


def contenders(problem: Problem, plain: reference.Inputs) -> tuple[dict[str, Contender], dict[str, str]]:
    """Everyone who can compute the problem here, and why the others cannot.

    ONNX Runtime and OpenVINO read in their own order what they read in the call before, which favours them: their threads
    and torch's, which would have to write it, disturb each other.
    """
    x = plain.ordered(problem.orders)
    found = {"elsa-tune": Contender(ours(problem, x), x.tensors)}
    found |= {name: Contender(call, x.tensors) for name, call in torch_peers(problem, x).items()}
    found["elsa-tune from memory"] = from_memory(problem, partial(ours, problem), x)
    found["torch from memory"] = from_memory(problem, lambda y: torch_peers(problem, y)["torch flash"], x)
    absent: dict[str, str] = {}
    if problem.order != CONTIGUOUS:
        found["elsa-tune contiguous"] = Contender(ours(problem, plain), plain.tensors)
        found["torch contiguous"] = Contender(torch_peers(problem, plain)["torch flash"], plain.tensors)
    if problem.mask == "causal" or problem.group > 1:
        return found, absent
    for name, make in (("onnxruntime", onnxruntime_peer), ("openvino", openvino_peer)):
        try:
            found[name] = Contender(make(problem, plain))
        except Exception as error:
            absent[name] = f"{type(error).__name__}: {str(error)[:200]}"
    return found, absent


def timed(contender: Contender, repeats: int) -> float:
    """Seconds per call."""
    seconds = 0.0
    for _ in range(repeats):
        for x in contender.operands:
            x.mul_(1.0)
        start = time.perf_counter()
        contender.call()
        seconds += time.perf_counter() - start
    return seconds / repeats


def interleaved(problem: Problem) -> dict[str, Any]:
    """Rounds in which everyone is timed once, in turns, and the device's limits with them."""
    x = reference.random_inputs(problem, torch.Generator().manual_seed(0))
    racing, absent = contenders(problem, x)
    rows = reference.sample_rows(problem, torch.Generator().manual_seed(1))
    truth = reference.attention_rows(problem, x, rows)
    errors = {n: reference.measure_error(problem, x, rows, c.call(), truth).relative for n, c in racing.items()}
    repeats = {name: max(1, min(500, round(0.004 / timed(c, 1)))) for name, c in racing.items()}
    samples: dict[str, list[float]] = {name: [] for name in racing}
    peaks: list[dict[str, float]] = []
    end = time.perf_counter() + SECONDS_A_PROBLEM
    for number in range(ROUNDS):
        if number >= 5 and time.perf_counter() > end:
            break
        peaks.append(cpp.peak(0.01))
        for name in random.Random(number).sample(list(racing), len(racing)):
            time.sleep(PAUSE)
            timed(racing[name], 1)
            samples[name].append(timed(racing[name], repeats[name]))
    limits = {name: statistics.median(p[name] for p in peaks) for name in ("gflops", "gbytes")}
    return {"samples": samples, "errors": errors, "limits": limits, "absent": absent}


def contiguous(problem: str) -> str:
    """The same on contiguous memory."""
    return str(Problem.parse(problem).reshaped(order=CONTIGUOUS))


def line(problem: Problem, run: dict[str, Any]) -> dict[str, Any]:
    """One problem's results: rates, shares of the limits, ratios of everyone to elsa-tune."""
    ours = run["samples"]["elsa-tune"]
    seconds = statistics.median(ours)
    loaded = elsa_tune.load(problem)
    peers = {}
    for name, samples in run["samples"].items():
        found = race.ratio(samples, ours)
        middle = statistics.median(samples)
        peers[name] = {
            "ratio": found.median, "low": found.low, "high": found.high, "gflops": problem.flops / middle / 1e9,
            "gbytes": problem.bytes / middle / 1e9, "error": run["errors"][name], "seconds": samples,
        }  # fmt: skip
    return {
        "problem": str(problem), "variant": str(loaded.variant), "rung": loaded.rung,
        "share_of_peak": problem.flops / seconds / 1e9 / run["limits"]["gflops"],
        "share_of_bandwidth": problem.bytes / seconds / 1e9 / run["limits"]["gbytes"],
        "limits": run["limits"], "peers": peers, "absent": run["absent"],
    }  # fmt: skip


def best_peer(result: dict[str, Any], against: tuple[str, ...]) -> dict[str, float] | None:
    """The fastest of the named peers, if any took part."""
    found = [result["peers"][name] for name in against if name in result["peers"]]
    return min(found, key=lambda p: p["ratio"]) if found else None


def judge(results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Each goal: geometric mean and worst ratio reached, and what the device's peak would allow at most."""
    verdicts = []
    for goal in GOALS:
        pairs = [(p, best_peer(results[p], goal.against)) for p in goal.problems if p in results]
        ratios = {p: peer["ratio"] for p, peer in pairs if peer}
        if not ratios:
            verdicts.append({"goal": goal.name, "measured": None, "why": "no such peer is installed"})
            continue
        # A ratio cannot exceed what reaching the measured limit would give.
        ceilings = []
        for name in ratios:
            problem, peer, limits = Problem.parse(name), best_peer(results[name], goal.against), results[name]["limits"]
            least = max(problem.flops / limits["gflops"], problem.bytes / limits["gbytes"]) / 1e9
            ceilings.append(statistics.median(peer["seconds"]) / least if peer else 0)
        mean = math.exp(statistics.mean(map(math.log, ratios.values())))
        verdicts.append({
            "goal": goal.name, "asked": goal.at_least, "asked_worst": goal.worst or goal.at_least, "geometric_mean": mean,
            "worst": min(ratios.values()), "worst_at": min(ratios, key=lambda n: ratios[n]),
            "ceiling_geometric_mean": math.exp(statistics.mean(map(math.log, ceilings))),
            "reached": mean >= goal.at_least and min(ratios.values()) >= goal.worst,
        })  # fmt: skip
    shares = {p: r["share_of_peak"] for p, r in results.items() if Problem.parse(p).q_len >= 2048}
    if shares:
        verdicts.append({
            "goal": "share of the multiply-add peak, N >= 2048", "asked": 0.8, "asked_worst": 0.8,
            "geometric_mean": math.exp(statistics.mean(map(math.log, shares.values()))), "worst": min(shares.values()),
            "worst_at": min(shares, key=lambda n: shares[n]), "reached": min(shares.values()) >= 0.8,
        })  # fmt: skip
    return [*verdicts, *exactness(results)]


def exactness(results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Never wrong: our error against float64 as a multiple of that of torch's fastest kernel."""
    verdicts = []
    for name, problems in (
        ("error, as a multiple of torch's", set(results) - set(LONGEST)),
        ("the same at 16K", LONGEST),
    ):
        times = {}
        for p in problems:
            if p in results and (torchs := best_peer(results[p], TORCH)):
                times[p] = results[p]["peers"]["elsa-tune"]["error"] / torchs["error"]
        if times:
            mean, worst = math.exp(statistics.mean(map(math.log, times.values()))), max(times.values())
            verdicts.append({
                "goal": name, "asked": 1.0, "asked_worst": 1.0, "at_most": True, "geometric_mean": mean, "worst": worst,
                "worst_at": max(times, key=lambda n: times[n]), "reached": worst <= 1.0,
            })  # fmt: skip
    return verdicts


def call_overhead() -> dict[str, float]:
    """Microseconds of a call on the smallest problem: ours, its bare kernel, torch's SDPA; least of many."""
    problem = Problem.parse("fp32.d64@b1.h1.q1.k1")
    served = elsa_tune.load("fp32.d64@b8.h12.q128.k128")
    built = cpp.build(served.variant, problem)
    kernel = cpp.load(built, served.variant, problem)
    q = torch.randn(1, 1, 1, 64)
    bound = kernel.bind(q, q, q)
    serving.table[serving.entry_of(q, q, q, False, False)] = bound
    out = bound(q, q, q)
    layout = _call._LAYOUT(1, 1, 1, 1, 1, *[64] * 12, 0.125, torch.get_num_threads(), _pool.openmp()[1])
    packed = _call._POINTERS(*(t.data_ptr() for t in (q, q, q, out)), 0) + layout
    function = kernel._function  # type: ignore[attr-defined]

    def least(call: Callable[[], object], number: int = 5000) -> float:
        best = math.inf
        for _ in range(15):
            start = time.perf_counter()
            for _ in range(number):
                call()
            best = min(best, (time.perf_counter() - start) / number)
        return best * 1e6

    found = {
        "attention": least(lambda: elsa_tune.attention(q, q, q)),
        "bare_kernel": least(lambda: function(packed)),
        "torch_sdpa": least(lambda: scaled_dot_product_attention(q, q, q)),
    }
    serving.refresh()
    return {**found, "overhead": found["attention"] - found["bare_kernel"]}


def import_milliseconds() -> float:
    """`import elsa_tune` and its attention above `import torch`, median of fresh processes."""
    program = "import time, torch; t = time.perf_counter(); import elsa_tune; {} print(1e3 * (time.perf_counter() - t))"
    runs = [
        float(
            subprocess.run(
                [sys.executable, "-c", program.format("elsa_tune.attention;")],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        )
        for _ in range(5)
    ]
    return statistics.median(runs)


def tuning_seconds() -> dict[str, float]:
    """Wall time of `elsa-tune` with an empty home, and of a second run there."""
    found = {}
    with tempfile.TemporaryDirectory() as home:
        for name in ("first_run", "second_run"):
            start = time.perf_counter()
            command = [sys.executable, "-m", "elsa_tune.shell.cli"]
            subprocess.run(command, capture_output=True, check=True, env={**os.environ, "ELSA_TUNE_HOME": home})
            found[name] = time.perf_counter() - start
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problem", action="append", help="only these problems; repeatable; nothing is written")
    parser.add_argument("--tune-seconds", type=float, default=10.0, help="for each problem that is not tuned yet")
    options = parser.parse_args()
    every = list(dict.fromkeys(p for goal in GOALS for p in goal.problems))
    chosen = list(options.problem or every)
    tune_first([*chosen, *map(contiguous, chosen)], options.tune_seconds)
    results = {}
    for name in chosen:
        problem = Problem.parse(name)
        results[name] = found = line(problem, interleaved(problem))
        rates = "  ".join(
            f"{peer} {p['gflops']:.0f} ({p['ratio']:.2f})" for peer, p in found["peers"].items() if peer != "elsa-tune"
        )
        print(
            f"{name}: {found['peers']['elsa-tune']['gflops']:.0f} GFLOP/s, {found['share_of_peak']:.2f} of peak, "
            f"{found['share_of_bandwidth']:.2f} of bandwidth; {rates}", flush=True,
        )  # fmt: skip
        for peer, why in found["absent"].items():
            print(f"  {peer} absent: {why}")
    verdicts = judge(results)
    print("\ngoal | asked | reached (geometric mean) | worst | most the device allows")
    for v in verdicts:
        if v.get("measured", 1) is None:
            print(f"{v['goal']} | not measured: {v['why']}")
            continue
        ceiling = f"{v['ceiling_geometric_mean']:.2f}" if "ceiling_geometric_mean" in v else "1.00"
        print(
            f"{v['goal']} | {v['asked']} | {v['geometric_mean']:.2f} {'' if v['reached'] else 'SHORT'} | {v['worst']:.2f} {v['worst_at']} | {ceiling}"
        )
    if options.problem:
        return
    small = {
        "call_microseconds": call_overhead(),
        "import_milliseconds": import_milliseconds(),
        "tuning_seconds": tuning_seconds(),
    }
    print(json.dumps(small, indent=2))
    longest = max(small["tuning_seconds"].values())
    verdicts.append(
        {
            "goal": "elsa-tune within its 180 s, seconds at most",
            "asked": 198,
            "at_most": True,
            "worst": longest,
            "reached": longest <= 198,
        }
    )
    print(f"elsa-tune within its 180 s: {longest:.0f} s {'' if longest <= 198 else 'SHORT'}")
    packages = ("elsa-tune", "torch", "onnxruntime", "openvino", "numpy")
    write("", packages, toolchain=cpp.toolchain(), goals=verdicts, **small, results=results)


if __name__ == "__main__":
    main()
