"""Train and fine-tune a small transformer, by torch's attention and by ours: python examples/finetune.py [--small] [--write]. Linux.

It reads this project's documentation, byte by byte, first with all weights, then goes on from there with checkpoints of activations, with
LoRA (Hu et al. 2021), and with both. A model each way starts from the same weights and sees the same text; their steps are timed in turns. The
memory of a step is what it adds to a process of its own that gives back what it frees, as Linux tells it. ``--write`` first tunes what is not
tuned yet, and writes the file of benchmarks/results that the documentation shows.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice, product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

import elsa_tune
from elsa_tune.tuning import race
from in_turns import say_who_answered

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))
from _side_by_side import mib_of, told_by, tune_first, write

Attention = Callable[..., Tensor]
WAYS: dict[str, Attention] = {"torch": scaled_dot_product_attention, "elsa-tune": elsa_tune.attention}


@dataclass(frozen=True)
class Size:
    """Of a model and of what it reads in a step."""

    layers: int = 4
    heads: int = 4
    head_dim: int = 64
    batch: int = 2
    length: int = 2048
    steps: int = 16


SMALL = Size(layers=2, head_dim=16, length=256, steps=5)


@dataclass(frozen=True)
class Method:
    """What is kept for the backward pass, and what is trained."""

    checkpoints: bool = False
    rank: int = 0
    """Of LoRA's matrices; 0 trains all weights."""


METHODS = {"all weights": Method(), "checkpoints": Method(True), "LoRA": Method(rank=8), "LoRA, checkpoints": Method(True, 8)}  # fmt: skip


class Block(nn.Module):
    """Attention of each byte to those before it, and a perceptron."""

    def __init__(self, size: Size, attend: Attention) -> None:
        super().__init__()
        width = size.heads * size.head_dim
        self.heads, self.attend = size.heads, attend
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.back = (nn.Linear(width, width) for _ in range(4))
        self.perceptron = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """[batch, length, heads * head_dim]."""
        normal = self.before(x)
        q, k, v = (
            p(normal).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.query, self.key, self.value)
        )
        x = x + self.back(self.attend(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.perceptron(self.between(x))


class LoRA(nn.Module):
    """A layer whose weights stay, and a product of two thin matrices that learns what is added to them."""

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Linear(layer.in_features, rank, bias=False)
        self.up = nn.Linear(rank, layer.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.up(self.down(x))


class Transformer(nn.Module):
    """Bytes -> logits of the bytes that follow."""

    def __init__(self, size: Size, attend: Attention) -> None:
        super().__init__()
        width = size.heads * size.head_dim
        self.bytes, self.places = nn.Embedding(256, width), nn.Embedding(size.length, width)
        self.blocks = nn.ModuleList(Block(size, attend) for _ in range(size.layers))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 256))
        self.checkpoints = False

    def forward(self, read: Tensor) -> Tensor:
        """[batch, length] -> [batch, length, 256]."""
        x = self.bytes(read) + self.places.weight[: read.shape[1]]
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpoints else block(x)
        return self.head(x)

    def prepare(self, method: Method) -> None:
        """For a method of training."""
        self.checkpoints = method.checkpoints
        if method.rank:
            self.requires_grad_(False)
            for block in self.blocks:
                for name in ("query", "key", "value", "back"):
                    setattr(block, name, LoRA(getattr(block, name), method.rank))


class Training:
    """A model that learns in steps."""

    def __init__(self, who: str, method: Method, size: Size, weights: dict[str, Tensor] | None = None) -> None:
        torch.manual_seed(0)
        self.model = Transformer(size, WAYS[who])
        if weights:
            self.model.load_state_dict(weights)
        self.model.prepare(method)
        self.optimizer = torch.optim.AdamW((x for x in self.model.parameters() if x.requires_grad), lr=1e-3)

    def step(self, text: Tensor) -> float:
        """The loss of [batch, length + 1] bytes, before what they teach."""
        self.optimizer.zero_grad()
        loss = cross_entropy(self.model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())
        loss.backward()
        self.optimizer.step()
        return loss.item()


def texts(size: Size) -> Iterator[Tensor]:
    """Of the documentation, at random places."""
    pages = sorted((Path(__file__).resolve().parent.parent / "docs").rglob("*.md"))
    every = torch.tensor(list(b"".join(page.read_bytes() for page in pages)))
    generator = torch.Generator().manual_seed(0)
    while True:
        starts = torch.randint(len(every) - size.length, (size.batch, 1), generator=generator)
        yield every[starts + torch.arange(size.length + 1)]


def peak(method: Method, who: str, size: Size) -> float:
    """MiB that two steps add to a process that has a model, at most: in the second the optimizer has its states already."""
    Training(who, method, SMALL).step(next(texts(SMALL)))  # libraries, threads
    training, read = Training(who, method, size), texts(size)
    return mib_of(lambda: [training.step(next(read)) for _ in range(2)])


def peaks(size: Size) -> None:
    """Print that of each method, each way, in a process of its own: a copy of this one, which has not computed yet."""
    Training("torch", Method(), SMALL)  # imports what every copy needs
    for method, who in product(METHODS.values(), WAYS):
        if not os.fork():
            print(peak(method, who, size), flush=True)
            os._exit(0)
        os.wait()


def curves(method: Method, size: Size, weights: dict[str, Tensor] | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The losses and seconds of every step, by who attends, and the weights that torch's ended with."""
    learning = {who: Training(who, method, size, weights) for who in WAYS}
    for who in WAYS:
        Training(who, method, size).step(next(texts(size)))  # kernels, threads
    found: dict[str, Any] = {who: {"losses": [], "seconds": []} for who in WAYS}
    for number, text in enumerate(islice(texts(size), size.steps)):
        for who in WAYS if number % 2 else reversed(WAYS):
            start = time.perf_counter()
            found[who]["losses"].append(learning[who].step(text))
            found[who]["seconds"].append(time.perf_counter() - start)
    return found, learning["torch"].model.state_dict()


def measured(size: Size, memory: list[float]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each method, and what its steps gave and cost; the loss curves are printed."""
    weights = None
    for i, (name, method) in enumerate(METHODS.items()):
        found, learned = curves(method, size, weights)
        weights = weights or learned
        losses, seconds = ([found[who][what] for who in WAYS] for what in ("losses", "seconds"))
        apart = max(abs(a - b) for a, b in zip(*losses, strict=True))
        print(f"{name}: step, loss by {' and by '.join(WAYS)}")
        for number, pair in enumerate(zip(*losses, strict=True), 1):
            if number == 1 or number % 5 == 0:
                print(f"{number:4} {pair[0]:12.6f} {pair[1]:12.6f}")
        print(f"largest difference of losses: {apart:.1e}\n")
        mib = dict(zip(WAYS, memory[2 * i : 2 * i + 2], strict=True))
        yield name, {"ways": found, "difference": apart, "ratio": asdict(race.ratio(*seconds)), "mib": mib}


def row(name: str, found: dict[str, Any]) -> str:
    """What a step costs by torch and by ours, under HEAD."""
    torchs, ours = (median(found["ways"][who]["seconds"]) for who in WAYS)
    times = "{median:.2f} [{low:.2f}, {high:.2f}]".format(**found["ratio"])
    mib = " | ".join(f"{x:.4g}" for x in found["mib"].values())
    return f"{name} | {torchs:.3g} | {ours:.3g} | {times} | {mib}"


HEAD = "a step | torch, s | ours, s | times as fast [95 %] | torch, MiB | ours, MiB"


def main(small: bool, is_written: bool) -> None:
    """Print loss curves, and what a step costs, of each method."""
    size = SMALL if small else Size()
    if is_written:
        shape = f"b{size.batch}.h{size.heads}.q{size.length}.k{size.length}.bshd"
        tune_first((f"fp32.d{size.head_dim}.causal{way}@{shape}" for way in ("", ".backward")), 15)
    memory = told_by(
        __file__, "--peaks", *["--small"] * small, MALLOC_MMAP_THRESHOLD_="65536"
    )  # what is freed goes back
    results = dict(measured(size, memory))
    print(HEAD, *(row(name, found) for name, found in results.items()), sep="\n")
    say_who_answered()
    if is_written:
        write("finetune-", size=asdict(size), results=results)


if __name__ == "__main__":
    if "--peaks" in sys.argv:
        peaks(SMALL if "--small" in sys.argv else Size())
    else:
        main("--small" in sys.argv, "--write" in sys.argv)
