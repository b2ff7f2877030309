"""A package of AOTInductor that calls elsa_tune.attention: python examples/export_aoti.py [--small].

It is loaded by every Python that has this package installed and has imported ``elsa_tune.attention``, which brings the operator that
the package names; kernels are chosen there, when it is called. Where there is no Python it cannot be loaded.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from elsa_tune import attention, masks
from in_turns import compare


class Block(torch.nn.Module):
    """Attention of a sliding window between two projections."""

    def __init__(self, heads: int, head_dim: int, window: int) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.project = torch.nn.Linear(heads * head_dim, 3 * heads * head_dim)
        self.back = torch.nn.Linear(heads * head_dim, heads * head_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """[batch, length, heads * head_dim]."""
        query, key, value = self.project(tokens).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        output = attention(query, key, value, masks.causal() & masks.window(self.window))
        return self.back(output.transpose(1, 2).flatten(2))


def main(small: bool) -> None:
    """Compare a module with the package made of it."""
    torch.manual_seed(0)
    module = Block(heads=4, head_dim=16, window=7) if small else Block(heads=12, head_dim=64, window=255)
    tokens = torch.randn(1, 32 if small else 2048, module.back.in_features)
    with TemporaryDirectory() as folder, torch.no_grad():
        start = time.perf_counter()
        program = torch.export.export(module.eval(), (tokens,))
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(Path(folder) / "block.pt2"))
        print(f"packaged in {time.perf_counter() - start:.3g} s")
        package = torch._inductor.aoti_load_package(path)
        compare(lambda: module(tokens), lambda: package(tokens), rounds=3 if small else 20)


if __name__ == "__main__":
    main("--small" in sys.argv)
