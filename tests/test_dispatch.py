"""attention(): torch's meaning for every argument, tuned kernels where they won, torch's own SDPA everywhere else."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import elsa_tune
from elsa_tune import masks, places, scores, space
from elsa_tune.device import host_cpu
from elsa_tune.dispatch import exactness, fallback, handovers, ladder, ledger, serving
from elsa_tune.errors import BadDevice, BadProblem, KernelMissing, WrongArguments
from elsa_tune.generate import backends, cpp
from elsa_tune.measurement import KERNELS, Measurement
from elsa_tune.order import arranged
from elsa_tune.problem import Problem
from elsa_tune.remember.database import Database
from elsa_tune.shell import doctor

HERE = host_cpu()
LANES = f"{HERE.isas[0]}.l{cpp.ISAS[HERE.isas[0]].lanes}"
VARIANT = f"cpp.serial.{LANES}.q2.k4.v4.n48"
FAMILIES = ("fp32.d16", "fp32.d16.causal", "fp32.d16.v24")
SHAPE = "b2.h4.q50.k50"


def won(
    problem: str, variant: str = VARIANT, ratio: float = 2.0, device: str = str(HERE), **more: object
) -> Measurement:
    """A recorded final that ``variant`` won, with its kernel built as tuning would have left it."""
    parsed = Problem.parse(problem)
    chosen = space.parse(variant)
    built = cpp.build(chosen, parsed) if chosen.backend == "cpp" else None
    facts: dict[str, object] = dict(
        device=device, problem=problem, variant=variant, status="ok", stage="final", digest=built.digest if built else variant,
        error=1e-7, seconds=1e-3, ratio=ratio, ratio_low=ratio - 0.05, ratio_high=ratio + 0.05, incumbent="sdpa.flash", created=1.0,
        role=backends.role(variant),
    )  # fmt: skip
    return Measurement(**{**facts, **more})  # type: ignore[arg-type]


def record(*rows: Measurement) -> None:
    with Database.for_writing() as database:
        for row in rows:
            database.record(row)
    serving.refresh()


@pytest.fixture(scope="module", autouse=True)
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A database in which our variant won every family at one shape."""
    before = os.environ["ELSA_TUNE_HOME"]
    os.environ["ELSA_TUNE_HOME"] = str(tmp_path_factory.mktemp("tuned"))
    record(*(won(f"{family}@{SHAPE}") for family in FAMILIES), won("fp32.d16@b2.h4.kv2.q50.k50"))
    yield
    os.environ["ELSA_TUNE_HOME"] = before
    serving.refresh()


def tensors(
    heads: int = 4, kv_heads: int = 4, q_len: int = 50, kv_len: int = 50, dim: int = 16, value_dim: int = 16
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, heads, q_len, dim), (2, kv_heads, kv_len, dim), (2, kv_heads, kv_len, value_dim))
    return [torch.randn(shape, generator=generator) for shape in shapes]


class Served:
    """Counts who served: ours if a bound kernel was called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.by_torch = 0
        original, direct = fallback.attend, fallback.by_torch

        def attend(*arguments: object) -> Tensor:
            self.by_torch += 1
            with monkeypatch.context() as inside:
                inside.setattr(fallback, "by_torch", direct)
                return original(*arguments)  # type: ignore[arg-type]

        def by_torch(*arguments: object) -> Tensor:
            self.by_torch += 1
            return direct(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(fallback, "attend", attend)
        monkeypatch.setattr(fallback, "by_torch", by_torch)


def only_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch answers nothing from now on."""
    for name in ("attend", "by_torch"):
        monkeypatch.setattr(fallback, name, None)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Served:
    return Served(monkeypatch)


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=0, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3, 0.0, -0.5])
def test_ours_serves_what_it_won(served: Served, causal: bool, scale: float | None) -> None:
    q, k, v = tensors()
    truth = torch.nn.functional.softmax
    logits = (q.double() @ k.double().mT) * (0.25 if scale is None else scale)
    if causal:
        logits = logits.masked_fill(~torch.ones(50, 50, dtype=torch.bool).tril(), -torch.inf)
    out = elsa_tune.attention(q, k, v, is_causal=causal, scale=scale)
    assert served.by_torch == 0
    assert close(out, (truth(logits, -1) @ v.double()).float())


def test_a_call_looks_for_its_own_memory_order_first() -> None:
    """Views as models hand them over are served by what won in their order, else by the nearest if it won by far."""
    shape, slower = "b2.h6.q40.k40", VARIANT.replace("n48", "n16")
    record(
        won(f"fp32.d24@{shape}", VARIANT, 1.1),
        won(f"fp32.d24@{shape}.bshd", slower, 1.1),
        won(f"fp32.d24@{shape}.fused", "sdpa.flash", 1.0, incumbent="sdpa.flash"),
    )
    plain = [torch.randn(2, 6, 40, 24) for _ in range(3)]

    def serves(*orders: str) -> serving.Choice:
        x = arranged(orders, *plain)
        problem = serving.problem_of(*x)
        assert problem is not None
        return serving.explain(problem, HERE)

    assert str(serves("bhsd", "bhsd", "bhsd").variant) == VARIANT
    assert str(serves("bshd", "bshd", "bshd").variant) == slower
    assert serves("fused", "fused", "fused").by_sdpa
    mixed = serves("bshd", "cache", "cache")
    assert mixed.rung != "exact" and not any("won fp32.d24@b2.h6.q40.k40 by" in step for step in mixed.steps)
    x = arranged(["bshd"] * 3, *plain)
    out = elsa_tune.attention(*x)
    assert close(out, scaled_dot_product_attention(*x)) and out.stride() == x[0].stride()


def test_a_shape_in_two_memory_orders_is_two_entries(served: Served) -> None:
    """One shape, views and contiguous tensors in turns: each is answered from its own strides."""
    plain = tensors()
    for orders in (["bhsd"] * 3, ["bshd"] * 3, ["fused"] * 3, ["bshd", "cache", "cache"], ["bhsd"] * 3):
        x = arranged(orders, *plain)
        assert close(elsa_tune.attention(*x), scaled_dot_product_attention(*plain)), orders
    assert served.by_torch == 0


def test_grouped_heads_need_enable_gqa(served: Served) -> None:
    q, k, v = tensors(kv_heads=2)
    assert close(elsa_tune.attention(q, k, v, enable_gqa=True), scaled_dot_product_attention(q, k, v, enable_gqa=True))
    assert served.by_torch == 0
    with pytest.raises(RuntimeError):
        elsa_tune.attention(q, k, v)
    assert served.by_torch == 1


def test_other_value_dim(served: Served) -> None:
    q, k, v = tensors(value_dim=24)
    for memory in (lambda t: t, lambda t: t.transpose(1, 2).contiguous().transpose(1, 2)):
        out = elsa_tune.attention(*map(memory, (q, k, v)))
        assert out.shape == (2, 4, 50, 24) and close(out, scaled_dot_product_attention(q, k, v))
    assert served.by_torch == 0


def test_output_memory_follows_the_query(served: Served) -> None:
    q, k, v = tensors()
    by_position = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    assert elsa_tune.attention(*by_position).stride() == by_position[0].stride()
    assert elsa_tune.attention(q, k, v).is_contiguous()
    assert close(elsa_tune.attention(*by_position), elsa_tune.attention(q, k, v))
    assert served.by_torch == 0


def test_changing_layouts_and_scales_on_one_shape() -> None:
    """The memory of a layout's constants must notice every change of layout, scale and thread count."""
    q, k, v = tensors()
    alternatives = [
        (q, k, v),
        tuple(t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)),
        tuple(t[..., [*range(16)]].mT.contiguous().mT for t in (q, k, v)),
    ]
    threads = torch.get_num_threads()
    try:
        for count in (threads, 1):
            torch.set_num_threads(count)
            for x in alternatives * 2:
                for scale in (None, 0.5):
                    assert close(
                        elsa_tune.attention(*x, scale=scale), scaled_dot_product_attention(q, k, v, scale=scale)
                    )
    finally:
        torch.set_num_threads(threads)


MASK = torch.ones(50, 50, dtype=torch.bool).tril()

BY_TORCH = {
    "mask": lambda q, k, v: ((q, k, v), {"attn_mask": MASK}),
    "float mask": lambda q, k, v: ((q, k, v), {"attn_mask": torch.zeros(50, 50)}),
    "half": lambda q, k, v: ((q.half(), k.half(), v.half()), {}),
    "double": lambda q, k, v: ((q.double(), k.double(), v.double()), {}),
    "3-D": lambda q, k, v: ((q[0], k[0], v[0]), {}),
    "5-D": lambda q, k, v: ((q[None], k[None], v[None]), {}),
    "batch broadcast": lambda q, k, v: ((q, k[:1], v[:1]), {}),
    "no keys": lambda q, k, v: ((q, k[:, :, :0], v[:, :, :0]), {}),
    "no queries": lambda q, k, v: ((q[:, :, :0], k, v), {}),
    "no batch": lambda q, k, v: ((q[:0], k[:0], v[:0]), {}),
    "untuned head_dim": lambda q, k, v: ((q[..., :5], k[..., :5], v[..., :5]), {}),
    "untuned shape": lambda q, k, v: (tuple(torch.cat([t] * 60, 2) for t in (q, k, v)), {}),
}  # fmt: skip


@pytest.mark.parametrize("case", BY_TORCH)
def test_everything_else_goes_to_torch_unchanged(served: Served, case: str) -> None:
    x, options = BY_TORCH[case](*tensors())
    out = elsa_tune.attention(*x, **options)
    expected = scaled_dot_product_attention(*x, **options)
    assert served.by_torch == 1 and out.dtype == expected.dtype and torch.equal(out, expected)


def test_dropout_goes_to_torch(served: Served) -> None:
    q, k, v = tensors()
    torch.manual_seed(0)
    out = elsa_tune.attention(q, k, v, None, 0.5)
    torch.manual_seed(0)
    assert torch.equal(out, scaled_dot_product_attention(q, k, v, None, 0.5)) and served.by_torch == 1


def test_gradients_are_torchs_from_what_a_kernel_of_ours_saves(served: Served) -> None:
    x = [t.requires_grad_() for t in tensors()]
    elsa_tune.attention(*x).sum().backward()
    gradients = [t.grad for t in x]
    y = [t.detach().clone().requires_grad_() for t in x]
    scaled_dot_product_attention(*y).sum().backward()
    assert served.by_torch == 0 and all(close(a, b.grad) for a, b in zip(gradients, y, strict=True))
    with torch.no_grad():
        elsa_tune.attention(*x)
    with torch.inference_mode():
        elsa_tune.attention(*(t.clone() for t in tensors()))
    elsa_tune.attention(*(torch.nn.Parameter(t.detach(), requires_grad=False) for t in x))
    assert served.by_torch == 0, "without gradients ours serves"


class Subclass(Tensor):
    seen = 0

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        cls.seen += function is scaled_dot_product_attention
        return super().__torch_function__(function, types, args, kwargs)


def test_torchs_own_machinery_sees_its_own_call() -> None:
    q, k, v = tensors()
    expected = scaled_dot_product_attention(q, k, v)
    elsa_tune.attention(q.as_subclass(Subclass), k, v)
    assert Subclass.seen == 1
    assert close(torch.vmap(elsa_tune.attention)(q[None], k[None], v[None])[0], expected)
    gradient = torch.func.grad(lambda x: elsa_tune.attention(x, k, v).sum())(q)
    assert close(gradient, torch.func.grad(lambda x: scaled_dot_product_attention(x, k, v).sum())(q))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert elsa_tune.attention(q, k, v).dtype == scaled_dot_product_attention(q, k, v).dtype == torch.bfloat16
    assert elsa_tune.attention(*(t.to("meta") for t in (q, k, v))).device.type == "meta"
    negated = [torch.view_as_complex(torch.stack([t, t], -1)).conj().imag for t in (q, k, v)]
    assert all(t.is_neg() for t in negated)
    assert close(elsa_tune.attention(*negated), scaled_dot_product_attention(*(t.resolve_neg() for t in negated)))


def test_dispatch_modes_see_torchs_call() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counter(TorchDispatchMode):
        seen: list[str] = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            self.seen.append(str(function))
            return function(*args, **(kwargs or {}))

    with FakeTensorMode():
        assert elsa_tune.attention(*(torch.empty(2, 4, 50, 16) for _ in range(3))).shape == (2, 4, 50, 16)
    q, k, v = tensors()
    with Counter():
        elsa_tune.attention(q, k, v)
    assert any("scaled_dot_product" in name for name in Counter.seen)


def test_under_torch_compile() -> None:
    q, k, v = tensors()
    compiled = torch.compile(lambda q, k, v: elsa_tune.attention(q, k, v) * 2, backend="eager", fullgraph=True)
    assert close(compiled(q, k, v), scaled_dot_product_attention(q, k, v) * 2)


def test_where_torchs_default_is_wrong_its_math_backend_serves() -> None:
    q, k, v = tensors(dim=8, value_dim=8)  # a family that is not tuned
    logits = (q.double() @ k.double().mT * -0.5).masked_fill(~MASK, -torch.inf)
    expected = (logits.softmax(-1) @ v.double()).float()
    assert close(elsa_tune.attention(q, k, v, is_causal=True, scale=-0.5), expected)
    doubles = [t.double() for t in (q, k, v)]
    mask = torch.randn(50, 50)
    logits = doubles[0] @ doubles[1].mT / 8**0.5 + mask
    assert torch.allclose(elsa_tune.attention(*doubles, attn_mask=mask), logits.softmax(-1) @ doubles[2])
    with pytest.raises(WrongArguments, match="differ in length"):
        elsa_tune.attention(q, k, v[:, :, :-1])


def test_mistakes_raise_as_torch_does() -> None:
    q, k, v = tensors()
    with pytest.raises(RuntimeError):
        elsa_tune.attention(q, k.double(), v)
    with pytest.raises(RuntimeError):
        elsa_tune.attention(q, k[..., :8], v)
    with pytest.raises(WrongArguments, match="both"):
        elsa_tune.attention(q, k, v, attn_mask=MASK, is_causal=True)
    with pytest.raises(WrongArguments, match="meta"):
        elsa_tune.attention(q, k, v, attn_mask=MASK.to("meta"))


def test_threads_share_one_table() -> None:
    q, k, v = tensors()
    expected, failures = scaled_dot_product_attention(q, k, v), []
    serving.refresh()

    def hammer() -> None:
        for i in range(100):
            out = elsa_tune.attention(q, k, v, scale=None)
            if not close(out, expected):
                failures.append(i)

    workers = [threading.Thread(target=hammer) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


def test_a_forked_child_computes() -> None:
    """A child of a process whose OpenMP pool ran must neither hang nor differ."""
    program = """
import os, torch, elsa_tune
q = torch.randn(2, 4, 50, 16)
out = elsa_tune.attention(q, q, q)
torch.randn(500, 500) @ torch.randn(500, 500)
child = os.fork()
if child == 0:
    torch.set_num_threads(1)
    os._exit(0 if torch.equal(elsa_tune.attention(q, q, q), out) else 1)
assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_a_growing_cache_does_not_grow_the_table() -> None:
    q, k, v = tensors(q_len=1, kv_len=4300)
    for n in range(1, 4300):
        elsa_tune.attention(q, k[:, :, :n], v[:, :, :n])
    assert len(serving.table) <= serving.MOST_SHAPES


# Choosing.


def test_neighbours_serve_only_with_a_large_advantage(home: Path) -> None:
    record(won("fp32.d16@b2.h4.q50.k50", ratio=2.0), won("fp32.d16@b2.h4.q800.k800", ratio=1.2))

    def explain(text: str) -> ladder.Choice:
        return serving.explain(Problem.parse(text), HERE)

    assert explain("fp32.d16@b2.h4.q50.k50").rung == "exact"
    assert explain("fp32.d16@b2.h4.q800.k800").rung == "exact"
    assert explain("fp32.d16@b2.h4.q70.k60").rung == "neighbour"
    far = explain("fp32.d16@b2.h4.q900.k900")
    assert far.by_sdpa and any("advantage" in step for step in far.steps)
    assert explain("fp32.d16@b2.h4.q100000.k100000").by_sdpa


def test_a_neighbour_slower_than_sdpa_nearby_does_not_serve(home: Path) -> None:
    lost = won("fp32.d16@b2.h4.q100.k100", ratio=0.8)
    torchs = won("fp32.d16@b2.h4.q100.k100", variant="sdpa.flash", ratio=1.0, ratio_low=1.0)
    record(won("fp32.d16@b2.h4.q50.k50"), lost, torchs)
    choice = serving.explain(Problem.parse("fp32.d16@b2.h4.q60.k60"), HERE)
    assert choice.by_sdpa and any("slower than SDPA at" in step for step in choice.steps)


def test_kin_and_other_dimensions_are_labelled(home: Path) -> None:
    kin = f"cpu:{HERE.model}-{HERE.arch}-c{HERE.cores + 62}"
    record(won("fp32.d16@b2.h4.q50.k50", device=kin))
    assert serving.explain(Problem.parse("fp32.d16@b2.h4.q50.k50"), HERE).rung == "model"
    assert serving.explain(Problem.parse("fp32.d20@b2.h4.q50.k50"), HERE).rung == "head_dim"


def test_where_sdpa_won_sdpa_serves(home: Path, served: Served) -> None:
    record(won("fp32.d16@b2.h4.q50.k50", variant="sdpa.flash", ratio=1.0, ratio_low=1.0))
    assert serving.explain(Problem.parse("fp32.d16@b2.h4.q50.k50"), HERE).by_sdpa
    q, k, v = tensors()
    assert torch.equal(elsa_tune.attention(q, k, v), scaled_dot_product_attention(q, k, v)) and served.by_torch == 1


def test_a_missing_kernel_is_built_behind_the_callers_back(home: Path, served: Served) -> None:
    """SDPA serves until the kernel is built and checked; then ours does."""
    kin = f"cpu:{HERE.model}-{HERE.arch}-c{HERE.cores + 62}"
    record(won("fp32.d16@b2.h4.q50.k50", device=kin, digest="nothing"))
    q, k, v = tensors()
    expected = scaled_dot_product_attention(q, k, v)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        before = served.by_torch
        assert close(elsa_tune.attention(q, k, v), expected)
        if served.by_torch == before:
            break
        time.sleep(0.05)
    assert 1 <= served.by_torch == before


def test_a_build_that_fails_is_not_repeated_for_every_shape(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A growing key cache poses a new shape at every step; a hopeless kernel costs one attempt, not one a step."""
    kin = f"cpu:{HERE.model}-{HERE.arch}-c{HERE.cores + 62}"
    record(won("fp32.d16@b2.h4.q50.k50", device=kin))
    attempts: list[int] = []

    def fails(*_: object) -> object:
        attempts.append(1)
        raise KernelMissing("planted")

    monkeypatch.setattr(cpp, "build", fails)
    q, k, v = tensors(kv_len=60)
    for n in range(41, 61):
        assert close(
            elsa_tune.attention(q, k[:, :, :n], v[:, :, :n]), scaled_dot_product_attention(q, k[:, :, :n], v[:, :, :n])
        )
    deadline = time.monotonic() + 10
    while "background build" not in serving._shelf.troubles and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    assert len(attempts) == 1 and "planted" in serving._shelf.troubles["background build"]


def test_where_no_kernel_can_be_written_torch_serves(
    home: Path, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk is nothing that a program should hear of; doctor and explain do."""
    kin = f"cpu:{HERE.model}-{HERE.arch}-c{HERE.cores + 62}"
    record(won("fp32.d16@b2.h4.q50.k50", device=kin, digest="nothing"))
    shutil.rmtree(places.kernels())

    def full(*_: object, **__: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    q, k, v = tensors()
    deadline = time.monotonic() + 10
    while "background build" not in serving._shelf.troubles and time.monotonic() < deadline:
        assert close(elsa_tune.attention(q, k, v), scaled_dot_product_attention(q, k, v))
        time.sleep(0.01)
    assert close(elsa_tune.attention(q, k, v), scaled_dot_product_attention(q, k, v)) and served.by_torch > 1
    assert (
        "NoRoom" in (told := serving._shelf.troubles["background build"])
        and "No space left on device; free some space" in told
    )


def test_a_kernel_that_is_wrong_here_never_serves(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from elsa_tune.prove import check

    kin = f"cpu:{HERE.model}-{HERE.arch}-c{HERE.cores + 62}"
    record(won("fp32.d16@b2.h4.q50.k50", device=kin))
    monkeypatch.setattr(check, "check_family", lambda *_, **__: check.Verdict(1.0, 1.0, "planted"))
    with pytest.raises(KernelMissing, match="planted"):
        elsa_tune.load("fp32.d16@b2.h4.q50.k50")


def test_a_useless_database_means_torch_serves(home: Path, served: Served) -> None:
    places.home().mkdir()
    places.database().write_bytes(b"garbage" * 1000)
    serving.refresh()
    q, k, v = tensors()
    assert torch.equal(elsa_tune.attention(q, k, v), scaled_dot_product_attention(q, k, v)) and served.by_torch == 1
    assert places.database().read_bytes() == b"garbage" * 1000


# load.


def test_load_tells_what_it_is() -> None:
    kernel = elsa_tune.load(f"fp32.d16@{SHAPE}")
    q, k, v = tensors()
    assert close(kernel(q, k, v), scaled_dot_product_attention(q, k, v))
    assert str(kernel.variant) == VARIANT and kernel.rung == "exact" and kernel.error == 1e-7 and kernel.ratio == 2.0
    assert kernel.source is not None and VARIANT in kernel.source.text
    with pytest.raises(WrongArguments, match=r"fp32\.d16"):
        kernel(*tensors(dim=8, value_dim=8))


def test_load_of_an_untuned_problem_is_torch() -> None:
    kernel = elsa_tune.load("fp32.d100@b1.h1.q2000.k3")
    assert kernel.variant.backend == "sdpa" and kernel.source is None and kernel.error is None
    q, k, v = tensors(dim=100, value_dim=100)
    assert close(kernel(q, k, v), scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("ours", [False, True])
def test_a_loaded_kernel_takes_operands_with_its_mask(home: Path, ours: bool) -> None:
    """Numbers that the shape says may be left out, tensors may not; what does not fit is told in one sentence."""
    posed = "fp32.d16.causal+lengths.softcap@b2.h4.q50.k50.softcap2"
    if ours:
        record(won(posed))
    kernel = elsa_tune.load(posed)
    assert (kernel.variant.backend in backends.candidates()) is ours
    q, k, v = tensors()
    lengths = torch.tensor([50, 7])

    def expected(cap: float, lengths: torch.Tensor) -> torch.Tensor:
        scores = cap * (q.double() @ k.double().mT / 4 / cap).tanh()
        seen = torch.ones(50, 50, dtype=torch.bool).tril() & (torch.arange(50) < lengths[:, None, None, None])
        return (scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num() @ v.double()).float()

    assert close(kernel(q, k, v, attn_mask=masks.lengths(lengths)), expected(2.0, lengths))
    given = masks.causal() & masks.lengths(lengths.int()) & scores.softcap(0.5)
    assert close(kernel(q, k, v, attn_mask=given), expected(0.5, lengths))
    assert close(kernel(q, k, v, attn_mask=masks.lengths([9])), expected(2.0, torch.tensor([9, 9])))
    none = kernel(q, k, v, attn_mask=masks.lengths([0, 50]))
    assert not none[0].any() and close(none, expected(2.0, torch.tensor([0, 50])))
    for wrong in (
        lambda: None,
        lambda: masks.causal() & scores.softcap(1.0),
        lambda: masks.lengths(lengths) & masks.window(1),
        lambda: masks.lengths([1, 2, 3]),
        lambda: masks.lengths([51, 2]),
        lambda: masks.lengths([-1, 2]),
        lambda: masks.lengths(lengths.float()),
        lambda: masks.lengths(lengths[:, None]),
        lambda: masks.lengths(lengths.to("meta")),
        lambda: masks.lengths(lengths) & masks.lengths(lengths),
        lambda: masks.lengths(lengths) & scores.softcap(0.0),
        lambda: masks.lengths(lengths) & scores.softcap(torch.tensor(1.0)),  # type: ignore[arg-type]
        lambda: masks.lengths(lengths) & scores.bias(torch.zeros(50)),
        lambda: torch.ones(50, 50, dtype=torch.bool),
    ):
        with pytest.raises(WrongArguments, match="lengths|softcap|c is"):
            kernel(q, k, v, attn_mask=wrong())


def test_load_mistakes() -> None:
    with pytest.raises(BadProblem):
        elsa_tune.load("nonsense")
    with pytest.raises(BadDevice):
        elsa_tune.load("fp32.d16", device="cuda:h200-sm90-c132")


def test_distance_is_a_metric_of_shapes() -> None:
    a, b, c = (Problem.parse(f"fp32.d16@{s}") for s in ("b1.h8.q64.k64", "b2.h8.q64.k128", "b4.h8.kv2.q16.k4096"))
    assert ladder.distance(a, a) == 0 and ladder.distance(a, b) == ladder.distance(b, a) == 2
    assert ladder.distance(a, c) <= ladder.distance(a, b) + ladder.distance(b, c)


def test_kernels_that_a_faulty_version_built_are_built_anew(home: Path) -> None:
    """Their libraries lie in the cache under the digest that was recorded; what serves is today's code, checked first."""
    problem = Problem.parse(f"fp32.d16@{SHAPE}")
    for kernels, trusted in ((1.0, False), (float(KERNELS), True)):
        facts = {"source": "what was rendered then", "torch": torch.__version__, "kernels": kernels}
        record(won(str(problem), provenance=facts, created=1.0 + kernels))
        chosen = serving.explain(problem, HERE)
        assert str(chosen.variant) == VARIANT and chosen.rung == "exact"
        assert (serving._shelf._trusted(chosen) is not None) is trusted
    assert Measurement(device="d", problem="p", variant="v", status="ok", provenance={"source": "x"}).is_of_faulty_code


# How exact answers must be.

PLAIN = f"cpp.serial.{LANES}.q1.k4.v4.n48"


def test_accuracy_chooses_the_fastest_that_errs_no_more_than_torch(home: Path) -> None:
    problem = Problem.parse(f"fp32.d16@{SHAPE}")
    torchs = won(str(problem), "sdpa.flash", ratio=1.0, error=2e-7)
    record(torchs, won(str(problem), error=5e-7, ratio=2.0), won(str(problem), PLAIN, error=2e-7, ratio=1.5))
    q, k, v = (torch.randn(2, 4, 50, 16) for _ in range(3))

    def answering() -> str:
        return str(serving.explain(problem, HERE).variant)

    assert answering() == VARIANT
    with elsa_tune.accuracy():
        assert answering() == PLAIN and elsa_tune.load(problem).error == 2e-7
        assert torch.allclose(elsa_tune.attention(q, k, v), scaled_dot_product_attention(q, k, v), atol=2e-6)
        with elsa_tune.accuracy(3.0):
            assert answering() == VARIANT
        with elsa_tune.accuracy(0.5):
            assert answering() == "None" and "torch serves" in serving.explain(problem, HERE).steps[-1]
            assert torch.equal(elsa_tune.attention(q, k, v), scaled_dot_product_attention(q, k, v))
        assert answering() == PLAIN
        other: list[str] = []
        thread = threading.Thread(target=lambda: other.append(answering()))
        thread.start()
        thread.join()
        assert other == [VARIANT], "another thread asked for nothing"
        far = Problem.parse("fp32.d16@b2.h4.q60.k60")
        assert serving.explain(far, HERE).by_sdpa, "an error of another shape says nothing of this one"
    assert answering() == VARIANT and exactness.active == 0


# What no kernel may touch, or not as it stands.


def test_who_observes_sees_torchs_own_call() -> None:
    """Traces, functionalisation, symbolic tracing and forward-mode derivatives of a shape that a kernel serves."""
    q, k, v = tensors()
    other = torch.randn_like(q)
    traced = torch.jit.trace(elsa_tune.attention, (q, k, v))
    assert close(traced(other, k, v), scaled_dot_product_attention(other, k, v))
    assert close(torch.func.functionalize(elsa_tune.attention)(q, k, v), scaled_dot_product_attention(q, k, v))
    graph = torch.fx.symbolic_trace(lambda a, b, c: elsa_tune.attention(a, b, c))
    assert close(graph(q, k, v), scaled_dot_product_attention(q, k, v))
    with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
        out = elsa_tune.attention(forward_ad.make_dual(q, other), k, v)
        assert forward_ad.unpack_dual(out).tangent is not None
        sums = elsa_tune.attention_with_lse(forward_ad.make_dual(q, other), k, v)[1]
        assert forward_ad.unpack_dual(sums).tangent is not None


@pytest.mark.parametrize("place", range(3))
def test_values_that_are_negated_when_read(place: int) -> None:
    x = tensors()
    negated = [torch._neg_view(t) if i == place else t for i, t in enumerate(x)]
    plain = [t.resolve_neg() for t in negated]
    assert close(elsa_tune.attention(*negated), scaled_dot_product_attention(*plain))
    assert close(elsa_tune.attention(*x), scaled_dot_product_attention(*x))


def test_a_query_whose_columns_lie_farthest_apart() -> None:
    """An output laid out like it would have no contiguous rows."""
    q, k, v = tensors()
    odd = torch.randn(20000).as_strided(q.shape, (800, 1, 16, 1))
    assert torch.empty_like(odd).stride(3) != 1
    assert close(elsa_tune.attention(odd, k, v), scaled_dot_product_attention(odd.contiguous(), k, v))


def test_a_scale_that_is_no_float() -> None:
    q, k, v = tensors()
    scale = torch.tensor(0.5)
    for now in (0.5, 0.1):
        scale.fill_(now)
        expected = scaled_dot_product_attention(q, k, v, scale=now)
        assert close(elsa_tune.attention(q, k, v, scale=scale), expected)  # type: ignore[arg-type]
    assert close(elsa_tune.attention(q, k, v, scale=1), scaled_dot_product_attention(q, k, v, scale=1))
    for wrong in ("0.3", 1j, [1]):
        with pytest.raises(TypeError):
            elsa_tune.attention(q, k, v, scale=wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        elsa_tune.attention(q, k, v, is_causal="x")  # type: ignore[arg-type]


BIG, LONG = 10**400, 10**5000  # more than a float holds; more than Python prints
WRONG = {
    "a problem": (lambda q, w: elsa_tune.load(w), BadProblem, "problem"),
    "a problem to tune": (lambda q, w: elsa_tune.tune([w], device="cpu"), BadProblem, "problem"),
    "a dimension": (lambda q, w: Problem(head_dim=w), BadProblem, "head_dim"),
    "a query": (lambda q, w: elsa_tune.load("fp32.d16")(w, q, q), WrongArguments, "query"),
    "a scale": (lambda q, w: elsa_tune.load("fp32.d16")(q, q, q, w), WrongArguments, "scale"),
    "a log-sum-exp": (lambda q, w: elsa_tune.load("fp32.d16")(q, q, q, None, w), WrongArguments, "lse"),
    "a mask": (lambda q, w: elsa_tune.load("fp32.d16.lengths")(q, q, q, attn_mask=w), WrongArguments, "attn_mask"),
    "a mask of none": (lambda q, w: elsa_tune.load("fp32.d16")(q, q, q, attn_mask=w), WrongArguments, "attn_mask"),
    "a mask of a call": (lambda q, w: elsa_tune.attention(q, q, q, w), WrongArguments, "attn_mask"),
    "a mask of states": (lambda q, w: elsa_tune.attention_with_lse(q, q, q, attn_mask=w), WrongArguments, "attn_mask"),
    "a length": (lambda q, w: elsa_tune.attention(q, q, q, masks.lengths(w)), WrongArguments, "lengths"),
    "a cap": (lambda q, w: scores.softcap(w), WrongArguments, "c is"),
    "an integer": (lambda q, w: masks.prefix(w), WrongArguments, "p is"),
    "a window": (lambda q, w: masks.window(w), WrongArguments, "left is"),
    "a bias": (lambda q, w: elsa_tune.attention(q, q, q, scores.bias(w)), WrongArguments, "bias"),
    "how exact": (lambda q, w: elsa_tune.accuracy(w).__enter__(), WrongArguments, "times_torchs_error"),
}  # fmt: skip


SOUND = {("a scale", float), ("a cap", float), ("how exact", float), ("a length", tuple), ("a bias", float)}
VALUES = (5.5, BIG, LONG, "x", b"x", (1,), [], 1j, object())


@pytest.mark.parametrize(
    ("argument", "wrong"),
    [(name, value) for name in WRONG for value in VALUES if (name, type(value)) not in SOUND],
    ids=lambda one: one if isinstance(one, str) and one in WRONG else type(one).__name__,
)
def test_what_is_no_such_argument_is_one_error_that_names_it(home: Path, argument: str, wrong: object) -> None:
    call, mistake, name = WRONG[argument]
    query = torch.randn(1, 2, 9, 16)
    with pytest.raises(mistake, match=name) as raised:
        call(query, wrong)
    assert len(str(raised.value)) < 300 and "\n" not in str(raised.value)


def test_a_scale_that_no_float_holds_is_named_by_attention_too() -> None:
    query = torch.randn(1, 2, 9, 16)
    for call in (elsa_tune.attention, elsa_tune.attention_with_lse):
        with pytest.raises(WrongArguments, match="scale is 1000"):
            call(query, query, query, scale=BIG)


def test_a_loaded_kernel_names_what_does_not_fit(home: Path) -> None:
    """The dtype where that is wrong, the shapes where those are, the device; an arithmetic class is no mistake of the tensors."""
    query = torch.randn(1, 2, 9, 16)
    kernel, sums = elsa_tune.load("fp32.d16"), torch.empty(1, 2, 9)
    for key, found in (
        (query.double(), r"key is torch\.float64 \[1, 2, 9, 16\] on cpu; .* torch\.float32"),
        (query.to("meta"), r"key is torch\.float32 .* on meta; .* on cpu"),
        (query[..., :8], r"\[1, 2, 9, 16\], \[1, 2, 9, 8\].*\[batch, kv_heads, kv_len, 16\]"),
    ):
        with pytest.raises(WrongArguments, match=found):
            kernel(query, key, query)
    for lse in (sums.double(), sums[0], torch.empty(1, 9, 2).transpose(1, 2)):
        with pytest.raises(WrongArguments, match=r"lse is .* torch\.float32 \[1, 2, 9\], contiguous"):
            kernel(query, query, query, lse=lse)
    strict = elsa_tune.load("fp32.strict.d16")
    assert torch.allclose(
        strict(query, query, query, lse=sums), scaled_dot_product_attention(query, query, query), atol=1e-6
    )


def test_nested_tensors_go_to_torch() -> None:
    n = torch.nested.nested_tensor([torch.ones(4, 50, 16), torch.ones(4, 30, 16)])
    assert elsa_tune.attention(n, n, n).is_nested


@pytest.mark.parametrize("times", [0.0, -1.0, float("nan"), "2", None, [1]])
def test_accuracy_asks_for_a_number_above_0(times: object) -> None:
    with pytest.raises(WrongArguments, match="times_torchs_error"), elsa_tune.accuracy(times):  # type: ignore[arg-type]
        pass
    assert exactness.active == 0


def test_a_kernel_that_raises_hands_over_and_is_told_of(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch answers; the process counts each reason, and the doctor of another process reads it."""
    monkeypatch.setattr(handovers, "counts", type(handovers.counts)())
    record(won("fp32.d16@b2.h4.q50.k50"))

    def broken(*arguments: object) -> Tensor:
        raise RuntimeError("CUDA error: invalid device context\nsomewhere")

    monkeypatch.setattr(serving, "decide", lambda *about: serving.Serving(None, ledger.Row(), call=broken))
    q, k, v = tensors()
    expected = scaled_dot_product_attention(q, k, v)
    assert all(torch.equal(elsa_tune.attention(q, k, v), expected) for _ in range(3))
    assert elsa_tune.attention_with_lse(q, k, v)[0].shape == expected.shape
    reason = "RuntimeError: CUDA error: invalid device context"
    assert handovers.counts[("fp32.d16", reason)] >= 4
    assert [(entry["asked"], entry["reason"]) for entry in handovers.written()] == [("fp32.d16", reason)]
    problem = Problem.parse("fp32.d16@b2.h4.q50.k50")
    assert any("handed over" in step and reason in step for step in serving.explain(problem, HERE).steps)
    handovers.counts.clear()
    assert any("in 1 process:" in step for step in serving.explain(problem, HERE).steps), "another process's"
    found = doctor._handovers()
    assert not found.good and "invalid device context" in found.detail and str(handovers.file()) in found.remedy
    handovers.file().unlink()
    assert doctor._handovers().good
    for number in range(2 * handovers.MOST):
        handovers.note("fp32.d16", ValueError(number))
    assert len(handovers.counts) <= handovers.MOST + 1 and handovers.counts[("fp32.d16", "other reasons")] > 1


def test_a_loaded_kernel_loses_no_gradient_in_silence() -> None:
    kernel, x = elsa_tune.load("fp32.d16@b1.h2.q4.k4"), torch.randn(1, 2, 4, 16)
    with pytest.raises(WrongArguments, match="no gradients"):
        kernel(x.clone().requires_grad_(), x, x)
    with torch.no_grad():
        assert kernel(x.clone().requires_grad_(), x, x).shape == x.shape
