"""A training step of a small LLaMA, "sdpa" and "elsa": python examples/training_step.py [--small]. Random weights; needs transformers."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from elsa_tune.integrations.transformers import register
from in_turns import by, compare

WIDE: dict[str, Any] = dict(hidden_size=512, intermediate_size=1024, num_attention_heads=8, vocab_size=8000)
SMALL: dict[str, Any] = dict(hidden_size=64, intermediate_size=64, num_attention_heads=4, vocab_size=99)


def main(small: bool) -> None:
    """Compare loss and gradients of padded texts: both passes are ours where they were tuned."""
    register()
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **(SMALL if small else WIDE)))
    longest = 32 if small else 1024
    padding = torch.arange(longest) < torch.tensor([longest, longest // 2])[:, None]
    tokens = torch.randint(model.config.vocab_size, padding.shape)
    labels = tokens.masked_fill(~padding, -100)

    def call() -> Tensor:
        model.zero_grad()
        loss = model(input_ids=tokens, attention_mask=padding, labels=labels, use_cache=False).loss
        loss.backward()
        return torch.cat([loss.detach()[None], *(x.grad.flatten() for x in model.parameters())])

    compare(by("sdpa", model, call), by("elsa", model, call), rounds=3 if small else 5, gradients=True)


if __name__ == "__main__":
    main("--small" in sys.argv)
