"""Models of diffusers in elsa_tune.sdpa(): every processor of attention is answered, of the old kind and of the new."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import elsa_tune
from tests.test_dispatch import VARIANT, record, won
from tests.test_modules import built, close, reached

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed; `pip install diffusers`")

Case = tuple[torch.nn.Module, dict[str, Any]]


def unet() -> Case:
    """Processors that call torch's function, with keys of a text."""
    model = diffusers.UNet2DConditionModel(
        block_out_channels=(16, 32), layers_per_block=1, sample_size=8, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=8, attention_head_dim=2, norm_num_groups=2,
    )  # fmt: skip
    return model, dict(
        sample=torch.randn(2, 4, 8, 8), timestep=torch.tensor(3), encoder_hidden_states=torch.randn(2, 5, 8)
    )


def flux() -> Case:
    """Processors that call dispatch_attention_fn, over text and image together."""
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    given = dict(
        hidden_states=torch.randn(1, 16, 4), encoder_hidden_states=torch.randn(1, 6, 32), pooled_projections=torch.randn(1, 32),
        timestep=torch.ones(1), img_ids=torch.randn(16, 3), txt_ids=torch.randn(6, 3),
    )  # fmt: skip
    return model, given


def pixart() -> Case:
    """A text of padded keys."""
    model = diffusers.PixArtTransformer2DModel(
        sample_size=8, num_layers=1, patch_size=2, attention_head_dim=16, num_attention_heads=2, caption_channels=32, in_channels=4,
        cross_attention_dim=32, out_channels=8, use_additional_conditions=False, num_embeds_ada_norm=8,
    )  # fmt: skip
    given = dict(
        hidden_states=torch.randn(2, 4, 8, 8), timestep=torch.tensor([3, 4]), encoder_hidden_states=torch.randn(2, 7, 32),
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        encoder_attention_mask=(torch.arange(7) < torch.tensor([[7], [4]])).float(),
    )  # fmt: skip
    return model, given


@pytest.fixture(params=[unet, flux, pixart])
def case(request: pytest.FixtureRequest, home: Path) -> Case:
    torch.manual_seed(0)
    made: Callable[[], Case] = request.param
    model, given = made()
    return model.eval(), given


def out(model: torch.nn.Module, given: dict[str, Any]) -> Tensor:
    return model(**given, return_dict=False)[0]  # type: ignore[no-any-return]


@torch.no_grad()
def test_every_processor_is_answered(case: Case) -> None:
    model, given = case
    processors = sum(hasattr(module, "processor") for module in model.modules())
    expected, before = out(model, given), reached()
    with elsa_tune.sdpa():
        got = out(model, given)
    assert processors and reached() == before + processors and close(got, expected)
    assert close(out(model, given), expected) and reached() == before + processors


@torch.no_grad()
def test_kernels_of_ours_answer(home: Path) -> None:
    record(won("fp32.d16@b1.h2.q22.k22"))
    model, given = flux()
    expected = out(model, given)
    with elsa_tune.sdpa():
        out(model, given)
        built()
        before = reached(VARIANT)
        assert close(out(model, given), expected) and reached(VARIANT) == before + 2


def test_gradients_are_the_same(case: Case) -> None:
    model, given = case

    def gradients() -> list[Tensor]:
        model.zero_grad()
        out(model, given).square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected = gradients()
    with elsa_tune.sdpa():
        got = gradients()
    assert len(got) == len(expected)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(got, expected, strict=True))


@torch.no_grad()
def test_compiled_in_a_scope(home: Path) -> None:
    model, given = pixart()
    expected, code = out(model, given), ""

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        nonlocal code
        code += graph.code
        return graph.forward

    torch._dynamo.reset()
    with elsa_tune.sdpa():
        got = out(torch.compile(model, fullgraph=True, backend=backend), given)
    assert close(got, expected) and code.count("ops.elsa_tune.attention(") == 2
