"""Tokens after 8192 of two layers as wide as LLaMA-1B's, "sdpa" and "elsa": python examples/llama_decode.py [--small]. Needs transformers."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from elsa_tune.integrations.transformers import register
from in_turns import by, compare, filled

WIDE: dict[str, Any] = dict(hidden_size=2048, intermediate_size=8192, num_attention_heads=32, vocab_size=32000)
SMALL: dict[str, Any] = dict(hidden_size=128, intermediate_size=64, num_attention_heads=8, vocab_size=99)
TOKENS = 8


def main(small: bool) -> None:
    """Compare greedy decoding behind the same random cache, which every call leaves as it was."""
    register()
    torch.manual_seed(0)
    before = 64 if small else 8192
    options = dict(num_hidden_layers=2, num_key_value_heads=8, max_position_embeddings=2 * before)
    config = LlamaConfig(**(SMALL if small else WIDE), **options)
    model = LlamaForCausalLM(config).eval()
    cache = filled(DynamicCache(config=config), config, before)

    def call() -> Tensor:
        chosen, logits = torch.tensor([[1]]), []
        for _ in range(TOKENS):
            logits.append(model(input_ids=chosen, past_key_values=cache).logits)
            chosen = logits[-1].argmax(-1)
        cache.crop(-TOKENS)
        return torch.cat(logits)

    compare(by("sdpa", model, call), by("elsa", model, call), rounds=3 if small else 10, tokens=TOKENS)


if __name__ == "__main__":
    main("--small" in sys.argv)
