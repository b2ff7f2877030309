"""Swin-T of timm, patched: python examples/swin.py [--small]. Random weights; needs timm."""

from __future__ import annotations

import sys
from copy import deepcopy
from typing import Any

import timm
import torch

from elsa_tune.integrations.timm import patch
from in_turns import compare

SMALL: dict[str, Any] = dict(img_size=32, patch_size=2, window_size=4, embed_dim=32, depths=(2, 2), num_heads=(2, 4))


def main(small: bool) -> None:
    """Compare a model with a patched copy of it."""
    torch.manual_seed(0)
    model = timm.create_model("swin_tiny_patch4_window7_224", **(SMALL if small else {})).eval()
    patched = patch(deepcopy(model))
    size = 32 if small else 224
    images = torch.randn(1 if small else 4, 3, size, size)
    compare(lambda: model(images), lambda: patched(images), rounds=3 if small else 10)


if __name__ == "__main__":
    main("--small" in sys.argv)
