"""attention() in compiled code, an operator, and under torch.func, a function with derivatives: whoever serves, the answer is eager code's."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor import config as inductor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import grad, jacfwd, jacrev, jvp, vmap
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

import elsa_tune
from elsa_tune import masks, scores
from elsa_tune.dispatch import operator, passes, serving
from tests.test_dispatch import VARIANT, close, record, won

ROOT = Path(__file__).resolve().parent.parent
SHAPE = "b2.h4.q33.k33"
BY_KERNEL = operator._by_kernel
FAMILIES = ("fp32.d16", "fp32.d16.causal", "fp32.d16.bias", "fp32.d16.dense", "fp32.d16.softcap")


@pytest.fixture(scope="module", autouse=True)
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A home in which a kernel of ours won some families at one shape, and is built."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ELSA_TUNE_HOME", str(tmp_path_factory.mktemp("operator") / "home"))
        spelled = [f"{family}@{SHAPE}" + ".softcap5.0" * family.endswith("softcap") for family in FAMILIES]
        patch.setattr(operator, "_by_kernel", lambda *about: True)
        record(*map(won, [*spelled, f"fp32.d16.window@{SHAPE}.left5.right0", "fp32.d16@b6.h4.q33.k33"]))
        yield
    serving.refresh()


def tensors(gradients: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 4, 33, 16, generator=generator).requires_grad_(gradients) for _ in range(3)]


def ours() -> int:
    """Calls that kernels of ours answered."""
    return sum(r.calls for r in elsa_tune.served() if r.kernel == VARIANT)


GENERATOR = torch.Generator().manual_seed(1)
DENSE = torch.rand(33, 33, generator=GENERATOR) > 0.3
BIAS = torch.randn(1, 4, 33, 33, generator=GENERATOR)
SLOPES = torch.rand(4, generator=GENERATOR)
WINDOW, LENGTHS, SINKS = (
    masks.window(5),
    masks.lengths(torch.tensor([3, 30])),
    scores.sinks(torch.randn(4, generator=GENERATOR)),
)

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
CALLS: dict[str, Attend] = {
    "plain": lambda q, k, v: elsa_tune.attention(q, k, v),
    "causal": lambda q, k, v: elsa_tune.attention(q, k, v, is_causal=True, scale=0.3),
    "bool": lambda q, k, v: elsa_tune.attention(q, k, v, DENSE),
    "bias": lambda q, k, v: elsa_tune.attention(q, k, v, BIAS),
    "bias and is_causal of ours": lambda q, k, v: elsa_tune.attention(q, k, v, scores.bias(BIAS), is_causal=True),
    "window": lambda q, k, v: elsa_tune.attention(q, k, v, WINDOW),
    "lengths": lambda q, k, v: elsa_tune.attention(q, k, v, LENGTHS),
    "sinks": lambda q, k, v: elsa_tune.attention(q, k, v, SINKS),
    "made inside": lambda q, k, v: elsa_tune.attention(q, k, v, masks.window(5) & scores.softcap(5.0)),
    "lengths made inside": lambda q, k, v: elsa_tune.attention(q, k, v, masks.lengths(torch.tensor([3, 30]))),
    "a list": lambda q, k, v: elsa_tune.attention(q, k, v, masks.lengths([3, 30])),
    "alibi": lambda q, k, v: elsa_tune.attention(q, k, v, scores.alibi(SLOPES)),
    "strided": lambda q, k, v: elsa_tune.attention(q, k, v, masks.strided(heads=4, local=2, stride=3, block=8)),
    "columns": lambda q, k, v: elsa_tune.attention(q, k, v, masks.columns(torch.full((2, 1, 33, 1), 20), True)),
    "groups": lambda q, k, v: elsa_tune.attention(q, k[:, :2], v[:, :2], is_causal=True, enable_gqa=True),
    "value_dim": lambda q, k, v: elsa_tune.attention(q, k, v[..., :8]),
    "3-D": lambda q, k, v: elsa_tune.attention(q[0], k[0], v[0]),
}


def gradients_of(attend: Attend, x: list[Tensor]) -> list[Tensor]:
    out = attend(*x)
    out.square().sum().backward()
    return [out.detach(), *(t.grad for t in x if t.grad is not None)]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_compiled_code_answers_as_eager_code(name: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(CALLS[name], fullgraph=True, dynamic=dynamic, backend="aot_eager")
    x = tensors()
    assert close(compiled(*x), CALLS[name](*x))
    got, expected = (gradients_of(f, tensors(gradients=True)) for f in (compiled, CALLS[name]))
    assert all(torch.allclose(a, b, rtol=0, atol=2e-5) for a, b in zip(got, expected, strict=True))


# What masks and scores hold learns too.

LEARNT: dict[str, tuple[Tensor, Callable[[Tensor], Any]]] = {
    "bias": (BIAS, scores.bias),
    "bias of all heads, in a chain": (BIAS[0, 0], lambda x: scores.bias(x) & scores.softcap(5.0) & masks.causal()),
    "slopes": (SLOPES, scores.alibi),
    "sinks beside lengths": (torch.randn(4, generator=GENERATOR), lambda x: scores.sinks(x) & LENGTHS),
    "torch's mask": (BIAS, lambda x: x),
    "torch's mask of keys": (torch.randn(2, 1, 1, 33, generator=GENERATOR), lambda x: x),
    "torch's mask of one axis": (torch.randn(33, generator=GENERATOR), lambda x: x),
    "torch's padding": (torch.zeros(2, 1, 1, 33).index_fill(3, torch.arange(30, 33), -torch.inf), lambda x: x),
}


def learning(name: str, **options: Any) -> list[Tensor]:
    """Output, log-sum-exp, and every gradient, of a call whose mask's tensor takes one, compiled where there are options."""
    held, of = LEARNT[name]

    def loss(q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        out = elsa_tune.attention(q, k, v, of(x), scale=0.3)
        other, lse = elsa_tune.attention_with_lse(q, k, v, attn_mask=of(x))
        return out, other, lse, out.square().sum() + other.square().sum() + lse.sin().sum()

    torch._dynamo.reset()
    x = [*tensors(gradients=True), held.clone().requires_grad_()]
    *made, total = (torch.compile(loss, fullgraph=True, **options) if options else loss)(*x)
    return [*(y.detach() for y in made), *torch.autograd.grad(total, x)]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", LEARNT)
def test_compiled_code_learns_what_masks_hold(name: str, dynamic: bool) -> None:
    got, expected = learning(name, backend="aot_eager", dynamic=dynamic), learning(name)
    assert all(torch.allclose(a, b, rtol=1e-5, atol=4e-5) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("wrapper", [False, True])
def test_inductor_learns_what_masks_hold(wrapper: bool) -> None:
    with inductor.patch(cpp_wrapper=wrapper):
        got, expected = learning("bias", backend="inductor"), learning("bias")
    assert all(torch.allclose(a, b, rtol=1e-5, atol=4e-5) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("learning", ["mask", "values"])
def test_what_no_kernel_computes_is_torchs_from_the_beginning(learning: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless a kernel of ours won some problem of the family before: by operations gradients would cost more."""
    monkeypatch.setattr(operator, "_by_kernel", BY_KERNEL)
    q, k, v = (torch.randn(2, 4, 33, 16, requires_grad=True) for _ in range(3))
    mask = torch.randn(33, 33, requires_grad=True) if learning == "mask" else None
    family, value = {"mask": ("bias", v), "values": ("v8", v[..., :8])}[learning]
    names: list[str] = []

    def recorded(graph: torch.fx.GraphModule, _: Any) -> Any:
        names.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    for tuned in (False, True):
        if tuned:
            record(won(f"fp32.d16.{family}.backward@{SHAPE}"))
            serving.refresh()
        torch._dynamo.reset()
        names.clear()
        torch.compile(lambda: elsa_tune.attention(q, k, value, mask), backend=recorded, fullgraph=True)()
        assert any("elsa_tune.attention" in name for name in names) is tuned


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_dimensions_of_heads_may_be_dynamic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operator, "_by_kernel", BY_KERNEL)
    torch._dynamo.reset()

    def learn(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return elsa_tune.attention(q, k, v, mask)

    compiled = torch.compile(learn, backend="aot_eager", fullgraph=True, dynamic=True)
    for d, v_dim, is_biased in ((16, 16, True), (24, 24, True), (16, 24, False)):
        q, k, v = (torch.randn(2, 4, 21, n, requires_grad=True) for n in (d, d, v_dim))
        mask = torch.randn(21, 21, requires_grad=True) if is_biased else None
        expected = scaled_dot_product_attention(q, k, v, mask)
        assert torch.allclose(compiled(q, k, v, mask), expected, atol=2e-6)


def test_second_derivatives_of_exported_programs_raise() -> None:
    class Attends(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return elsa_tune.attention(q, k, v)

    q, k, v = (torch.randn(2, 4, 33, 16, requires_grad=True) for _ in range(3))
    exported = torch.export.export(Attends(), (q, k, v)).module()
    (first,) = torch.autograd.grad(exported(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivatives in compiled and exported code"):
        first.square().sum().backward()


def test_only_gradients_that_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    backward = passes.backward
    monkeypatch.setattr(passes, "backward", lambda *given: (asked.append(given[-1]), backward(*given))[1])
    q, k, v = tensors()
    for held, wanted in ((BIAS.clone().requires_grad_(), (False,) * 3 + (True,)), (BIAS, (True,) + (False,) * 3)):
        torch._dynamo.reset()
        compiled = torch.compile(lambda q, b: elsa_tune.attention(q, k, v, b), fullgraph=True, backend="aot_eager")
        compiled(q.clone().requires_grad_(not held.requires_grad), held).sum().backward()
        assert tuple(asked.pop()) == wanted and not asked


@pytest.mark.parametrize("shape", [(0, 33, 33), (2, 0, 33), (2, 33, 0)])
def test_nothing_to_learn_from(shape: tuple[int, int, int]) -> None:
    """No batch, no query, no key; the last leaves sinks in the log-sum-exp."""
    batch, q_len, kv_len = shape
    x = [torch.randn(batch, 4, n, 16).requires_grad_() for n in (q_len, kv_len, kv_len)]
    bias, sinks = (torch.randn(size).requires_grad_() for size in ((1, 1, q_len, kv_len), (4,)))
    torch._dynamo.reset()

    def attend(q: Tensor, k: Tensor, v: Tensor, b: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        return elsa_tune.attention_with_lse(q, k, v, attn_mask=scores.bias(b) & scores.sinks(s))

    output, lse = torch.compile(attend, fullgraph=True, backend="aot_eager")(*x, bias, sinks)
    found = torch.autograd.grad(output.sum() + lse.sum(), (*x, bias, sinks))
    assert not any(y.any() for y in found[:4])
    assert torch.allclose(found[4], torch.full((4,), float(batch * q_len * (not kv_len))))


def test_exported_programs_of_what_learns() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = torch.nn.Parameter(BIAS.clone())

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return elsa_tune.attention(q, k, v, scores.bias(self.bias)) + elsa_tune.attention(q, k, v, self.bias)

    x, model = tensors(), Model()
    program = torch.export.export(model, tuple(x))
    assert program.graph_module.code.count("elsa_tune.attention") == 2
    assert close(program.module()(*x), model(*x))
    again: Any = program.module()
    for one in (again, model):
        one(*x).square().sum().backward()
    assert torch.allclose(again.bias.grad, model.bias.grad, rtol=1e-5, atol=4e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["plain", "causal", "bool", "bias", "window"])
def test_kernels_of_ours_serve_compiled_code(name: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(CALLS[name], fullgraph=True)
    x = tensors()
    compiled(*x)
    before = ours()
    compiled(*x)
    assert ours() == before + 1
    gradients_of(compiled, tensors(gradients=True))
    assert ours() >= before + 2


def test_dynamic_shapes_are_one_program() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(CALLS["causal"], fullgraph=True, dynamic=True, backend=counter)
    compiled(*tensors())
    before = counter.frame_count
    for n in (33, 40, 71):
        q, k, v = (torch.randn(2, 4, n, 16) for _ in range(3))
        assert close(compiled(q, k, v), CALLS["causal"](q, k, v))
    assert counter.frame_count == before


def test_exported_programs_call_the_operator() -> None:
    class Model(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return elsa_tune.attention(q, k, v, WINDOW)

    x = tensors()
    program = torch.export.export(Model(), tuple(x), dynamic_shapes=({2: torch.export.Dim("n")},) * 3)
    assert "elsa_tune.attention" in program.graph_module.code
    assert close(program.module()(*x), Model()(*x))
    y = [torch.randn(2, 4, 50, 16) for _ in range(3)]
    assert close(program.module()(*y), Model()(*y))


def test_exported_programs_travel_and_are_differentiated(tmp_path: Path) -> None:
    class Model(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return elsa_tune.attention(q, k, v, WINDOW)

    x = tensors()
    program = torch.export.export(Model(), tuple(x))
    torch.export.save(program, tmp_path / "model.pt2")
    loading = f"from elsa_tune import attention\nimport torch\nprint(torch.export.load({str(tmp_path / 'model.pt2')!r}).module())"
    subprocess.run([sys.executable, "-c", loading], check=True, capture_output=True, cwd=ROOT)
    got, expected = (gradients_of(f, tensors(gradients=True)) for f in (program.module(), CALLS["window"]))
    assert all(torch.allclose(a, b, rtol=0, atol=2e-5) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("name", ["plain", "window", "lengths"])
def test_packages_of_aotinductor(name: str, tmp_path: Path) -> None:
    class Model(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return CALLS[name](q, k, v)

    x = tensors()
    with torch.no_grad():
        program = torch.export.export(Model(), tuple(x))
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        assert close(torch._inductor.aoti_load_package(package)(*x), CALLS[name](*x))


def test_functions_of_functions_are_compiled_as_torchs_are() -> None:
    q, k, v = tensors()
    many = torch.stack([q, k])
    torch._dynamo.reset()
    for whole in (
        lambda x: vmap(CALLS["plain"], (0, None, None))(x, k, v),
        lambda x: grad(lambda y: CALLS["plain"](y, k, v).square().sum())(x[0]),
    ):
        assert torch.allclose(torch.compile(whole, backend="aot_eager")(many), whole(many), atol=5e-5)


@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_compiled_jvp_is_right_or_raises(fullgraph: bool) -> None:
    """Never silently 0, as a registered operator's is."""
    q, k, v = tensors()

    def tangent(x: Tensor) -> Tensor:
        return jvp(lambda y: CALLS["plain"](y, k, v), (x,), (x,))[1]

    torch._dynamo.reset()
    try:
        got = torch.compile(tangent, backend="aot_eager", fullgraph=fullgraph)(q)
    except Exception as error:
        assert fullgraph and "forward" in str(error).lower(), "torch's function has no jvp"
    else:
        assert torch.allclose(got, tangent(q), atol=1e-5)


def test_a_state_is_compiled() -> None:
    torch._dynamo.reset()
    x = tensors()
    compiled = torch.compile(
        lambda q, k, v: elsa_tune.attention_with_lse(q, k, v, attn_mask=WINDOW), fullgraph=True, backend="aot_eager"
    )
    assert all(
        close(a, b) for a, b in zip(compiled(*x), elsa_tune.attention_with_lse(*x, attn_mask=WINDOW), strict=True)
    )


@pytest.mark.parametrize("keeps", [False, True])
def test_torch_finds_nothing_wrong_with_the_operator(keeps: bool) -> None:
    """Its schema, its fake, its derivatives registered, under AOTAutograd with and without dynamic shapes."""
    q, k, v = tensors(gradients=keeps)
    bias, mask = (BIAS.clone().requires_grad_(keeps) for _ in range(2))
    more = [
        (None, [LENGTHS.tensors[0]], None, None, "lengths none lengths"),
        (None, [bias, LENGTHS.tensors[0]], None, None, "lengths bias bias lengths"),
        (mask, None, None, None, ""),
        (None, None, [5, 0], None, "window none left right"),
        (None, None, None, None, ""),
    ]
    for given in more:
        torch.library.opcheck(torch.ops.elsa_tune.attention.default, (q, k, v, *given, None, False, keeps))


def test_shapes_of_gradients_are_foretold() -> None:
    """By its fake, whoever computes them: what torch.func does there opcheck does not follow."""
    q, k, v = tensors()
    out, lse = torch.ops.elsa_tune.attention(q, k, v, None, None, None, None, "", None, False, True)
    held = BIAS[0].mT
    for mask, arrays, spelled in (
        (held, None, ""), (None, [held, LENGTHS.tensors[0]], "lengths bias bias lengths"), (None, None, ""),
    ):  # fmt: skip
        of_mask = [True] * (mask is not None) + [True, False] * (arrays is not None)
        given = (out, lse, q.mT.contiguous().mT, k, v[:, :1].expand_as(v), out, lse, mask, arrays, None, None, spelled)
        fakes = FakeTensorMode()
        faked = tree_map_only(Tensor, fakes.from_tensor, given)
        for asked in (
            [True, True, True, *of_mask],
            [False, True, False, *of_mask],
            [True, *[False] * (2 + len(of_mask))],
        ):
            made = torch.ops.elsa_tune.attention_backward(*given, 0.3, False, asked)
            with fakes:
                foretold = torch.ops.elsa_tune.attention_backward(*faked, 0.3, False, asked)
            assert len(made) == len(foretold) == sum(asked)
            for x, y in zip(made, foretold, strict=True):
                assert (x.shape, x.stride(), x.dtype) == (y.shape, y.stride(), y.dtype)


# What programs put around it.


def test_checkpoints_autocast_and_determinism() -> None:
    x = tensors(gradients=True)
    expected = gradients_of(CALLS["causal"], x)
    got = gradients_of(lambda *y: checkpoint(CALLS["causal"], *y, use_reentrant=False), tensors(gradients=True))
    assert all(close(a, b) for a, b in zip(got, expected, strict=True))
    torch._dynamo.reset()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wanted = CALLS["causal"](*tensors())
        found = torch.compile(CALLS["causal"], fullgraph=True, backend="aot_eager")(*tensors())
    assert found.dtype == wanted.dtype == torch.bfloat16 and torch.allclose(found, wanted, atol=2e-2)
    torch.use_deterministic_algorithms(True)
    try:
        torch._dynamo.reset()
        compiled = torch.compile(CALLS["plain"], fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(*tensors()), compiled(*tensors()))
        assert torch.equal(CALLS["plain"](*tensors()), CALLS["plain"](*tensors()))
    finally:
        torch.use_deterministic_algorithms(False)


def test_fake_meta_and_inference_tensors() -> None:
    for name in ("plain", "causal", "window", "bool"):
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert CALLS[name](*(torch.empty(2, 4, 33, 16) for _ in range(3))).shape == (2, 4, 33, 16)
    meta = [torch.empty(2, 4, 33, 16, device="meta") for _ in range(3)]
    assert CALLS["plain"](*meta).shape == (2, 4, 33, 16)
    torch._dynamo.reset()
    with torch.inference_mode():
        x = tensors()
        assert close(torch.compile(CALLS["plain"], fullgraph=True, backend="aot_eager")(*x), CALLS["plain"](*x))


# torch.func.


def by_operations(name: str) -> Attend:
    """The same attention in torch's plain operations."""
    left = {
        "window": lambda: WINDOW.dense(2, 4, 33, 33),
        "lengths": lambda: LENGTHS.dense(2, 4, 33, 33),
        "bool": lambda: DENSE,
    }

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        logits = q @ k.mT * (0.3 if name == "causal" else 0.25)
        if name == "bias":
            logits = logits + BIAS
        if name == "softcap":
            logits = 5.0 * (logits / 5.0).tanh()
        if name in left:
            logits = logits.masked_fill(~left[name](), float("-inf"))
        if name == "causal":
            logits = logits.masked_fill(~torch.ones(33, 33, dtype=torch.bool).tril(), float("-inf"))
        return logits.softmax(-1) @ v

    return attend


FUNCTIONS = {name: CALLS[name] for name in ("plain", "causal", "bool", "bias", "window", "lengths")} | {
    "softcap": lambda q, k, v: elsa_tune.attention(q, k, v, scores.softcap(5.0))
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_derivatives_and_maps(name: str) -> None:
    attend, reference = FUNCTIONS[name], by_operations(name)
    q, k, v = tensors()
    t = [torch.randn_like(q) for _ in range(3)]
    before = ours()

    def of(f: Attend) -> list[Tensor]:
        def loss(*x: Tensor) -> Tensor:
            return f(*x).square().sum()

        many = torch.stack([q, t[0], t[1]])
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(f(forward_ad.make_dual(q, t[0]), k, v)).tangent
        return [
            jvp(f, (q, k, v), tuple(t))[1],
            dual,
            *grad(loss, (0, 1, 2))(q, k, v),
            vmap(f, (0, None, None))(many, k, v),
            vmap(f, (1, None, 0), 1)(many.movedim(0, 1), k, many),
            vmap(grad(loss))(many, many, many),
            grad(lambda x: vmap(loss, (0, None, None))(x, k, v).sum())(many),
            vmap(lambda x, d: jvp(lambda y: f(y, k, v), (x,), (d,))[1])(many, many),
        ]

    for got, expected in zip(of(attend), of(reference), strict=True):
        assert torch.allclose(got, expected, rtol=1e-4, atol=5e-5)
    if name in ("plain", "causal", "window"):
        assert ours() > before, "kernels of ours take part"


def test_jacobians() -> None:
    q, k, v = (x[:1, :1, :3] for x in tensors())
    for jacobian in (jacfwd, jacrev):
        got, expected = (jacobian(f)(q, k, v) for f in (CALLS["plain"], by_operations("plain")))
        assert torch.allclose(got, expected, atol=1e-5)


def test_maps_fold_into_one_call_where_they_can() -> None:
    q, k, v = tensors()
    many = torch.stack([q, k, v])
    before = ours()
    out = vmap(CALLS["plain"], (0, None, None))(many, k, v)
    assert ours() == before + 1
    assert all(close(out[i], CALLS["plain"](many[i], k, v)) for i in range(3))


def test_masks_are_mapped_over() -> None:
    q, k, v = tensors()
    ends = torch.tensor([[3, 30], [33, 1], [8, 9]])
    got = vmap(lambda e: elsa_tune.attention(q, k, v, masks.lengths(e)))(ends)
    assert all(close(got[i], elsa_tune.attention(q, k, v, masks.lengths(ends[i]))) for i in range(3))
    slopes = torch.rand(3, 4)
    got = vmap(lambda s: elsa_tune.attention(q, k, v, scores.alibi(s)))(slopes)
    assert all(close(got[i], elsa_tune.attention(q, k, v, scores.alibi(slopes[i]))) for i in range(3))
    sinks = torch.randn(3, 4)
    got = vmap(lambda s: elsa_tune.attention(q, k, v, scores.sinks(s)))(sinks)
    assert all(close(got[i], elsa_tune.attention(q, k, v, scores.sinks(sinks[i]))) for i in range(3))


def test_gradients_of_what_masks_and_scores_hold() -> None:
    q, k, v = tensors()

    def loss(bias: Tensor) -> Tensor:
        return elsa_tune.attention(q, k, v, scores.bias(bias)).square().sum()

    def expected(bias: Tensor) -> Tensor:
        return ((q @ k.mT * 0.25 + bias).softmax(-1) @ v).square().sum()

    assert torch.allclose(grad(loss)(BIAS), grad(expected)(BIAS), atol=5e-5)


def test_gradients_of_each_sample_by_what_all_share() -> None:
    q, k, v = tensors()
    many = torch.stack([q, k, v])
    for score, shared in (
        (scores.sinks, torch.randn(4)),
        (scores.alibi, torch.rand(4)),
        (scores.bias, torch.randn(33, 33)),
    ):

        def loss(held: Tensor, x: Tensor, score: Any = score) -> Tensor:
            return elsa_tune.attention(x, k, v, score(held)).square().sum()

        got = vmap(grad(loss), (None, 0))(shared, many)
        assert all(torch.allclose(got[i], grad(loss)(shared, many[i]), atol=5e-5) for i in range(3))


def test_no_compiler_warns_of_what_we_are_made_of(recwarn: Any) -> None:
    torch._dynamo.reset()
    for name in ("plain", "made inside", "strided"):
        torch.compile(CALLS[name], fullgraph=True, backend="aot_eager")(*tensors())
    assert not [w for w in recwarn if "elsa_tune" in str(w.message)]
