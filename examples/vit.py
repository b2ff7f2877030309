"""ViT-B/16 of transformers in elsa_tune.sdpa(): python examples/vit.py [--small]. Random weights; needs transformers."""

from __future__ import annotations

import sys

import torch
from torch import Tensor
from transformers import ViTConfig, ViTModel

import elsa_tune
from in_turns import compare

SMALL = dict(
    image_size=32, patch_size=8, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
)


def main(small: bool) -> None:
    """Compare a model outside the scope and inside."""
    torch.manual_seed(0)
    config = ViTConfig(**SMALL) if small else ViTConfig(image_size=384)
    model = ViTModel(config, add_pooling_layer=False).eval()
    images = torch.randn(1, 3, config.image_size, config.image_size)

    def before() -> Tensor:
        return model(images).last_hidden_state

    compare(before, elsa_tune.sdpa()(before), rounds=3 if small else 10)


if __name__ == "__main__":
    main("--small" in sys.argv)
