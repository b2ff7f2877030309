"""Models of timm, patched: the same outputs and gradients, every layer of attention asked, and the same model after unpatch()."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from elsa_tune.errors import WrongArguments
from tests.absent_torchvision import standing_in
from tests.test_dispatch import VARIANT, record, won
from tests.test_modules import built, close, reached

with standing_in():
    timm = pytest.importorskip("timm", reason="timm is not installed; `make .venv/installed-timm`")
    from elsa_tune.integrations.timm import patch, unpatch

Model = torch.nn.Module
FLAT: dict[str, Any] = dict(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=4, num_classes=5)
WINDOWS: dict[str, Any] = dict(
    img_size=32, patch_size=2, window_size=4, embed_dim=32, depths=(2, 2), num_heads=(2, 4), num_classes=5
)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "ViT": ("vit_tiny_patch16_224", FLAT),
    "ViT of parallel blocks": ("vit_small_patch16_18x2_224", FLAT),
    "DeiT": ("deit_tiny_distilled_patch16_224", FLAT),
    "BEiT": ("beit_base_patch16_224", FLAT),
    "EVA": ("eva02_tiny_patch14_224", FLAT),
    "Swin": ("swin_tiny_patch4_window7_224", WINDOWS),
    "Swin v2": ("swinv2_tiny_window8_256", WINDOWS),
}
LAYERS = {"ViT of parallel blocks": 4, "Swin": 4, "Swin v2": 4}
"""Layers of attention, where they are not 2."""


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def create(family: str, **more: Any) -> Model:
    """A small model with weights that make its outputs depend on attention."""
    name, given = FAMILIES[family]
    torch.manual_seed(0)
    model: Model = timm.create_model(name, drop_path_rate=0.0, **given, **more)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.1)
    return model.eval()


def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_outputs_are_the_same_and_every_layer_asks(family: str, home: Path) -> None:
    model, x = create(family), images()
    expected, kinds = model(x), [type(module) for module in model.modules()]
    before = reached()
    assert patch(model) is model
    assert close(model(x), expected) and reached() == before + LAYERS.get(family, 2)
    served = [type(module) for module in model.modules()]
    assert [type(module) for module in patch(model).modules()] == served, "twice is once"
    assert sum(a is not b for a, b in zip(served, kinds, strict=True)) == LAYERS.get(family, 2)
    assert unpatch(unpatch(model)) is model and [type(module) for module in model.modules()] == kinds
    before = reached()
    assert torch.equal(model(x), expected) and reached() == before


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "problem"),
    [
        ("ViT", "fp32.d16@b2.h4.q17.k17"),
        ("Swin", "fp32.d16.bias@b32.h2.q16.k16"),
        ("Swin v2", "fp32.d16.bias@b32.h2.q16.k16"),
    ],
)
def test_kernels_of_ours_answer(family: str, problem: str, home: Path) -> None:
    """The second stage of Swin, of more heads and fewer windows, by the first one's."""
    record(won(problem))
    model, x = create(family), images()
    expected = model(x)
    patch(model)(x)
    built()
    before = reached(VARIANT)
    assert close(model(x), expected) and reached(VARIANT) == before + LAYERS.get(family, 2)


def test_training_is_the_same(family: str, home: Path) -> None:
    model, x = create(family).train(), images()

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(x).square().sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    patch(model)
    got = gradients()
    assert got.keys() == expected.keys() and any("qkv" in name or "q_proj" in name for name in got)
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    assert all(torch.allclose(got[name], expected[name], rtol=1e-4, atol=1e-5 * largest) for name in expected)


def test_dropout_is_of_weights(home: Path) -> None:
    """Of all of them, so that it cannot differ by chance."""
    for family in ("ViT", "Swin", "Swin v2"):
        model, x = create(family, attn_drop_rate=1.0), images()
        in_eval, expected = model(x), model.train()(x)
        assert not close(in_eval, expected)
        assert close(patch(model)(x), expected) and close(model.eval()(x), in_eval)


def test_compiled_whole(family: str, home: Path) -> None:
    model, x = create(family), images()
    expected, code = model(x), ""

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        nonlocal code
        code += graph.code
        return graph.forward

    torch._dynamo.reset()
    assert close(torch.compile(patch(model), fullgraph=True, backend=backend)(x), expected)
    asked = sum(code.count(name) for name in ("ops.elsa_tune.attention(", "scaled_dot_product_attention("))
    assert asked == LAYERS.get(family, 2)


def _saved(model: Model) -> Model:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # type: ignore[no-any-return]


@torch.no_grad()
@pytest.mark.parametrize("again", [copy.deepcopy, _saved])
def test_copies_are_patched_and_apart(again: Callable[[Model], Model], family: str, home: Path) -> None:
    model, x = patch(create(family)), images()
    expected = model(x)
    other = again(model)
    for weight in model.parameters():
        weight.zero_()
    before = reached()
    assert torch.equal(other(x), expected) and reached() == before + LAYERS.get(family, 2)
    plain = create(family)
    plain.load_state_dict(other.state_dict())
    assert close(plain(x), expected) and str(plain) == str(other) == str(unpatch(other))


@torch.no_grad()
def test_modules_that_were_told_not_to_fuse(home: Path) -> None:
    """They take the fused path while they are patched, and what they were told is kept."""
    model, x = create("ViT"), images()
    attention: Any = model.get_submodule("blocks.0.attn")
    attention.fused_attn = False
    expected = model(x)
    before = reached()
    assert close(patch(model)(x), expected) and reached() == before + 2
    assert unpatch(model).get_submodule("blocks.0.attn").fused_attn is False


@torch.no_grad()
def test_masks_are_torchs(home: Path) -> None:
    attention, x = create("ViT").get_submodule("blocks.0.attn"), torch.randn(2, 17, 64)
    seen = torch.ones(17, 17, dtype=torch.bool).tril()
    expected = attention(x, attn_mask=seen)
    patch(attention)
    assert close(attention(x, attn_mask=seen), expected) and close(attention(x, is_causal=True), expected)
    assert not close(attention(x), expected)


@torch.no_grad()
@pytest.mark.parametrize("biases", [{}, {"qkv_bias": False}, {"qkv_bias_separate": True}], ids=str)
def test_projections_of_swin_v2(biases: dict[str, bool], home: Path) -> None:
    from timm.models.swin_transformer_v2 import WindowAttention

    torch.manual_seed(0)
    attention = WindowAttention(32, (4, 4), 2, dtype=torch.float64, **biases)
    for weight in attention.parameters():
        weight.add_(torch.randn_like(weight))
    attention.logit_scale[0] = 9.0  # which is clamped
    x, mask = torch.randn(6, 16, 32).double(), torch.where(torch.rand(3, 16, 16) > 0.5, -100.0, 0.0).double()
    expected = attention(x), attention(x, mask)
    patch(attention)
    assert close(attention(x), expected[0]) and close(attention(x, mask), expected[1])
    assert not close(*expected)


@torch.no_grad()
def test_in_halves(family: str, home: Path) -> None:
    model, x = create(family), images()
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(x)
        got = patch(model)(x)
    assert got.dtype == expected.dtype and torch.allclose(
        got, expected, rtol=0, atol=0.05 * float(expected.abs().max())
    )


def test_hooks_and_names_of_a_module_stay(home: Path) -> None:
    attention: Any = create("Swin").get_submodule("layers.0.blocks.1.attn")
    calls: list[Any] = []
    attention.register_forward_hook(lambda *given: calls.append(given))
    kind, before = type(attention), dict(attention.__dict__)
    patch(attention)(torch.randn(4, 16, 32))
    assert len(calls) == 1 and isinstance(attention, kind) and type(attention).__name__ == kind.__name__
    assert attention.__dict__.keys() == before.keys() and all(
        attention.__dict__[name] is before[name] for name in before
    )


@torch.no_grad()
def test_traced_and_exported(home: Path) -> None:
    model, x = create("ViT"), images()
    expected = model(x)
    patch(model)
    assert close(torch.jit.trace(model, x)(x), expected)
    assert close(torch.export.export(model, (x,)).module()(x), expected)


def test_what_others_made_of_a_patched_module_is_left(home: Path) -> None:
    """As torch's parametrizations do, they made a class of ours."""
    attention = patch(create("ViT").get_submodule("blocks.0.attn"))
    kind = type("Theirs", (type(attention),), {})
    attention.__class__ = kind
    assert type(unpatch(attention)) is kind


@pytest.fixture(params=["no attention", "no module"])
def nothing(request: pytest.FixtureRequest) -> Iterator[tuple[Any, str]]:
    if request.param == "no module":
        yield "vit_tiny_patch16_224", "model is 'vit_tiny_patch16_224'; it must be a torch.nn.Module"
    else:
        yield torch.nn.Sequential(torch.nn.Linear(2, 2)), "no module's forward calls scaled_dot_product_attention"


def test_nothing_to_patch_is_told(nothing: tuple[Any, str]) -> None:
    given, told = nothing
    with pytest.raises(WrongArguments, match=told):
        patch(given)
