"""What two trees render, compared: every start and some hundred lawful variants of each backend, by digest.

PYTHONPATH=OLD_TREE python benchmarks/digests.py old.json
PYTHONPATH=. python benchmarks/digests.py new.json --against old.json
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import elsa_tune
from elsa_tune import space
from elsa_tune.device import Device
from elsa_tune.errors import ElsaTuneError
from elsa_tune.generate import backends, lawful
from elsa_tune.problem import Problem
from elsa_tune.space import Space

DEVICES = (
    *(Device("cpu", "any", arch, 4) for arch in ("zen4", "haswell", "cortex_a72", "riscv64")),
    *(Device("cuda", "any", f"sm_{n}", 80) for n in (52, 60, 62, 70, 75, 80, 86, 90, 120)),
    *(Device("hip", "any", arch, 80) for arch in ("gfx906", "gfx942", "gfx1100")),
    *(Device("opencl", "any", f"shuffle{n}", 4) for n in (0, 8)),
)
DTYPES = ("fp32", "fp32.strict", "fp32.tf32", "fp16", "fp16.approx", "bf16")
DIMS = ("d64", "d80", "d128", "d96.v64", "d32", "d256")
MASKS = ("", ".causal", ".causal.backward", ".window", ".causal_lower_right", ".prefix", ".causal+window", ".backward")
SHAPES = ("b1.h8.q4096.k4096", "b1.h32.kv8.q1.k8192", "b2.h4.kv2.q300.k500")


def posed() -> list[Problem]:
    """Problems of every dtype, dimensions, mask and shape that this tree can spell."""
    found = []
    for dtype in DTYPES:
        for dims in DIMS:
            for mask in MASKS:
                for shape in SHAPES:
                    family = f"{dtype}.{dims}{mask}"
                    integers = ".left64.right0" if "window" in mask else ".prefix10" if "prefix" in mask else ""
                    try:
                        found.append(Problem.parse(f"{family}@{shape}{integers}"))
                    except ElsaTuneError:
                        continue
    return found


def sample(backend: str, count: int, rng: random.Random) -> list[tuple[str, str]]:
    """All starts, each with some families that it may serve, then so many lawful variants that some steps from a start reach."""
    every = [(p, d) for p in posed() for d in DEVICES if backends.get(backend).refusal(p, d) is None]
    chosen = Space.read(backend)
    starts = [chosen.parse(text) for text in chosen.start]
    found: dict[tuple[str, str], None] = {}
    for start in starts:
        for problem, device in rng.sample(every, 60):
            if lawful.refusal(start, problem, device) is None:
                found[str(start), problem.family] = None
    most = len(found) + count
    for _ in range(100 * count):
        problem, device = rng.choice(every)
        values = {**rng.choice(starts).axes}
        for axis in rng.sample(chosen.axes, rng.randint(1, 5)):
            values[axis.name] = rng.choice(axis.values)
        variant = chosen.variant(values)
        if lawful.refusal(variant, problem, device) is None:
            found[str(variant), problem.family] = None
        if len(found) >= most:
            break
    return list(found)


def digest(variant: str, family: str) -> str:
    """Of the rendered code."""
    chosen = space.parse(variant)
    source = backends.get(chosen.backend).source(chosen, Problem.parse(family))
    assert source is not None
    return source.digest


def main() -> None:
    """Write digests; with --against, of the same variants as another tree wrote, and say how many differ."""
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("to", type=Path)
    words.add_argument("--against", type=Path)
    words.add_argument("--count", type=int, default=400)
    given = words.parse_args()
    if given.against:
        known: dict[str, dict[str, str]] = json.loads(given.against.read_text())
        pairs = {backend: [tuple(key.split(" ")) for key in found] for backend, found in known.items()}
    else:
        rng = random.Random(0)
        pairs = {name: sample(name, given.count, rng) for name in backends.candidates()}
    made = {name: {f"{v} {f}": digest(v, f) for v, f in of} for name, of in pairs.items()}
    given.to.write_text(json.dumps(made, indent=1))
    print(f"{elsa_tune.__file__}")
    for name, found in made.items():
        differ = [key for key, value in found.items() if given.against and known[name][key] != value]
        print(f"{name}: {len(found)} rendered" + (f", {len(differ)} differ" if given.against else ""))
        for key in differ[:5]:
            print(f"  {key}")


if __name__ == "__main__":
    main()
