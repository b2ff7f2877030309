"""Masks, scores and halves against torch's best kernel for the same tensors, FlexAttention and our own kernels, in one interleaved run.

Run it with `make bench`. What a program would pass to scaled_dot_product_attention is passed to both; problems that are not tuned yet are
tuned first. Ratios are medians of round-by-round ratios with bootstrap intervals. Writes benchmarks/results/masks-<device>.json and prints
losses like wins.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import elsa_tune
from _side_by_side import in_turns, tune_first, write
from elsa_tune import masks
from elsa_tune.device import host_cpu
from elsa_tune.parts import element as elements
from elsa_tune.problem import Problem
from elsa_tune.prove import reference

ROUNDS = 15
SECONDS_A_CASE = 6.0
PAUSE = 0.003
"""Seconds between samples: threads spin for a while after they finish."""

ZEN_5, XEON = host_cpu().model.startswith("amd_f26"), host_cpu().model.startswith("intel")
HALVES = "bf16", "fp16"
PROMPTS = 197, 512, 1024, 2048, 4096
Tensors = tuple[Tensor, Tensor, Tensor]
Call = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """A problem to be tuned, and what makes its attn_mask; ``dense`` where torch does not take that, and is given its pairs. ``more`` are
    peers beside torch's kernels, ``ours`` how we are called where it is not by attention()."""

    name: str
    problem: str
    mask: Callable[[], Any] = lambda: None
    dense: bool = False
    more: Mapping[str, Callable[[Tensors], Call]] = field(default_factory=dict)
    ours: Callable[[Tensors], Call] | None = None

    @property
    def posed(self) -> Problem:
        return Problem.parse(self.problem)

    def pairs(self) -> Tensor:
        """bool: which pairs a mask of ours lets through."""
        p = self.posed
        seen: Tensor = self.mask().dense(p.batch, p.heads, p.q_len, p.kv_len)
        return seen[(None,) * (4 - seen.dim())]  # three dimensions are refused by torch's fused kernel


@dataclass(frozen=True)
class Goal:
    """What is asked of some cases: to be at least so many times as fast as the fastest of the peers; ``times`` says what of a peer's time
    is compared, of a case."""

    name: str
    against: tuple[str, ...]
    at_least: float
    cases: tuple[str, ...]
    times: Callable[[Case], float] = lambda case: 1.0


def _random(*shape: int, share: float = 0.75) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) < share


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


SHAPES = ((8, 12, 197), (8, 12, 512), (1, 12, 1024), (1, 8, 2048), (1, 4, 4096))
PADDED = ((8, 12, 128), (8, 12, 512), (16, 12, 256))


def _lengths(batch: int, kv_len: int) -> Tensor:
    """Half of all keys on average, spread evenly."""
    return torch.tensor([max(1, kv_len * (2 * i + 1) // (2 * batch)) for i in range(batch)])


def _swin(windows: int, heads: int, tokens: int) -> Tensor:
    """A relative position's bias of each head, and the mask of windows that were shifted over an edge: as timm and transformers add them."""
    table = _normal((2 * int(tokens**0.5) - 1) ** 2, heads)
    side = int(tokens**0.5)
    place = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")).flatten(1)
    apart = place[:, :, None] - place[:, None, :] + side - 1
    relative = table[apart[0] * (2 * side - 1) + apart[1]].permute(2, 0, 1)
    region = (place[0] >= side - side // 2).int() * 2 + (place[1] >= side - side // 2).int()
    shifted = (region[:, None] != region[None, :]).float() * -100.0
    which = (torch.arange(windows) % 64 >= 56).float()[:, None, None, None]
    return relative + which * shifted


def cases() -> Iterator[Case]:
    for b, h, n in SHAPES:
        shape = f"b{b}.h{h}.q{n}.k{n}"
        yield Case(f"bool {n}", f"fp32.d64.dense@{shape}", partial(_random, b, 1, n, n))
        yield Case(f"additive {n}", f"fp32.d64.bias@{shape}", partial(_normal, b, h, n, n))
        yield Case(f"additive shared {n}", f"fp32.d64.bias@{shape}", partial(_normal, 1, h, n, n))
        yield Case(f"additive of keys {n}", f"fp32.d64.bias@{shape}", partial(_normal, b, 1, 1, n))
    for b, h, n in PADDED:
        yield Case(f"padding {b} x {n}", f"fp32.d64.lengths@b{b}.h{h}.q{n}.k{n}", partial(_padding, b, n))
    for tokens, windows in ((49, 4096), (64, 2048)):
        yield Case(
            f"Swin {tokens}", f"fp32.d32.bias@b{windows}.h3.q{tokens}.k{tokens}", partial(_swin, windows, 3, tokens)
        )
    yield from sparse()
    yield ragged()
    for b, h, n in ((8, 12, 197), (8, 12, 512), (1, 8, 1024), (1, 8, 2048), (1, 4, 4096)):
        for dtype in HALVES:
            yield Case(f"{dtype} {n}", f"{dtype}.d64@b{b}.h{h}.q{n}.k{n}")
    for dtype in HALVES:
        for spelled in ("d128@b1.h32.kv8.q1.k4096", "d128@b1.h32.kv8.q1.k32768", "d64@b1.h32.kv8.q1.k8192"):
            yield Case(f"{dtype} decoding {spelled}", f"{dtype}.{spelled}")


def sparse() -> Iterator[Case]:
    """Masks that hide most pairs: windows, block layouts that differ between heads, and at 16K what FlashMask is for."""

    def case(name: str, problem: str, mask: Any, mask_mod: Any, heads: int | None = None) -> Case:
        spelled = f"fp32.d64.{problem}"
        flex = {"flex": partial(_flex, mask_mod, heads, Problem.parse(spelled).q_len)}
        return Case(name, spelled, lambda: mask, dense=True, more=flex)

    window = masks.causal() & masks.window(1023)
    yield case(
        "window 1024 of 8192", "causal+window@b1.h8.q8192.k8192.left1023.right0", window,
        lambda b, h, i, j: (j <= i) & (j >= i - 1023),
    )  # fmt: skip
    for share in (0.25, 0.125):
        layout = _random(1, 4, 64, 64, share=share) | torch.eye(64, dtype=torch.bool)
        yield case(
            f"blocks {share:.1%} of 8192", "blocks@b1.h4.q8192.k8192.blockq128.blockk128", masks.blocks(layout, 128, 128),
            lambda b, h, i, j, layout=layout: layout[0, h, i // 128, j // 128], heads=4,
        )  # fmt: skip
    strided = masks.strided(heads=4, local=4, stride=8, block=128)
    seen = strided.operands["blocks"].layout(8192, 8192, torch.device("cpu"))
    yield case(
        "S2 of 8192", "blocks+causal@b1.h4.q8192.k8192.blockq128.blockk128", strided,
        lambda b, h, i, j: seen[h, i // 128, j // 128] & (j <= i), heads=4,
    )  # fmt: skip
    n, key = 16384, torch.arange(16384)
    cuts = torch.randperm(n - 1, generator=torch.Generator().manual_seed(0))[:15].sort().values + 1
    document = torch.searchsorted(cuts, key, right=True)
    hidden_from = {
        "documents": torch.cat([cuts, torch.tensor([n])])[document],
        "window and 128 first keys": (key + 1024).clamp(max=n).where(key >= 128, n),
    }
    mods: dict[str, Any] = {
        "documents": lambda b, h, i, j: (document[i] == document[j]) & (j <= i),
        "window and 128 first keys": lambda b, h, i, j: (j <= i) & ((i - j < 1024) | (j < 128)),
    }
    for name, rows in hidden_from.items():
        bounds = rows[None, None, :, None]
        yield case(
            f"{name} of 16384", "causal+columns@b1.h1.q16384.k16384", masks.columns(bounds, causal=True), mods[name]
        )
    yield case(
        "prefix 4096 of 16384", "prefix@b1.h1.q16384.k16384.prefix4096", masks.prefix(4096),
        lambda b, h, i, j: (j <= i) | (j < 4096),
    )  # fmt: skip


def ragged() -> Case:
    """Sixteen sequences of 32 to 512 tokens, one after the other, against torch padded (the padding is not timed) and call by call."""
    each = torch.linspace(32, 512, 16).long()
    cu = torch.cat([torch.zeros(1, dtype=torch.long), each.cumsum(0)])
    tokens = int(cu[-1])

    def apart(x: Tensors) -> list[list[Tensor]]:
        return [list(t[0].transpose(0, 1).split(each.tolist())) for t in x]

    def ours(x: Tensors) -> Call:
        query, key, value = (t[0].transpose(0, 1) for t in x)
        return lambda: elsa_tune.attention_varlen(query, key, value, cu, cu)

    def padded(x: Tensors) -> Call:
        q, k, v = (torch.nn.utils.rnn.pad_sequence(t, batch_first=True).transpose(1, 2) for t in apart(x))
        seen = (torch.arange(512) < each[:, None])[:, None, None]
        return lambda: scaled_dot_product_attention(q, k, v, attn_mask=seen)

    def loop(x: Tensors) -> Call:
        one = [tuple(t.transpose(0, 1)[None] for t in three) for three in zip(*apart(x), strict=True)]

        def call() -> Tensor:
            return torch.cat([scaled_dot_product_attention(*three)[0].transpose(0, 1) for three in one])

        return call

    return Case(
        "ragged 16 x 32..512", f"fp32.d64.ranges@b1.h12.q{tokens}.k{tokens}.bshd", more={"loop": loop, "padded": padded},
        ours=ours,
    )  # fmt: skip


def _padding(batch: int, n: int) -> Tensor:
    return (torch.arange(n) < _lengths(batch, n)[:, None])[:, None, None]


def _flex(mask_mod: Callable[..., Any], heads: int | None, n: int, x: Tensors) -> Call:
    """FlexAttention, compiled, with its block mask made before."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    block_mask = create_block_mask(mask_mod, None, heads, n, n, device="cpu", _compile=False)
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(*x, block_mask=block_mask)


def named(start: str) -> tuple[str, ...]:
    return tuple(case.name for case in CASES if case.name.startswith(start))


def seen(case: Case) -> float:
    """The share of pairs that the mask lets through."""
    pairs = case.pairs()
    return int(pairs.count_nonzero()) / pairs.numel()


CASES = tuple(cases())
SPARSE = tuple(case.name for case in CASES if case.dense)
TORCH = ("torch flash", "torch math")
GOALS = (
    Goal("bool masks, against torch", TORCH, 1.8 if ZEN_5 else 1.6, named("bool")),
    Goal("bool masks, against our own kernel without one", ("unmasked",), 0.9, named("bool")),
    Goal("additive masks [B, H, N, N], against torch", TORCH, 1.8 if ZEN_5 else 1.4, tuple(f"additive {n}" for *_, n in SHAPES)),
    Goal("the same, against our own kernel without one", ("unmasked",), 0.8, tuple(f"additive {n}" for *_, n in SHAPES)),
    Goal("additive masks that broadcast, against torch", TORCH, 1.8 if ZEN_5 else 1.4, named("additive shared") + named("additive of keys")),
    Goal("the same, against our own kernel without one", ("unmasked",), 1 / 1.1, named("additive shared") + named("additive of keys")),
    Goal("key padding, half filled, against torch", TORCH, 4.0 if ZEN_5 else 2.5, named("padding")),
    Goal("Swin's windows, against torch", TORCH, 2.0, named("Swin")),
    Goal("windows, blocks and columns: share of the ideal speed-up over our dense kernel", ("unmasked",), 0.8, SPARSE, seen),
    Goal("the same, against compiled FlexAttention", ("flex",), 1.5, SPARSE),
    Goal("ragged batch, against torch padded", ("padded",), 3.0, named("ragged")),
    Goal("ragged batch, against a loop of torch's calls", ("loop",), 1.3, named("ragged")),
    Goal("bf16, against torch's", TORCH, 1.9 if XEON else 1.0, tuple(f"bf16 {n}" for n in PROMPTS)),
    Goal("fp16, against torch's", TORCH, 1.3 if XEON else 1.0, tuple(f"fp16 {n}" for n in PROMPTS)),
    Goal("halves, against our own float32", ("unmasked",), 0.95, tuple(f"{d} {n}" for d in HALVES for n in PROMPTS)),
    Goal("halves decoding, against our own float32", ("unmasked",), 1.6, named("bf16 decoding") + named("fp16 decoding")),
)  # fmt: skip


def contenders(case: Case) -> dict[str, Call]:
    """Who computes the case: us, torch's kernels, what the case names, and our kernel of float32 without a mask."""
    posed = case.posed
    plain = posed.unmasked.reshaped(dtype="fp32", precision="fp32")
    x = reference.random_inputs(plain, torch.Generator().manual_seed(0)).ordered(plain.orders)
    wide = x.query, x.key, x.value
    own = tuple(t.to(elements.get(posed.dtype).dtype) for t in wide)
    mask, grouped = case.mask(), posed.group > 1
    torchs = case.pairs() if case.dense else mask

    def by_torch(backend: SDPBackend) -> Call:
        def call() -> Any:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(*own, attn_mask=torchs, enable_gqa=grouped)

        return call

    found = {
        "elsa-tune": lambda: elsa_tune.attention(*own, attn_mask=mask, enable_gqa=grouped),
        "unmasked": lambda: elsa_tune.attention(*wide, enable_gqa=grouped),
    }
    if case.ours:
        found["elsa-tune"] = case.ours(own)
    else:
        found["torch flash"] = by_torch(SDPBackend.FLASH_ATTENTION)
    if not case.ours and posed.batch * posed.heads * posed.q_len * posed.kv_len < 1 << 27:
        found["torch math"] = by_torch(SDPBackend.MATH)
    return {**found, **{name: make(own) for name, make in case.more.items()}}


def unmasked(case: Case) -> str:
    return str(case.posed.unmasked.reshaped(dtype="fp32", precision="fp32"))


def interleaved(case: Case) -> dict[str, Any]:
    """Rounds in which everyone is timed once, in turns; and how far ours is from torch's answer."""
    racing, absent = contenders(case), {}
    for name in list(racing):
        try:
            racing[name]()
        except RuntimeError as error:
            absent[name] = str(error).splitlines()[0][:200]
            del racing[name]
    expected = next(racing[name]() for name in racing if name not in ("elsa-tune", "unmasked")).float()
    apart = float((racing["elsa-tune"]().float() - expected).abs().max())
    peers = in_turns(racing, ROUNDS, SECONDS_A_CASE, PAUSE)
    served = elsa_tune.load(case.problem)
    return {
        "problem": case.problem, "variant": str(served.variant), "rung": served.rung, "difference": apart,
        "peers": peers, "absent": absent,
    }  # fmt: skip


def judge(results: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Each goal: the geometric mean of its cases, and the worst of them."""
    verdicts: list[dict[str, Any]] = []
    of_name = {case.name: case for case in CASES}
    for goal in GOALS:
        ratios = {}
        for name in goal.cases:
            peers = results[name]["peers"] if name in results else {}
            here = [peers[peer]["ratio"] for peer in goal.against if peer in peers]
            if here:
                ratios[name] = min(here) * goal.times(of_name[name])
        if not ratios:
            verdicts.append({"goal": goal.name, "asked": goal.at_least, "measured": None})
            continue
        mean, worst = math.exp(statistics.mean(map(math.log, ratios.values()))), min(ratios, key=lambda n: ratios[n])
        verdicts.append({
            "goal": goal.name, "asked": goal.at_least, "geometric_mean": mean, "worst": ratios[worst], "worst_at": worst,
            "reached": mean >= goal.at_least,
        })  # fmt: skip
    return verdicts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--case", action="append", help="only cases whose names begin so; repeatable; nothing is written"
    )
    parser.add_argument("--tune-seconds", type=float, default=8.0, help="for each problem that is not tuned yet")
    options = parser.parse_args()
    chosen = [c for c in CASES if not options.case or any(c.name.startswith(start) for start in options.case)]
    tune_first([p for case in chosen for p in (case.problem, unmasked(case))], options.tune_seconds)
    results = {}
    for case in chosen:
        results[case.name] = found = interleaved(case)
        told = "  ".join(
            f"{n} {p['ratio']:.2f} [{p['low']:.2f}, {p['high']:.2f}]"
            for n, p in found["peers"].items()
            if n != "elsa-tune"
        )
        print(
            f"{case.name}: {told}; {found['variant']} ({found['rung']}), apart by {found['difference']:.1e}", flush=True
        )
        for name, why in found["absent"].items():
            print(f"  {name} absent: {why}")
    verdicts = judge(results)
    print("\ngoal | asked | reached (geometric mean) | worst")
    for v in verdicts:
        if "geometric_mean" in v:
            short = "" if v["reached"] else "SHORT"
            print(
                f"{v['goal']} | {v['asked']:.2f} | {v['geometric_mean']:.2f} {short} | {v['worst']:.2f} {v['worst_at']}"
            )
    if options.case:
        return
    write("masks-", goals=verdicts, results=results)


if __name__ == "__main__":
    main()
