"""BERT-base of 8 texts that fill half of 512 tokens, "sdpa" and "elsa": python examples/bert.py [--small]. Needs transformers."""

from __future__ import annotations

import sys

import torch
from torch import Tensor
from transformers import BertConfig, BertModel

from elsa_tune.integrations.transformers import register
from in_turns import by, compare

SMALL = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=99)


def main(small: bool) -> None:
    """Compare torch's attention, which reads padding, with ours, which is told the lengths."""
    register()
    torch.manual_seed(0)
    config = BertConfig(**SMALL) if small else BertConfig()
    model = BertModel(config, add_pooling_layer=False).eval()
    longest = 32 if small else 512
    lengths = torch.linspace(longest // 8, longest - longest // 8, 8).long()  # half of the longest on average
    padding = (torch.arange(longest) < lengths[:, None]).long()
    tokens = torch.randint(config.vocab_size, padding.shape)

    def call() -> Tensor:
        output = model(input_ids=tokens, attention_mask=padding).last_hidden_state
        return output * padding[..., None]  # what is computed of padding is nobody's

    compare(by("sdpa", model, call), by("elsa", model, call), rounds=3 if small else 5)


if __name__ == "__main__":
    main("--small" in sys.argv)
