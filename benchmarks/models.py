"""Whole models on this CPU, by torch's attention and by ours, in one interleaved run: what ``ELSA_TUNE=1 python program.py`` gains, and
``attn_implementation="elsa"``; forward passes, and steps of training.

`make bench` runs it last. The models are transformers' own code with random weights, eager and compiled, and nothing in them is changed:
torch's operator is overridden, as the variable does it, and for torch's rounds steps aside; or attention is registered, and "sdpa" is set for
torch's rounds. The problems the models pose are recorded and tuned first. Writes benchmarks/results/models-<device>.json and prints losses like wins.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import elsa_tune
from _side_by_side import results_file, shown, tune_first, version
from elsa_tune.device import host_cpu
from elsa_tune.dispatch import ledger, meaning, serving
from elsa_tune.generate import incumbent
from elsa_tune.integrations import override
from elsa_tune.masks import CAUSAL, NONE
from elsa_tune.problem import Problem
from elsa_tune.tuning import race

ROUNDS = 15
SECONDS_A_MODEL = 60.0
"""Of rounds; five are taken however long they last."""

TOKENS = 4
"""Tokens that a round of decoding adds to the cache."""

Attention = Callable[..., Any]


@dataclass
class Forward:
    """A model and its rounds: number -> the last hidden state, or a gradient. Rounds are called in order and may be repeated from 0."""

    model: Any
    round: Callable[[int], Tensor]

    def __call__(self, number: int) -> Tensor:
        return self.round(number)


@dataclass(frozen=True)
class Case:
    """A model and its input; ``make`` builds it with random weights, and ``way`` names who serves it, one of WAYS."""

    name: str
    about: str
    make: Callable[[], Forward]
    way: str = "override"
    is_compiled: bool = False
    is_training: bool = False


def _whole(model: Any, compiled: bool) -> Any:
    return torch.compile(model) if compiled else model


def encoder(kind: str, inputs: dict[str, Tensor], compiled: bool = False, **options: Any) -> Forward:
    """A transformers encoder, one batch a round."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(**options)
    model = _whole(
        getattr(transformers, f"{kind}Model")._from_config(config, attn_implementation="sdpa").eval(), compiled
    )
    return Forward(model, lambda number: model(**inputs).last_hidden_state)


def bert(batch: int, length: int, **options: Any) -> Forward:
    """BERT-base. The tokenizer's mask of ones is given: transformers looks at it and calls attention without a mask."""
    inputs = {"input_ids": _tokens(batch, length), "attention_mask": torch.ones(batch, length, dtype=torch.long)}
    return encoder("Bert", inputs, **options)


def padded_bert(batch: int, length: int, **options: Any) -> Forward:
    """BERT-base on texts of a sixteenth, three sixteenths and so on of the length, half of it on average."""
    ends = length * (2 * torch.arange(batch) + 1) // (2 * batch)
    mask = (torch.arange(length) < ends[:, None]).long()
    return encoder("Bert", {"input_ids": _tokens(batch, length), "attention_mask": mask}, **options)


def swin(batch: int, **options: Any) -> Forward:
    """Swin-T at 224 px."""
    return encoder("Swin", {"pixel_values": torch.randn(batch, 3, 224, 224)}, **options)


def vit(batch: int, size: int, **options: Any) -> Forward:
    """ViT-B/16."""
    return encoder("ViT", {"pixel_values": torch.randn(batch, 3, size, size)}, image_size=size, **options)


def training(forward: Forward) -> Forward:
    """A step of training without dropout: forward, a loss against random targets, backward; no optimizer. A round gives the gradient of the
    model's first parameter, to which every layer's attention has led."""
    target = torch.randn_like(forward(0))

    def step(number: int) -> Tensor:
        forward.model.zero_grad()
        torch.nn.functional.mse_loss(forward(number), target).backward()
        return next(forward.model.parameters()).grad

    return Forward(forward.model, step)


LLAMA_1B: dict[str, Any] = dict(
    hidden_size=2048, intermediate_size=8192, num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=65536,
    vocab_size=1000, num_hidden_layers=2,
)  # fmt: skip
"""The widths of LLaMA 3.2 1B; two of its 16 equal layers, and neither its vocabulary nor the product with it."""


def _llama(**options: Any) -> Any:
    import transformers

    config = transformers.LlamaConfig(**options)
    return transformers.LlamaModel._from_config(config, attn_implementation="sdpa").eval()


def prefill(length: int, compiled: bool = False, **options: Any) -> Forward:
    """A prompt that fills an empty cache, as `generate` begins."""
    model, tokens = _whole(_llama(**options), compiled), _tokens(1, length)
    return Forward(model, lambda number: model(input_ids=tokens, use_cache=True).last_hidden_state)


def decoding(length: int, dtype: torch.dtype = torch.float32, is_offloaded: bool = False, **options: Any) -> Forward:
    """TOKENS tokens a round, one at a time, upon a cache that grows from ``length`` as `generate`'s does; in files, where it is offloaded."""
    import transformers

    from elsa_tune.integrations.transformers import OffloadedCache

    model = _llama(**options).to(dtype)
    cache = OffloadedCache(0) if is_offloaded else transformers.DynamicCache(config=model.config)
    for layer in range(model.config.num_hidden_layers):
        rows = 1, model.config.num_key_value_heads, length, model.config.head_dim
        cache.update(torch.randn(rows, dtype=dtype), torch.randn(rows, dtype=dtype), layer)

    def forward(number: int) -> Tensor:
        surplus = cache.get_seq_length() - length - TOKENS * number
        if surplus:
            cache.crop(-surplus)
        last = [model(input_ids=_tokens(1, 1), past_key_values=cache).last_hidden_state for _ in range(TOKENS)]
        return torch.cat(last)

    return Forward(model, forward)


def _tokens(batch: int, length: int) -> Tensor:
    return torch.arange(batch * length).reshape(batch, length) % 997


CASES = (
    Case("bert-base-8x128", "BERT-base, 8 texts of 128 tokens", lambda: bert(8, 128)),
    Case("bert-base-8x512", "BERT-base, 8 texts of 512 tokens", lambda: bert(8, 512)),
    Case("bert-base-8x512-compiled", "the same, compiled", lambda: bert(8, 512, compiled=True), is_compiled=True),
    Case("bert-base-8x512-padded", "the same, of which half is padding", lambda: padded_bert(8, 512), "registered"),
    Case("bert-base-8x512-training", "a training step of the same without padding", lambda: training(bert(8, 512)), is_training=True),
    Case("swin-t-224", "Swin-T, 4 images of 224 px", lambda: swin(4), "registered"),
    Case("vit-b16-224", "ViT-B/16, 8 images of 224 px", lambda: vit(8, 224)),
    Case("vit-b16-224-training", "a training step of the same", lambda: training(vit(8, 224)), is_training=True),
    Case("vit-b16-768", "ViT-B/16, 1 image of 768 px", lambda: vit(1, 768)),
    Case("vit-b16-768-compiled", "the same, compiled", lambda: vit(1, 768, compiled=True), is_compiled=True),
    Case("llama-1b-prefill-2k", "LLaMA-1B, two layers, a prompt of 2048", lambda: prefill(2048, **LLAMA_1B)),
    Case("llama-1b-prefill-2k-compiled", "the same, compiled", lambda: prefill(2048, compiled=True, **LLAMA_1B), is_compiled=True),
    Case("llama-1b-decode-8k", "LLaMA-1B, two layers, a cache of 8192", lambda: decoding(8192, **LLAMA_1B)),
    Case("llama-1b-decode-32k", "LLaMA-1B, two layers, a cache of 32768", lambda: decoding(32768, **LLAMA_1B)),
    Case("llama-1b-decode-8k-bf16", "the same, of 8192, bfloat16", lambda: decoding(8192, torch.bfloat16, **LLAMA_1B)),
    Case("llama-1b-offloaded-32k", "a cache of 32768 in files; torch loads it first", lambda: decoding(32768, is_offloaded=True, **LLAMA_1B), "registered"),
    Case("llama-1b-decode-32k-bf16", "the same, of 32768, bfloat16", lambda: decoding(32768, torch.bfloat16, **LLAMA_1B)),
)  # fmt: skip


@contextmanager
def attention_by(function: Attention) -> Iterator[None]:
    """Everything that calls torch.nn.functional.scaled_dot_product_attention by that name gets ``function`` meanwhile."""
    with mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", function):
        yield


@dataclass
class Recorder:
    """Serves by torch and counts the problems posed, and by reason the calls that pose none."""

    problems: Counter[Problem] = field(default_factory=Counter)
    others: Counter[str] = field(default_factory=Counter)

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        wanted = (CAUSAL if is_causal else NONE) if attn_mask is None else meaning.of(attn_mask, is_causal, query, key)
        posed = wanted and serving.problem_of(query, key, value, wanted, enable_gqa)
        if wanted is None:
            self.others[f"a mask {attn_mask.dtype} {list(attn_mask.shape)}"] += 1
        elif dropout_p or posed is None:
            self.others["dropout" if dropout_p else f"tensors {query.dtype} {list(query.shape)}"] += 1
        else:
            self.problems[posed] += 1
        return scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )


def to_tune(posed: Iterable[Problem]) -> list[Problem]:
    """One for each that differ only in their keys: a growing cache poses a new one with every token."""
    first: dict[Problem, Problem] = {}
    for problem in posed:
        first.setdefault(problem.reshaped(kv_len=1), problem)
    return list(first.values())


@dataclass
class Stopwatch:
    """Adds up the seconds spent in attention functions."""

    seconds: float = 0.0

    def of(self, serve: Attention) -> Attention:
        """The function, timed."""

        def timed(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            out = serve(*arguments, **options)
            self.seconds += time.perf_counter() - start
            if learning := [x for x in arguments if isinstance(x, Tensor) and x.requires_grad]:
                self._time_backward(out, learning)
            return out

        return timed

    def _time_backward(self, output: Tensor, inputs: list[Tensor]) -> None:
        """From when the output's gradient arrives until that of an input leaves: they leave together."""
        begun: list[float] = []

        def end(_: Tensor) -> None:
            self.seconds += time.perf_counter() - begun.pop()

        output.register_hook(lambda _: begun.append(time.perf_counter()))
        torch.autograd.graph.register_multi_grad_hook(inputs, end, mode="any")


@contextmanager
def implementation(model: Any, name: str) -> Iterator[None]:
    """A transformers model with its attention set."""
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


class Override:
    """torch's operator overridden, as ELSA_TUNE=1 does it."""

    @contextmanager
    def on(self) -> Iterator[str]:
        """In place, and by which way."""
        override.enable()
        try:
            yield override.state()[1]
        finally:
            override.disable()

    def by(self, who: str, forward: Forward) -> AbstractContextManager[None]:
        """Attention answered by torch or elsa-tune."""
        return incumbent.aside() if who == TORCH else nullcontext()

    def watched(self, watch: Stopwatch) -> AbstractContextManager[None]:
        """Attention timed."""
        return attention_by(watch.of(scaled_dot_product_attention))

    def posed(self, forward: Forward) -> tuple[Counter[Problem], Counter[str]]:
        """The problems of a round, and by reason its calls that pose none."""
        recorder = Recorder()
        with attention_by(recorder):
            forward(0)
        return recorder.problems, recorder.others


class Registered:
    """attn_implementation="elsa", beside transformers' own "sdpa"."""

    @contextmanager
    def on(self) -> Iterator[str]:
        """Registered."""
        from elsa_tune.integrations.transformers import register

        register()
        yield "registered"

    def by(self, who: str, forward: Forward) -> AbstractContextManager[None]:
        """Attention answered by torch or elsa-tune."""
        return implementation(forward.model, "sdpa" if who == TORCH else "elsa")

    @contextmanager
    def watched(self, watch: Stopwatch) -> Iterator[None]:
        """Attention timed."""
        import transformers

        known = transformers.AttentionInterface()
        before = {name: known[name] for name in ("sdpa", "elsa")}
        try:
            for name, function in before.items():
                transformers.AttentionInterface.register(name, watch.of(function))
            yield
        finally:
            for name, function in before.items():
                transformers.AttentionInterface.register(name, function)

    def posed(self, forward: Forward) -> tuple[Counter[Problem], Counter[str]]:
        """The problems of a round."""
        ledger.forget()
        serving.refresh()
        with self.by("elsa-tune", forward):
            forward(0)
        return Counter({Problem.parse(row.problem): row.calls for row in elsa_tune.served()}), Counter()


TORCH = "torch"
ANSWERERS = (TORCH, "elsa-tune")
WAYS: dict[str, Override | Registered] = {"override": Override(), "registered": Registered()}
"""By which elsa-tune is reached."""


Samples = dict[str, list[float]]
"""Seconds of rounds, by who answered."""


def interleaved(
    way: Override | Registered, forward: Forward, rounds: int, watched: bool = True
) -> tuple[Samples, Samples]:
    """Of rounds of the model, and of the attention in them if that is to be ``watched``. In a round both answerers are timed once, in random
    order: five rounds or more until SECONDS_A_MODEL have passed."""
    whole, inside = ({who: list[float]() for who in ANSWERERS} for _ in range(2))
    end = time.perf_counter() + SECONDS_A_MODEL
    for number in range(rounds):
        if number >= 5 and time.perf_counter() > end:
            break
        for who in random.Random(number).sample(ANSWERERS, len(ANSWERERS)):
            watch = Stopwatch()
            with way.by(who, forward), way.watched(watch) if watched else nullcontext():
                start = time.perf_counter()
                forward(number)
                whole[who].append(time.perf_counter() - start)
            inside[who].append(watch.seconds)
    return whole, inside


def answers(way: Override | Registered, forward: Forward) -> list[Tensor]:
    """Of the first round, by each answerer."""
    found = []
    for who in ANSWERERS:
        with way.by(who, forward):
            found.append(forward(0))
    return found


def served(problem: Problem, calls: int) -> dict[str, Any]:
    """Who serves a problem here, and why; a kernel that must be built is built now."""
    chosen = serving.explain(problem, host_cpu())
    if not chosen.by_sdpa and problem.direction == "forward":  # autograd loads the other
        elsa_tune.load(problem, "cpu")
    measured = chosen.winner.ratio if chosen.winner else None
    return {
        "problem": str(problem), "calls": calls, "rung": chosen.rung, "variant": str(chosen.variant or "torch's SDPA"),
        "measured_ratio": measured,
    }  # fmt: skip


def amdahl(gain: float, share: float, kernel_ratio: float) -> tuple[float, float | None]:
    """The gain of a model whose attention, ``share`` of its time, runs ``kernel_ratio`` times as fast, and how much of
    that was reached; None where less than 1 % is to be had."""
    possible = 1 / (1 - share + share / kernel_ratio)
    return possible, (gain - 1) / (possible - 1) if possible > 1.01 else None


def measured(case: Case, eager: Case, rounds: int, tune_seconds: float) -> dict[str, Any]:
    """Everything about one model; see the fields. Attention is timed inside ``eager``, the same model as it is written."""
    torch.manual_seed(0)
    forward, way = eager.make(), WAYS[case.way]
    with way.on():
        posed, others = way.posed(forward)
    if case.is_training:
        posed += Counter({problem.reshaped(direction="backward"): calls for problem, calls in posed.items()})
    tune_first(map(str, to_tune(posed)), tune_seconds)
    lines = [served(problem, calls) for problem, calls in posed.items()]
    with way.on() as told:
        found = answers(way, forward)
        whole, inside = interleaved(way, forward, rounds)
        if case.is_compiled:
            forward = case.make()
            found = answers(way, forward)
            whole, _ = interleaved(way, forward, rounds, watched=False)
    difference = float((found[1] - found[0]).abs().max() / found[0].abs().max())
    share = statistics.median(inside["torch"]) / statistics.median(whole["torch"])
    gain, kernels = (race.ratio(x["torch"], x["elsa-tune"]) for x in (whole, inside))
    possible, reached = amdahl(gain.median, share, kernels.median)
    return {
        "about": case.about, "training": case.is_training, "gain": asdict(gain), "attention_share": share, "kernel_ratio": asdict(kernels),
        "possible_gain": possible, "reached": reached, "difference": difference, "served": lines, "way": told,
        "not_ours": dict(others), "seconds": whole, "attention_seconds": inside,
        "threads": torch.get_num_threads(), "date": time.strftime("%Y-%m-%d"),
        "versions": {p: version(p) for p in ("elsa-tune", "torch", "transformers")},
    }  # fmt: skip


def as_asked(found: dict[str, Any]) -> bool:
    """Nine tenths of the possible gain, or that the interval does not tell; and no loss beyond the interval."""
    possible, high = found["possible_gain"], found["gain"]["high"]
    return bool(high >= max(1.0, 1 + 0.9 * (possible - 1)))


HEAD = "model | gain [95 %] | attention of torch's run | kernels [95 %] | possible | reached | difference"


def row(name: str, found: dict[str, Any]) -> str:
    """A line under HEAD."""
    gain, kernels = found["gain"], found["kernel_ratio"]
    reached = "-" if found["reached"] is None else f"{found['reached']:.2f}"
    return (
        f"{name} | {gain['median']:.3f} [{gain['low']:.3f}, {gain['high']:.3f}] | {found['attention_share']:.3f} | "
        f"{kernels['median']:.2f} [{kernels['low']:.2f}, {kernels['high']:.2f}] | {found['possible_gain']:.3f} | {reached} | "
        f"{found['difference']:.1e}{'' if as_asked(found) else ' SHORT'}"
    )


def main() -> None:
    names = [case.name for case in CASES]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", choices=names, help="only these models; repeatable")
    parser.add_argument("--tune-seconds", type=float, default=15.0, help="for each problem that is not tuned yet")
    options = parser.parse_args()
    path = results_file("models-")
    known = json.loads(path.read_text())["results"] if path.exists() else {}
    chosen = [case for case in CASES if case.name in (options.model or names)]
    for case in chosen:
        eager = next(one for one in CASES if one.name == case.name.removesuffix("-compiled"))
        with torch.inference_mode(not case.is_training):
            known[case.name] = found = measured(case, eager, ROUNDS, options.tune_seconds)
        print(f"{row(case.name, found)}", flush=True)
        for line in found["served"]:
            print(f"  {line['calls']} x {line['problem']}: {line['variant']} ({line['rung']})")
        for why, calls in found["not_ours"].items():
            print(f"  {calls} x torch: {why}")
        content = {
            "device": str(host_cpu()),
            "name": host_cpu().name,
            "results": {n: known[n] for n in names if n in known},
        }
        path.write_text(json.dumps(content, indent=1))
    print(f"\n{HEAD}")
    for case in chosen:
        print(row(case.name, known[case.name]))
    print(f"written to {shown(path)}")


if __name__ == "__main__":
    main()
