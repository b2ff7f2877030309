"""The memory that models hand to attention: tiny random transformers and timm models, every distinct call they make.

Prints the table of docs/memory-orders.md. Nothing is downloaded: models are built from configurations of their classes,
small in every size that has no say in the order of memory.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

LENGTH = 10
CAPACITY = 16
"""Rows of a static cache."""

Run = Callable[[], object]


def memory_order(x: Tensor) -> str:
    """How a [batch, heads, length, dim] tensor lies in memory; strides, in elements, where no name fits.

    A dimension of one element has no say: one query of a transposed view is contiguous too.
    """
    heads, length, dim = x.shape[1:]
    rows, head_rows = x.stride(2) if length > 1 else x.stride(0), x.stride(1)

    def lies(*strides: int) -> bool:
        return all(size == 1 or real == wanted for size, real, wanted in zip(x.shape, x.stride(), strides, strict=True))

    if x.is_contiguous():
        return "bhsd"
    if lies(length * heads * dim, dim, heads * dim, 1):
        return "bshd"
    if rows > heads * dim and lies(length * rows, dim, rows, 1):
        return f"fused, {rows} a row"
    if head_rows > length * dim and lies(heads * head_rows, head_rows, dim, 1):
        return f"cache of {head_rows // dim}"
    return f"strides {tuple(x.stride())}"


class LastWriters(TorchDispatchMode):
    """Remembers of each storage the operator that wrote it last, and how many operators ran since."""

    def __init__(self) -> None:
        super().__init__()
        self._writes: dict[int, tuple[str, int]] = {}
        self._now = 0

    def __torch_dispatch__(
        self, operator: Any, types: Any, arguments: Sequence[Any] = (), options: dict[str, Any] | None = None
    ) -> Any:
        found = operator(*arguments, **(options or {}))
        schema = operator._schema
        writes = any(a.alias_info and a.alias_info.is_write for a in schema.arguments)
        view = any(r.alias_info for r in schema.returns) or schema.name == "aten::_unsafe_view"
        if writes or not view:
            self._now += 1
            for x in tree_leaves(found):
                if isinstance(x, Tensor):
                    self._writes[x.untyped_storage().data_ptr()] = schema.name.removeprefix("aten::"), self._now
        return found

    def of(self, x: Tensor) -> str:
        """The operator and, if others ran since, how many."""
        name, when = self._writes.get(x.untyped_storage().data_ptr(), ("before the call", self._now))
        return f"{name} -{self._now - when}" if self._now > when else name


@dataclass(frozen=True)
class Posed:
    """One call of scaled_dot_product_attention as a row of the table."""

    shapes: str
    orders: str
    output: str
    options: str
    writers: str


@dataclass
class Recorder:
    """Stands in for scaled_dot_product_attention, serves by it, and keeps every distinct call in order."""

    serve: Callable[..., Tensor]
    writers: LastWriters
    calls: dict[Posed, int] = field(default_factory=dict)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *arguments: Any, **options: Any) -> Tensor:
        names = ("attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
        given = {**dict(zip(names, arguments, strict=False)), **options}
        said = [name for name in ("is_causal", "enable_gqa") if given.get(name)]
        if given.get("scale") is not None:
            said.append(
                "scale 1" if given["scale"] == 1 else "scale" if given["scale"] != query.shape[-1] ** -0.5 else ""
            )
        if (mask := given.get("attn_mask")) is not None:
            where = "" if mask.is_contiguous() else f", strides {tuple(mask.stride())}"
            said.append(f"mask {str(mask.dtype).removeprefix('torch.')} {list(mask.shape)}{where}")
        operands = (query, key, value)
        writers = [self.writers.of(x) for x in operands]
        out = self.serve(query, key, value, *arguments, **options)
        shape = [f"`{list(x.shape)}`" for x in operands]
        orders = [memory_order(x) for x in operands]
        row = Posed(
            shapes=" ".join(dict.fromkeys(shape)), orders=orders[0] if len(set(orders)) == 1 else " - ".join(orders),
            output=memory_order(out), options=", ".join(filter(None, said)) or "none", writers=", ".join(writers),
        )  # fmt: skip
        self.calls[row] = self.calls.get(row, 0) + 1
        return out


@contextmanager
def recorded() -> Iterator[Recorder]:
    """Record what models ask of torch.nn.functional.scaled_dot_product_attention meanwhile."""
    functional = torch.nn.functional
    with LastWriters() as writers, torch.no_grad():  # under inference_mode the mode would see composite operators
        recorder = Recorder(functional.scaled_dot_product_attention, writers)
        with mock.patch.object(functional, "scaled_dot_product_attention", recorder):
            yield recorder


def _tokens(length: int = LENGTH, batch: int = 2) -> Tensor:
    return torch.arange(batch * length).reshape(batch, length) % 50


def _decoding(model: Any, static: bool = False, seen: Tensor | None = None) -> Run:
    """A prompt and then two tokens, one at a time; ``seen`` [batch, LENGTH] is 0 where the prompt is padding."""

    def run() -> None:
        import transformers

        made = partial(transformers.StaticCache, max_cache_len=CAPACITY) if static else transformers.DynamicCache
        cache = made(config=model.config)
        known = seen
        for length in (LENGTH, 1, 1):
            model(input_ids=_tokens(length), past_key_values=cache, use_cache=True, attention_mask=known)
            known = None if known is None else torch.cat([known, known.new_ones(2, 1)], 1)

    return run


def transformers_models() -> Iterator[tuple[str, Run]]:
    """Name of a row and what to run for it."""
    import transformers as t

    sizes: dict[str, Any] = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    text: dict[str, Any] = dict(vocab_size=50, pad_token_id=0)
    image: dict[str, Any] = dict(image_size=16, patch_size=4)
    pixels, grouped = torch.randn(2, 3, 16, 16), dict(num_key_value_heads=2, max_position_embeddings=64)

    def build(name: str, **options: Any) -> Any:
        config = getattr(t, f"{name}Config")(**options)
        return getattr(t, f"{name}Model")._from_config(config, attn_implementation="sdpa").eval()

    everything = torch.ones(2, LENGTH, dtype=torch.long)
    padded = everything.clone()
    padded[1, :3] = 0
    for name in ("Bert", "Roberta", "ModernBert"):
        more = dict(cls_token_id=1, sep_token_id=2, eos_token_id=2, bos_token_id=1) if name == "ModernBert" else {}
        encoder = build(name, **sizes, **text, **more)
        yield f"{name}, no mask given", partial(encoder, input_ids=_tokens())
        yield f"{name}, mask of ones", partial(encoder, input_ids=_tokens(), attention_mask=everything)
        yield f"{name}, padded", partial(encoder, input_ids=_tokens(), attention_mask=padded)
    for name in ("ViT", "Dinov2"):
        yield name, partial(build(name, **sizes, **image), pixel_values=pixels)
    clip = build(
        "CLIP", projection_dim=16, text_config={**sizes, **text, "max_position_embeddings": 32},
        vision_config={**sizes, **image},
    )  # fmt: skip
    yield "CLIP vision", partial(clip.vision_model, pixel_values=pixels)
    yield "CLIP text", partial(clip.text_model, input_ids=_tokens())
    for name in ("Llama", "Qwen2", "Qwen3", "Mistral", "Gemma", "Phi3", "GPTNeoX"):
        more = {} if name == "GPTNeoX" else grouped
        if name in ("Gemma", "Qwen3"):
            more = {**more, "head_dim": 8}
        decoder = build(name, **sizes, **text, **more)
        yield f"{name}, prefill without a cache", partial(decoder, input_ids=_tokens(), use_cache=False)
        yield f"{name}, prefill and decoding, DynamicCache", _decoding(decoder)
        yield f"{name}, prefill and decoding, StaticCache", _decoding(decoder, static=True)
        if name == "Llama":
            yield f"{name}, the same, DynamicCache, mask of ones", _decoding(decoder, seen=everything)
            yield f"{name}, the same, DynamicCache, padded", _decoding(decoder, seen=padded)
    windowed = build("Mistral", **sizes, **text, **grouped, sliding_window=4)
    yield "Mistral past its window of 4, DynamicCache", _decoding(windowed)
    gpt2 = build("GPT2", n_embd=32, n_layer=2, n_head=4, n_positions=32, vocab_size=50)
    yield "GPT2, prefill without a cache", partial(gpt2, input_ids=_tokens(), use_cache=False)
    yield "GPT2, prefill and decoding, DynamicCache", _decoding(gpt2)
    t5 = build("T5", d_model=32, d_kv=8, num_heads=4, num_layers=2, d_ff=48, vocab_size=50, decoder_start_token_id=0)
    yield "T5", partial(t5, input_ids=_tokens(), decoder_input_ids=_tokens(4), use_cache=False)
    whisper = build(
        "Whisper", d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=8, max_source_positions=12, max_target_positions=20,
        vocab_size=50, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip

    def speak() -> None:
        heard = whisper.encoder(torch.randn(2, 8, 24))
        cache = t.EncoderDecoderCache(t.DynamicCache(), t.DynamicCache())
        for length in (4, 1):
            whisper.decoder(input_ids=_tokens(length), encoder_hidden_states=heard[0], past_key_values=cache)

    yield "Whisper, encoder, decoder with a cache", speak


def timm_models() -> Iterator[tuple[str, Run]]:
    """Name of a row and what to run for it."""
    import timm

    small = dict(img_size=32, depth=2, embed_dim=32, num_heads=4, num_classes=0)
    swin = dict(img_size=56, patch_size=4, embed_dim=32, depths=(2,), num_heads=(4,), window_size=7, num_classes=0)
    for name, options in (
        ("vit_base_patch16_224", small), ("deit_base_patch16_224", small), ("eva02_base_patch14_224", {**small, "img_size": 28}),
        ("eva_giant_patch14_224", {**small, "img_size": 28}), ("swin_tiny_patch4_window7_224", swin),
    ):  # fmt: skip
        model = timm.create_model(name, **options).eval()
        size = int(options["img_size"])  # type: ignore[call-overload]
        yield f"timm {name}", partial(model, torch.randn(2, 3, size, size))
    timm.layers.set_fused_attn(True, experimental=True)
    try:
        size = int(swin["img_size"])  # type: ignore[call-overload]
        model = timm.create_model("swin_tiny_patch4_window7_224", **swin).eval()
        yield (
            "timm swin_tiny_patch4_window7_224, set_fused_attn(experimental=True)",
            partial(model, torch.randn(2, 3, size, size)),
        )
    finally:
        timm.layers.set_fused_attn(True)


def without_torchvision() -> mock._patch_dict:
    """A stand-in for torchvision, whose wheels on PyPI do not import beside a torch for CPUs; models need none of it."""
    import sys

    names = (
        "",
        ".transforms",
        ".transforms.functional",
        ".ops",
        ".ops.misc",
        ".models",
        ".models.feature_extraction",
        ".datasets",
    )
    return mock.patch.dict(sys.modules, {f"torchvision{n}": mock.MagicMock(__spec__=None, __path__=[]) for n in names})


def rows(models: Iterator[tuple[str, Run]]) -> Iterator[str]:
    """A table row for every distinct call of every model."""
    for name, run in models:
        with recorded() as recorder:
            run()
        if not recorder.calls:
            yield f"| {name} | never calls it: products and softmax of its own | | | | |"
        for posed in recorder.calls:
            yield f"| {name} | {posed.shapes} | {posed.orders} | {posed.output} | {posed.options} | {posed.writers} |"


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    print(
        "| model | query, key, value [batch, heads, length, dim] | order | output | asked | written by |\n|---|---|---|---|---|---|"
    )
    for line in rows(transformers_models()):
        print(line)
    try:
        with without_torchvision():
            for line in rows(timm_models()):
                print(line)
    except ImportError as error:
        print(f"\ntimm is not asked: {error}")


if __name__ == "__main__":
    main()
