"""transformers' models with attn_implementation="elsa": what they compute as their own attention does, and which masks arrive."""

from __future__ import annotations

import copy
import errno
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import elsa_tune
from elsa_tune import masks
from elsa_tune.dispatch import ledger, serving
from elsa_tune.errors import NoRoom, WrongArguments
from elsa_tune.generate import backends
from elsa_tune.generate.backends import Gradients, Kernel
from elsa_tune.integrations.deferred import Deferred
from elsa_tune.integrations.transformers import Mask, OffloadedCache, mask, offloaded, register
from elsa_tune.integrations.transformers.rows import Rows, Seen
from elsa_tune.problem import Problem
from elsa_tune.space import parse
from tests.test_dispatch import VARIANT

transformers.logging.set_verbosity_error()
register()
pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")  # what transformers 5.40 calls otherwise

COMMON: dict[str, Any] = dict(
    hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=99, max_position_embeddings=256,
    pad_token_id=0, bos_token_id=1, eos_token_id=98,
)  # fmt: skip
GROUPED = dict(COMMON, num_key_value_heads=2, head_dim=16)
EXPERTS: dict[str, Any] = dict(num_local_experts=2, num_experts_per_tok=1)
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", GROUPED),
    "mistral": ("MistralConfig", dict(GROUPED, sliding_window=8)),
    "qwen": ("Qwen3Config", GROUPED),
    "gemma2": ("Gemma2Config", dict(GROUPED, sliding_window=8)),
    "gpt_oss": ("GptOssConfig", dict(GROUPED, sliding_window=8, **EXPERTS)),
    "llama4": ("Llama4TextConfig", dict(GROUPED, attention_chunk_size=8, intermediate_size_mlp=64, **EXPERTS)),
}
BATCH, LENGTH = 3, 24
TOKENS = torch.randint(2, 98, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
LEFT = torch.ones(BATCH, LENGTH, dtype=torch.long)
LEFT[0, :7] = LEFT[2, :1] = 0
RIGHT = LEFT.flip(1)
HOLES = LEFT * (torch.arange(LENGTH) != 15)
PADDINGS = {"none": torch.ones_like(LEFT), "left": LEFT, "right": RIGHT, "holes": HOLES}
PADDED = [
    (name, padding) for name in DECODERS for padding in PADDINGS if name == "llama" or padding in ("none", "left")
]


def _causal(b: Any, h: Any, q: Any, k: Any) -> Any:
    return k <= q


def _window(b: Any, h: Any, q: Any, k: Any) -> Any:
    return (k <= q) & (k > q - 8)


def _chunks(b: Any, h: Any, q: Any, k: Any) -> Any:
    return (k <= q) & (k // 8 == q // 8)


PACKED = torch.cat([torch.arange(9), torch.arange(15)])[None].expand(BATCH, -1)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Problem], tuple[str, Kernel | Gradients]]]:
    """Kernels of ours for whatever is posed, built once for each problem's family."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ELSA_TUNE_HOME", str(tmp_path_factory.mktemp("transformers") / "home"))
        backend = backends.get("cpp")

        @cache
        def built(problem: Problem) -> tuple[str, Kernel | Gradients]:
            variant = parse(VARIANT)
            return VARIANT, backend.load(backend.build(variant, problem), variant, problem)

        yield built


@pytest.fixture
def ours(
    kernels: Callable[[Problem], tuple[str, Kernel | Gradients]], monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """A kernel of ours serves every problem."""

    def ready(problem: Problem | None, query: Tensor, ready: object) -> tuple[str, Kernel | Gradients | None]:
        return kernels(problem) if problem and problem.direction == "forward" else ("", None)

    monkeypatch.setattr(serving, "_ready_kernel", ready)
    serving.refresh()
    ledger.forget()
    yield
    monkeypatch.undo()
    serving.refresh()


def families() -> dict[str, int]:
    """Calls by family since the last time, all of which a kernel of ours answered."""
    found: dict[str, int] = {}
    for row in elsa_tune.served():
        assert row.kernel != ledger.TORCH, row
        family = row.problem.split("@")[0].removeprefix("fp32.d16").removeprefix(".")
        found[family] = found.get(family, 0) + row.calls
    ledger.forget()
    serving.refresh()
    return found


def decoder(name: str) -> Any:
    kind, options = DECODERS[name]
    torch.manual_seed(1)
    config = getattr(transformers, kind)(**options)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def of(model: Any, implementation: str, **inputs: Any) -> Any:
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        return model(**inputs)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=3e-6)


EXPECTED = {
    "none": {"llama": {"causal": 2}, "mistral": {"causal+window": 2}, "llama4": {"ranges": 2}},
    "left": {
        "llama": {"causal+lengths+starts": 2},
        "mistral": {"causal+lengths+starts+window": 2},
        "gemma2": {"causal+lengths+starts+window.softcap": 1, "causal+lengths+starts.softcap": 1},
        "gpt_oss": {"causal+lengths+starts+window.sinks": 1, "causal+lengths+starts.sinks": 1},
        "llama4": {"ranges": 2},
    },
    "right": {"llama": {"causal+lengths": 2}},
    "holes": {"llama": {"causal+dense": 2}},
}


@pytest.mark.parametrize("name, padding", PADDED)
def test_decoders_compute_what_they_are_written_to(ours: None, name: str, padding: str) -> None:
    model, inputs = decoder(name), dict(input_ids=TOKENS, attention_mask=PADDINGS[padding])
    expected, found = (of(model, one, **inputs).logits for one in ("eager", "elsa"))
    seen = PADDINGS[padding].bool()
    close(found[seen], expected[seen])
    served = families()
    assert sum(served.values()) == 2
    assert served == EXPECTED[padding].get(name, served)


@pytest.mark.parametrize("cache_kind", [None, "static"])
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("name", DECODERS)
def test_greedy_decoding_chooses_the_same_tokens(ours: None, name: str, padding: str, cache_kind: str | None) -> None:
    model = decoder(name)
    options: dict[str, Any] = dict(
        input_ids=TOKENS, attention_mask=PADDINGS[padding], max_new_tokens=12, do_sample=False, eos_token_id=None,
        cache_implementation=cache_kind,
    )  # fmt: skip
    expected = model.generate(**options)
    model.set_attn_implementation("elsa")
    assert torch.equal(model.generate(**options), expected)
    assert sum(families().values()) == 2 * 12


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen", "gemma2", "llama4"])
def test_packed_sequences_do_not_see_each_other(ours: None, name: str) -> None:
    model, inputs = decoder(name), dict(input_ids=TOKENS, position_ids=PACKED, use_cache=False)
    expected, found = (of(model, one, **inputs).logits for one in ("eager", "elsa"))
    close(found, expected)
    served = families()
    assert all(family.startswith("ranges") for family in served) and sum(served.values()) == 2


@pytest.mark.parametrize("how", ["by kernels", "by torch", "compiled", "offloaded"])
@pytest.mark.parametrize("name", ["llama", "mistral", "llama4"])
def test_sequences_may_be_told_as_flash_attention_is_told_them(ours: None, name: str, how: str, tmp_path: Path) -> None:
    """Without position_ids, of which the mask would tell them; chunks and windows count as the mask has them, from the row's first token."""
    model, cu = decoder(name), torch.tensor([0, 8, LENGTH], dtype=torch.int32)
    told = dict(cu_seq_lens_q=cu, cu_seq_lens_k=cu, max_length_q=16, max_length_k=16)
    same = torch.block_diag(torch.ones(8, 8), torch.ones(16, 16)).bool()[None, None]
    function = _window if name == "mistral" else _chunks if name == "llama4" else _causal
    seen = same & transformers.AttentionMaskInterface()["sdpa"](
        batch_size=1, q_length=LENGTH, kv_length=LENGTH, mask_function=function, allow_is_causal_skip=False
    )
    hidden = torch.where(seen, 0.0, -torch.inf)
    if name == "llama4":
        expected = of(
            model, "eager", input_ids=TOKENS[:1], attention_mask={"full_attention": hidden, "chunked_attention": hidden}
        ).logits
    else:
        expected = of(model, "eager", input_ids=TOKENS[:1], attention_mask=hidden).logits
    inputs: dict[str, Any] = dict(input_ids=TOKENS[:1], use_cache=how == "offloaded", **told)
    if how == "offloaded":
        inputs["past_key_values"] = OffloadedCache(0, chunk=5, folder=tmp_path)
    if how == "by torch":
        monkey = pytest.MonkeyPatch()
        monkey.setattr(serving, "_ready_kernel", lambda *_: ("", None))
        serving.refresh()
        found = of(model, "elsa", **inputs).logits
        monkey.undo()
    elif how == "compiled":
        torch._dynamo.reset()
        model.set_attn_implementation("elsa")
        with torch.no_grad():
            found = torch.compile(model, backend="eager", fullgraph=True)(**inputs).logits
    else:
        found = of(model, "elsa", **inputs).logits
    close(found, expected)


def test_sequences_that_are_told_wrongly_are_refused() -> None:
    module, x, cu = torch.nn.Identity(), torch.randn(1, 2, 4, 16), torch.tensor([0, 4])
    attend = transformers.AttentionInterface()["elsa"]
    for told, word in (
        (dict(cu_seq_lens_q=cu), "cu_seq_lens_k"),
        (dict(cu_seq_lens_q=[0, 4], cu_seq_lens_k=cu), "cu_seq_lens_q"),
        (dict(cu_seq_lens_q=cu, cu_seq_lens_k=torch.tensor([0, 2, 4])), "as many"),
    ):
        with pytest.raises(WrongArguments, match=word):
            attend(module, x, x, x, None, **told)


def test_causality_does_not_depend_on_what_a_module_says_of_itself() -> None:
    """Decoders that were never written for torch's function do not say that they are causal."""
    found = mask(batch_size=1, q_length=6, kv_length=6)
    module = torch.nn.Identity()
    module.is_causal = False
    x = torch.randn(1, 2, 6, 16)
    answer, _ = transformers.AttentionInterface()["elsa"](module, x, x, x, found)
    close(answer.transpose(1, 2), torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True))


@pytest.mark.parametrize(("config", "is_none"), [("LlamaConfig", True), ("NllbMoeConfig", False), ("dict", False)])
def test_compiled_causality_is_left_to_modules_that_tell_it(config: str, is_none: bool) -> None:
    made = getattr(transformers, config, dict)()
    compiled = torch.compile(lambda x: mask(1, len(x), len(x), config=made), backend="eager", fullgraph=True)
    found = compiled(torch.ones(6))
    assert (found is None) is is_none and (is_none or torch.equal(found[0, 0], torch.ones(6, 6).tril().bool()))


def test_encoders_do_not_become_causal_where_their_modules_say_nothing() -> None:
    """Splinter's attention was never written for torch's function, and has no is_causal."""
    torch.manual_seed(1)
    config = transformers.SplinterConfig(**COMMON)
    model = transformers.SplinterModel._from_config(config, attn_implementation="eager").eval()
    for padding in (None, RIGHT):
        inputs = dict(input_ids=TOKENS, attention_mask=padding)
        expected, found = (of(model, one, **inputs).last_hidden_state for one in ("eager", "elsa"))
        seen = slice(None) if padding is None else padding.bool()
        close(found[seen], expected[seen])


@pytest.mark.parametrize("shape", [(1, 1, 6, 5), (1, 1, 5, 6)])
def test_a_mask_of_other_lengths_is_refused_as_torch_refuses_it(ours: None, shape: tuple[int, ...]) -> None:
    found = mask(batch_size=1, q_length=shape[2], kv_length=shape[3], allow_is_causal_skip=False)
    x = torch.randn(1, 2, 6, 16)
    with pytest.raises((ValueError, RuntimeError)):
        transformers.AttentionInterface()["elsa"](torch.nn.Identity(), x, x, x, found)


def test_masks_of_other_kinds_are_told_by_name() -> None:
    x, attend = torch.randn(1, 2, 6, 16), transformers.AttentionInterface()["elsa"]
    with pytest.raises(WrongArguments, match=r"attention_mask is torch.int64"):
        attend(torch.nn.Identity(), x, x, x, torch.ones(1, 1, 6, 6, dtype=torch.long))
    with pytest.raises(WrongArguments, match=r"attention_mask is \[2, 6\]"):
        mask(batch_size=3, q_length=6, kv_length=6, attention_mask=torch.ones(2, 6, dtype=torch.bool))


def _bert() -> tuple[Any, dict[str, Any]]:
    model = transformers.BertModel._from_config(transformers.BertConfig(**COMMON), attn_implementation="eager")
    return model, dict(input_ids=TOKENS, attention_mask=RIGHT)


def _modernbert() -> tuple[Any, dict[str, Any]]:
    config = transformers.ModernBertConfig(
        **COMMON, local_attention=8, global_attn_every_n_layers=2, cls_token_id=1, sep_token_id=2
    )
    model = transformers.ModernBertModel._from_config(config, attn_implementation="eager")
    return model, dict(input_ids=TOKENS, attention_mask=RIGHT)


@pytest.mark.parametrize("make, right", [(_bert, {"lengths": 2}), (_modernbert, {"lengths": 1, "lengths+window": 1})])
@pytest.mark.parametrize("padding", PADDINGS)
def test_encoders_compute_what_they_are_written_to(
    ours: None, make: Callable[[], tuple[Any, dict[str, Any]]], right: dict[str, int], padding: str
) -> None:
    torch.manual_seed(1)
    model, inputs = make()
    model.eval()
    inputs["attention_mask"] = PADDINGS[padding]
    expected, found = (of(model, one, **inputs).last_hidden_state for one in ("eager", "elsa"))
    seen = PADDINGS[padding].bool()
    close(found[seen], expected[seen])
    served = families()
    assert served == (right if padding == "right" else served) and sum(served.values()) == 2


def _t5() -> tuple[Any, dict[str, Any]]:
    config = transformers.T5Config(
        d_model=64, d_kv=16, d_ff=64, num_layers=2, num_heads=4, vocab_size=99, pad_token_id=0, decoder_start_token_id=0, dropout_rate=0.0,
    )  # fmt: skip
    inputs = dict(input_ids=TOKENS, attention_mask=RIGHT, decoder_input_ids=TOKENS[:, :9])
    return transformers.T5Model._from_config(config, attn_implementation="eager"), inputs


def _vit() -> tuple[Any, dict[str, Any]]:
    config = transformers.ViTConfig(**COMMON | dict(image_size=32, patch_size=8))
    model = transformers.ViTModel._from_config(config, attn_implementation="eager")
    return model, dict(pixel_values=torch.randn(2, 3, 32, 32))


def _clip() -> tuple[Any, dict[str, Any]]:
    text = {**COMMON, "projection_dim": 16, "max_position_embeddings": 32}
    seeing = dict(text, image_size=32, patch_size=8)
    model = transformers.CLIPModel._from_config(
        transformers.CLIPConfig(text_config=text, vision_config=seeing), attn_implementation="eager"
    )
    images = torch.randn(BATCH, 3, 32, 32)
    return model, dict(input_ids=TOKENS, attention_mask=RIGHT, pixel_values=images)


def _whisper() -> tuple[Any, dict[str, Any]]:
    config = transformers.WhisperConfig(
        d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64,
        decoder_ffn_dim=64, vocab_size=99, num_mel_bins=8, max_source_positions=30, max_target_positions=40, pad_token_id=0,
        bos_token_id=1, eos_token_id=98, decoder_start_token_id=1,
    )  # fmt: skip
    inputs = dict(input_features=torch.randn(BATCH, 8, 60), decoder_input_ids=TOKENS)
    return transformers.WhisperModel._from_config(config, attn_implementation="eager"), inputs


def _swin() -> tuple[Any, dict[str, Any]]:
    config = transformers.SwinConfig(
        image_size=32, patch_size=2, embed_dim=32, depths=[2, 2], num_heads=[2, 4], window_size=4
    )
    model = transformers.SwinModel._from_config(config, attn_implementation="eager")
    return model, dict(pixel_values=torch.randn(2, 3, 32, 32))


@pytest.mark.parametrize(
    "make, calls",
    [
        (_t5, {"lengths.bias": 4, "causal.bias": 2}),
        (_vit, {"": 2}),
        (_clip, {"": 2, "causal+lengths": 2}),
        (_whisper, {"": 4, "causal": 2}),
        (_swin, {"bias": 4}),
    ],
)
def test_models_of_other_kinds_compute_what_they_are_written_to(
    ours: None, make: Callable[[], tuple[Any, dict[str, Any]]], calls: dict[str, int]
) -> None:
    torch.manual_seed(1)
    model, inputs = make()
    model.eval()
    expected, found = (of(model, one, **inputs)[0] for one in ("eager", "elsa"))
    close(found, expected)
    assert families() == calls


@pytest.mark.parametrize("make", [_bert, _modernbert, _t5, _vit, _clip, _whisper, _swin])
def test_a_training_step_of_other_models_is_the_same(
    ours: None, make: Callable[[], tuple[Any, dict[str, Any]]]
) -> None:
    """Biases that are learned among them, which get gradients, too."""
    torch.manual_seed(1)
    model, inputs = make()
    for part in model.modules():  # which is random
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    model.train()
    seen = RIGHT.bool() if make in (_bert, _modernbert) else slice(None)
    found = {}
    for one in ("eager", "elsa"):
        model.set_attn_implementation(one)
        model.zero_grad()
        loss = model(**inputs)[0][seen].square().mean()
        loss.backward()
        found[one] = {"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found["eager"].keys() == found["elsa"].keys() and len(found["eager"]) > 10
    for name, expected in found["eager"].items():
        scale = max(1.0, float(expected.abs().max()))
        close(found["elsa"][name] / scale, expected / scale)


def generating_t5() -> tuple[Any, dict[str, Any], Tensor]:
    """An encoder and decoder set to "elsa", what it is asked for, and what it generates by its own attention."""
    torch.manual_seed(1)
    options = dict(d_model=64, vocab_size=99, pad_token_id=0, decoder_start_token_id=0)
    config = transformers.T5Config(**options, d_kv=16, d_ff=64, num_layers=2, num_heads=4)
    model = transformers.T5ForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    asked: dict[str, Any] = dict(
        input_ids=TOKENS, attention_mask=RIGHT, max_new_tokens=9, do_sample=False, eos_token_id=None
    )
    expected = model.generate(**asked)
    model.set_attn_implementation("elsa")
    return model, asked, expected


def test_an_encoder_and_decoder_choose_the_same_tokens(ours: None) -> None:
    model, asked, expected = generating_t5()
    assert torch.equal(model.generate(**asked), expected)
    assert families()["lengths.bias"] == 2 + 2 * 9


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("how", ["right", "packed", "checkpointed"])
def test_a_training_step_is_the_same(ours: None, name: str, how: str) -> None:
    model = decoder(name).train()
    inputs: dict[str, Any] = (
        dict(position_ids=PACKED, use_cache=False) if how == "packed" else dict(attention_mask=RIGHT)
    )
    labels = TOKENS if how == "packed" else TOKENS.masked_fill(RIGHT == 0, -100)
    if how == "checkpointed":
        model.gradient_checkpointing_enable()
    found = {}
    for one in ("eager", "elsa"):
        model.set_attn_implementation(one)
        model.zero_grad()
        loss = model(input_ids=TOKENS, labels=labels, **inputs).loss
        loss.backward()
        found[one] = [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
    assert len(found["eager"]) == len(found["elsa"]) > 10
    for a, b in zip(*found.values(), strict=True):
        close(a, b)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_a_compiled_model_is_one_graph(ours: None, name: str) -> None:
    model, inputs = decoder(name), dict(input_ids=TOKENS, attention_mask=LEFT)
    expected = of(model, "eager", **inputs).logits[LEFT.bool()]
    model.set_attn_implementation("elsa")
    torch._dynamo.reset()
    with torch.no_grad():
        found = torch.compile(model, backend="aot_eager", fullgraph=True)(**inputs).logits
    close(found[LEFT.bool()], expected)
    assert sum(families().values()) == 2


def test_where_no_kernel_serves_transformers_own_attention_does() -> None:
    ledger.forget()
    serving.refresh()
    model, inputs = decoder("llama"), dict(input_ids=TOKENS, attention_mask=LEFT)
    expected, found = (of(model, one, **inputs).logits for one in ("sdpa", "elsa"))
    assert torch.equal(found, expected)
    (row,) = elsa_tune.served()
    assert (row.kernel, row.calls) == (ledger.TORCH, 2) and ".causal+lengths+starts@" in row.problem


def test_what_cannot_be_done_is_refused_by_name() -> None:
    model = decoder("llama")
    with pytest.raises(WrongArguments, match=r"output_attentions.*eager"):
        of(model, "elsa", input_ids=TOKENS, output_attentions=True)

    def eager_attention_forward(
        module: Any, query: Tensor, key: Tensor, value: Tensor, temperature: Any = None
    ) -> None:
        """A model's own attention, which heeds what nobody else knows."""

    module = type("Attention", (torch.nn.Module,), {"__module__": __name__})()
    globals()["eager_attention_forward"] = eager_attention_forward
    try:
        x = torch.randn(1, 2, 4, 16)
        with pytest.raises(WrongArguments, match="temperature"):
            transformers.AttentionInterface()["elsa"](module, x, x, x, None, temperature=2.0)
    finally:
        del globals()["eager_attention_forward"]


MASKS: dict[str, tuple[Callable[..., Any], str]] = {
    "window": (lambda b, h, q, k: (k <= q) & (k > q - 5), "causal+window@left4.right0"),
    "around": (lambda b, h, q, k: (q - k).abs() <= 3, "window@left3.right3"),
    "prefix": (lambda b, h, q, k: (k <= q) | (k < 4), "ranges"),
    "strided": (lambda b, h, q, k: (q - k) % 3 == 0, ""),
    "backwards": (lambda b, h, q, k: k < 20 - q, ""),
}


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_function_is_recognised_by_what_it_says(name: str) -> None:
    function, spelled = MASKS[name]
    asked = dict(batch_size=2, q_length=20, kv_length=20, mask_function=function, attention_mask=LEFT[:2, :20].bool())
    found = mask(**asked)
    assert found is not None
    expected = transformers.AttentionMaskInterface()["sdpa"](**asked, allow_is_causal_skip=False)
    assert torch.equal(found & True, expected)
    if not spelled:
        assert not isinstance(found, Mask)
        return
    assert isinstance(found, Mask) and str(Seen(found.seen.rows).attn_mask) == spelled
    assert torch.equal(found.seen.attn_mask.dense(2, 1, 20, 20).expand(2, 1, 20, 20), expected)


@pytest.mark.parametrize("offset, length", [(0, 30), (10, 30), (10, 18), (29, 30)])
def test_a_cache_longer_than_what_is_used_is_not_looked_at(offset: int, length: int) -> None:
    """Of a static cache, whose offset is a tensor that is written to before the mask is used."""
    so_far, q_len = torch.tensor(offset), max(1, min(6, length - offset))
    found = mask(batch_size=1, q_length=q_len, kv_length=length, q_offset=so_far, allow_is_causal_skip=False)
    so_far += q_len
    assert isinstance(found, Mask) and found.seen.rows.reach == (0, offset + q_len)
    below = torch.arange(length) <= offset + torch.arange(q_len)[:, None]
    assert torch.equal(found[0, 0], below)


def test_rows_say_what_they_were_made_of() -> None:
    """Whatever grows, in parts, against bools written out."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        batch, q_len, kv_len = (int(torch.randint(1, 9, (1,), generator=generator)) for _ in range(3))
        ends = torch.randint(-2, kv_len + 3, (2, batch, q_len), generator=generator).clamp(0, kv_len)
        low, high = ends.sort(-1).values
        key = torch.arange(kv_len)
        seen = (key >= low[..., None]) & (key < high[..., None])
        rows = Rows.of(seen.split(2, 1))
        if rows is None:
            continue
        first, end = rows.reach
        tokens = torch.rand(batch, kv_len, generator=generator) < 0.8
        for one, truth in ((Seen(rows), seen), (Seen(rows, tokens), seen & tokens[:, None])):
            assert not truth[..., :first].any() and not truth[..., end:].any()
            found = one.attn_mask.dense(batch, 1, q_len, end - first)
            assert torch.equal(found.expand(batch, 1, q_len, -1)[:, 0], truth[..., first:end].expand(batch, -1, -1))
            if kv_len > 1:
                nothing, truth = one.of_keys(1, kv_len).is_nothing, truth[..., 1:].any()
                assert nothing is not bool(truth) if one.tokens is None else not (nothing and truth)


@pytest.mark.parametrize("padding", [None, LEFT[:, :20].bool()])
def test_a_mask_has_the_strides_of_what_it_stands_for(padding: Tensor | None) -> None:
    found = mask(BATCH, 20, 20, attention_mask=padding)
    assert isinstance(found, Mask) and found.stride() == found.made().stride() and found.shape == found.made().shape
    flat = mask(BATCH, 20, 20, attention_mask=padding)
    assert flat is not None and torch.equal(flat.flatten(), found.made().flatten())
    assert torch.equal(flat.contiguous().view(-1), found.made().reshape(-1)) and flat.data_ptr()


def test_a_deferred_tensor_is_made_when_somebody_looks_and_once() -> None:
    made: list[int] = []

    def make() -> Tensor:
        made.append(1)
        return torch.arange(12.0).view(3, 4)

    x = Deferred(make, (3, 4), torch.float32, torch.device("cpu"))
    assert x.shape == (3, 4) and x.contiguous() is x and x.to("cpu") is x and not made
    assert torch.equal(x + 1, torch.arange(12.0).view(3, 4) + 1) and float(x.sum()) == 66 and made == [1]
    assert not x.is_held
    assert torch.equal(x[1], torch.arange(4.0, 8.0)) and x.is_held and made == [1]
    assert torch.equal(copy.deepcopy(x), x.made())
    assert x.tolist() == x.made().tolist() and x.numpy().sum() == 66 and x.share_memory_().is_shared()


def test_a_kernel_is_given_memory_where_a_mask_holds_a_tensor_that_only_stands_for_one(ours: None) -> None:
    seen = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    stands_for = Deferred(lambda: seen, seen.shape, torch.bool, seen.device)
    x = torch.randn(1, 2, 6, 16)
    found = elsa_tune.attention(x, x, x, masks.dense(stands_for))
    close(found, torch.nn.functional.scaled_dot_product_attention(x, x, x, seen))
    assert families() == {"dense": 1}


def test_a_mask_that_was_written_to_means_what_it_holds(ours: None) -> None:
    found = mask(batch_size=1, q_length=6, kv_length=6, allow_is_causal_skip=False)
    assert isinstance(found, Mask)
    found[..., 0] = False
    found[..., 1, 1] = True
    x = torch.randn(1, 2, 6, 16)
    module = torch.nn.Identity()
    answer, _ = transformers.AttentionInterface()["elsa"](module, x, x, x, found, scaling=0.25)
    seen = torch.ones(6, 6, dtype=torch.bool).tril()
    seen[:, 0] = False
    expected = torch.nn.functional.scaled_dot_product_attention(x, x, x, seen[None, None], scale=0.25)
    close(answer.transpose(1, 2), expected)


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt_oss"])
def test_an_offloaded_cache_chooses_the_same_tokens(
    ours: None, name: str, beams: int, padding: str, tmp_path: Path
) -> None:
    model = decoder(name)
    options: dict[str, Any] = dict(
        input_ids=TOKENS, attention_mask=PADDINGS[padding], max_new_tokens=8, do_sample=False, eos_token_id=None, num_beams=beams
    )  # fmt: skip
    expected = model.generate(**options)
    model.set_attn_implementation("elsa")
    for config in (None, model.config):
        kept = OffloadedCache(0, config, chunk=5, folder=tmp_path)
        assert torch.equal(model.generate(**options, past_key_values=kept), expected)
        full = [x for layer in kept.layers for x in getattr(layer, "_full", ())]
        assert all(x.is_elsewhere for x in full) and (full or name == "mistral")
    assert not list(tmp_path.iterdir())
    assert families()


@pytest.mark.parametrize("implementation", ["elsa", "sdpa"])
def test_an_offloaded_cache_goes_on_where_it_was_cropped_or_copied(implementation: str, tmp_path: Path) -> None:
    model = decoder("llama")
    expected = of(model, "eager", input_ids=TOKENS).logits
    kept = OffloadedCache(7000, chunk=5, folder=tmp_path)  # one chunk of one layer, of 3840 bytes
    found = [
        of(model, implementation, input_ids=x, past_key_values=kept).logits for x in (TOKENS[:, :7], TOKENS[:, 7:16])
    ]
    twin = copy.deepcopy(kept)
    of(model, implementation, input_ids=TOKENS[:, :9], past_key_values=kept)
    kept.crop(-9)
    found += [of(model, implementation, input_ids=TOKENS[:, 16:], past_key_values=kept).logits]
    close(torch.cat(found, 1), expected)
    close(of(model, implementation, input_ids=TOKENS[:, 16:], past_key_values=twin).logits, found[-1])
    for one in (kept, twin):
        chunks = [x for layer in one.layers for x in layer._full]
        held = sum(x.bytes for x in chunks if not x.is_elsewhere)
        assert 0 < held <= 7000 and held == one.layers[0]._store.held and len(chunks) == 8
    kept.reset()
    assert kept.get_seq_length() == 0 == kept.layers[0]._store.held
    close(of(model, implementation, input_ids=TOKENS[:, :7], past_key_values=kept).logits, found[0])


def test_an_offloaded_cache_says_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in (dict(budget=-1), dict(budget=1.5), dict(budget=0, chunk=0)):
        with pytest.raises(WrongArguments, match="budget" if "chunk" not in wrong else "chunk"):
            OffloadedCache(**wrong)  # type: ignore[arg-type]

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    model, kept = decoder("llama"), OffloadedCache(0, chunk=5, folder=tmp_path)
    expected = of(model, "eager", input_ids=TOKENS).logits
    of(model, "elsa", input_ids=TOKENS[:, :4], past_key_values=kept)
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "NamedTemporaryFile", full)
        with pytest.raises(NoRoom, match=r"No space left.*another folder"):
            of(model, "elsa", input_ids=TOKENS[:, 4:], past_key_values=kept)
    assert [layer.get_seq_length() for layer in kept.layers] == [4, 4]
    with torch.inference_mode():
        found = model(input_ids=TOKENS[:, 4:9], past_key_values=kept).logits
    close(found, expected[:, 4:9])
    close(of(model, "elsa", input_ids=TOKENS[:, 9:], past_key_values=kept).logits, expected[:, 9:])
    gemma = decoder("gemma2")
    expected = of(gemma, "eager", input_ids=TOKENS).logits
    mixed = OffloadedCache(0, gemma.config, chunk=5, folder=tmp_path)
    of(gemma, "elsa", input_ids=TOKENS[:, :12], past_key_values=mixed)
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "NamedTemporaryFile", full)
        with pytest.raises(NoRoom):
            of(gemma, "elsa", input_ids=TOKENS[:, 12:17], past_key_values=mixed)
    close(of(gemma, "elsa", input_ids=TOKENS[:, 12:], past_key_values=mixed).logits, expected[:, 12:])
    with pytest.raises(WrongArguments, match=r"key_states.*batch|key_states are \[1"):
        of(model, "elsa", input_ids=TOKENS[:1, :1], past_key_values=kept)
    with pytest.raises(WrongArguments, match=r"gradients.*DynamicCache"):
        model(input_ids=TOKENS, past_key_values=OffloadedCache(0))


def test_an_offloaded_cache_serves_cross_attention_too(tmp_path: Path) -> None:
    model, asked, expected = generating_t5()
    both = transformers.EncoderDecoderCache(*(OffloadedCache(0, chunk=n, folder=tmp_path) for n in (3, 7)))
    assert torch.equal(model.generate(**asked, past_key_values=both), expected)


def test_a_prompt_in_many_parts_is_merged_in_between(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offloaded, "TOGETHER", 2)
    model, kept = decoder("llama"), OffloadedCache(0, chunk=2, folder=tmp_path)
    expected = of(model, "eager", input_ids=TOKENS).logits
    found = [of(model, "elsa", input_ids=x, past_key_values=kept).logits for x in TOKENS.split(9, 1)]
    close(torch.cat(found, 1), expected)


def test_an_offloaded_cache_moves_nothing_for_a_crop_or_the_same_beams(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, kept = decoder("llama"), OffloadedCache(0, chunk=5, folder=tmp_path)
    of(model, "elsa", input_ids=TOKENS[:, :17], past_key_values=kept)
    chunks = [list(layer._full) for layer in kept.layers]
    kept.crop(-1)
    kept.reorder_cache(torch.arange(BATCH))
    assert chunks == [layer._full for layer in kept.layers] and kept.get_seq_length() == 16
    kept.crop(-7)
    assert [layer._full for layer in kept.layers] == [one[:1] for one in chunks] and kept.get_seq_length() == 9
