"""benchmarks/models.py and benchmarks/memory_orders.py on tiny models, so that they cannot rot."""

from __future__ import annotations

import itertools
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import elsa_tune

pytest.importorskip("transformers", reason="transformers is not installed; `pip install transformers`")
ROOT = Path(__file__).resolve().parent.parent
TINY: dict[str, Any] = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=2)
GROUPED: dict[str, Any] = dict(num_key_value_heads=2, vocab_size=1000)


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The module, one round, an empty home, results in a temporary folder."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setenv("ELSA_TUNE_HOME", str(tmp_path / "home"))
    import _side_by_side
    import models

    monkeypatch.setattr(_side_by_side, "RESULTS", tmp_path)
    monkeypatch.setattr(models, "ROUNDS", 1)
    return models


def test_every_kind_of_model_is_measured(
    benchmarks: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tuned, raced, explained and written; a mask of ones reaches no call, and one token of a cache stands for the next."""
    cases = (
        benchmarks.Case("encoder", "", lambda: benchmarks.bert(2, 24, **TINY)),
        benchmarks.Case("decoding", "", lambda: benchmarks.decoding(24, **TINY, **GROUPED)),
        benchmarks.Case("padded", "", lambda: benchmarks.padded_bert(2, 24, **TINY), "registered"),
        benchmarks.Case("training", "", lambda: benchmarks.training(benchmarks.bert(2, 24, **TINY)), is_training=True),
    )
    monkeypatch.setattr(benchmarks, "CASES", cases)
    monkeypatch.setattr(sys, "argv", ["models.py", "--tune-seconds", "1"])
    benchmarks.main()
    printed = capsys.readouterr().out
    (path,) = tmp_path.glob("models-*.json")
    results = json.loads(path.read_text())["results"]
    assert list(results) == ["encoder", "decoding", "padded", "training"]
    for name, found in results.items():
        assert f"\n{name} | " in printed
        assert not found["not_ours"] and found["difference"] < 1e-5 and found["attention_share"] > 0
        assert all(len(samples) == 1 for samples in found["seconds"].values())
    assert len(re.findall("tuning [12] problems first", printed)) == 4  # a forward pass too, where torch won
    assert ".lengths@" in results["padded"]["served"][0]["problem"]
    assert [line["rung"] for line in results["encoder"]["served"]] == ["exact"]
    forward, backward = results["training"]["served"]
    assert (
        forward["problem"] == results["encoder"]["served"][0]["problem"] and forward["calls"] == backward["calls"] == 2
    )
    assert ".backward@" in backward["problem"] and backward["rung"] == "exact"
    assert len(results["decoding"]["served"]) == benchmarks.TOKENS


def test_attention_is_timed_both_ways(benchmarks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a clock that ticks when it is read: forward and backward a tick each, in each of two layers."""
    step, watch, ticks = benchmarks.training(benchmarks.bert(2, 24, **TINY)), benchmarks.Stopwatch(), itertools.count()
    monkeypatch.setattr(benchmarks.time, "perf_counter", lambda: next(ticks))
    for _ in range(2):
        with benchmarks.WAYS["override"].watched(watch):
            gradient = step(0)
    assert watch.seconds == 2 * 2 * 2 and gradient.abs().max() > 0


@torch.inference_mode()
def test_prompts_and_images_pose_problems_of_ours(benchmarks: Any) -> None:
    """And what a model computes does not depend on who serves."""
    for forward in (benchmarks.vit(1, 32, **TINY), benchmarks.prefill(24, **TINY, **GROUPED)):
        recorder = benchmarks.Recorder()
        with benchmarks.attention_by(recorder):
            expected = forward(0)
        assert sum(recorder.problems.values()) == 2 and not recorder.others
        with benchmarks.attention_by(elsa_tune.attention):
            torch.testing.assert_close(forward(0), expected)


@torch.inference_mode()
def test_rounds_of_decoding_grow_the_cache_and_may_be_repeated(benchmarks: Any) -> None:
    forward, seen = benchmarks.decoding(24, **TINY, **GROUPED), []
    for number in (0, 0, 1, 0):
        recorder = benchmarks.Recorder()
        with benchmarks.attention_by(recorder):
            forward(number)
        seen.append(min(problem.kv_len for problem in recorder.problems))
    assert seen == [25, 25, 25 + benchmarks.TOKENS, 25]


def test_masked_calls_pose_problems_and_others_are_counted_apart(benchmarks: Any) -> None:
    recorder, x, mask = benchmarks.Recorder(), torch.randn(1, 2, 3, 4), torch.ones(3, 3, dtype=torch.bool)
    with benchmarks.attention_by(recorder):
        torch.nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=mask)
        torch.nn.functional.scaled_dot_product_attention(x[0], x[0], x[0], attn_mask=mask)
    assert {posed.mask: calls for posed, calls in recorder.problems.items()} == {"dense": 1}
    assert dict(recorder.others) == {"a mask torch.bool [3, 3]": 1}


@pytest.mark.parametrize(
    ("gain", "share", "kernels", "possible", "reached"),
    [(1.25, 0.5, 2.0, 4 / 3, 0.75), (1.0, 0.5, 1.0, 1.0, None), (0.9, 0.5, 0.8, 8 / 9, None)],
)
def test_amdahl(
    benchmarks: Any, gain: float, share: float, kernels: float, possible: float, reached: float | None
) -> None:
    found = benchmarks.amdahl(gain, share, kernels)
    assert found == (pytest.approx(possible), reached if reached is None else pytest.approx(reached))


def test_memory_orders_are_named(benchmarks: Any) -> None:
    """Every order of the docs' table, and models that pose them."""
    import memory_orders

    batch, heads, length, dim = 2, 4, 6, 8
    projection = torch.empty(batch, length, 3, heads, dim).permute(2, 0, 3, 1, 4)
    cache = torch.empty(batch, heads, 16, dim)
    named = {
        "bhsd": torch.empty(batch, heads, length, dim),
        "bshd": torch.empty(batch, length, heads, dim).transpose(1, 2),
        "fused, 96 a row": projection[1],
        "cache of 16": cache[:, :, :length],
        "strides (192, 1, 32, 4)": torch.empty(batch, length, dim, heads).permute(0, 3, 1, 2),
    }
    assert {name: memory_orders.memory_order(x) for name, x in named.items()} == {name: name for name in named}
    assert memory_orders.memory_order(projection[0][:, :, :1].clone()) == "bhsd"
    page = (ROOT / "docs" / "memory-orders.md").read_text()
    wanted = ("Bert, mask of ones", "Llama, prefill and decoding, StaticCache", "GPT2, prefill without a cache")
    chosen = ((name, run) for name, run in memory_orders.transformers_models() if name in wanted)
    lines = list(memory_orders.rows(chosen))
    assert [line.split(" | ")[2] for line in lines] == [
        "bshd", "bshd - cache of 16 - cache of 16", "bhsd", "fused, 96 a row",
    ]  # fmt: skip
    assert all(line.split(" | ")[2] in page for line in lines)
