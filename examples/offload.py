"""Tokens after 32768 whose keys lie in files, loaded ("sdpa") or attended there ("elsa"): python examples/offload.py [--small].

Random weights, two layers as wide as LLaMA-1B's; needs transformers, and half a gigabyte of the user's cache folder while it runs.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaModel

from elsa_tune.integrations.transformers import OffloadedCache, register
from in_turns import by, compare, filled

WIDE: dict[str, Any] = dict(hidden_size=2048, intermediate_size=8192, num_attention_heads=32, vocab_size=99)
SMALL: dict[str, Any] = dict(hidden_size=128, intermediate_size=64, num_attention_heads=8, vocab_size=99)
TOKENS = 4


def main(small: bool) -> None:
    """Compare two caches that are filled alike and grow alike, a way each, no byte of full chunks in memory."""
    register()
    before = 64 if small else 32768
    options = dict(num_hidden_layers=2, num_key_value_heads=8, max_position_embeddings=2 * before)
    config = LlamaConfig(**(SMALL if small else WIDE), **options)
    torch.manual_seed(0)
    model = LlamaModel(config).eval()
    ways = []
    for implementation in ("sdpa", "elsa"):
        torch.manual_seed(1)
        cache = filled(OffloadedCache(0, config, chunk=16 if small else 4096), config, before)

        def call(cache: OffloadedCache = cache) -> Tensor:
            tokens = torch.arange(TOKENS).view(-1, 1, 1)
            return torch.cat([model(input_ids=x, past_key_values=cache).last_hidden_state for x in tokens])

        ways.append(by(implementation, model, call))
    compare(*ways, rounds=3 if small else 10, tokens=TOKENS)


if __name__ == "__main__":
    main("--small" in sys.argv)
