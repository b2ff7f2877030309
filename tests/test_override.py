"""Programs that are not changed: torch's operator overridden, one variable, scopes, who was served."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import elsa_tune
from elsa_tune import masks
from elsa_tune.dispatch import exactness, handovers, ledger, serving
from elsa_tune.dispatch.torchs import OPERATOR
from elsa_tune.errors import BuildFailed
from elsa_tune.generate import backends, incumbent, lawful
from elsa_tune.generate.cpp import native
from elsa_tune.integrations import graphs, override
from elsa_tune.problem import Problem
from elsa_tune.space import Space, parse
from tests.test_dispatch import HERE, VARIANT, close, record, won

ROOT = Path(__file__).resolve().parent.parent
WAYS = ("extension", "Python")
FAMILIES = (
    "fp32.d16",
    "fp32.d16.causal",
    "fp32.d16.causal.bias",
    "fp32.d16.v8",
    "fp32.d16.bias",
    "fp32.d16.lengths",
    "fp64.d16",
    "bf16.d16",
    "bf16.d16.bias",
)
SHAPES = ("b2.h4.q50.k50", "b2.h4.kv2.q50.k50", "b1.h4.q600.k600")


def _lawful(problem: str) -> str:
    """The variant that test_dispatch records, or for elements that it is not lawful for another."""
    posed = Problem.parse(problem)
    wanted = parse(VARIANT)
    return str(
        wanted if lawful.refusal(wanted, posed, HERE) is None else lawful.starts(Space.read("cpp"), posed, HERE)[0]
    )


@pytest.fixture(scope="module", autouse=True)
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A home in which a kernel of ours won every family at every shape, and is built."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ELSA_TUNE_HOME", str(tmp_path_factory.mktemp("override") / "home"))
        record(*(won(f"{family}@{shape}", _lawful(f"{family}@{shape}")) for family in FAMILIES for shape in SHAPES))
        yield
    serving.refresh()


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The override in place, by the extension or by Python."""
    ledger.forget()
    serving.refresh()
    if request.param == "Python":

        def missing() -> Any:
            raise BuildFailed("no compiler here")

        monkeypatch.setattr(native, "load", missing)
    elsa_tune.enable()
    yield request.param
    elsa_tune.disable()


def of(family: str) -> int:
    """Calls of a family that a kernel of ours answered."""
    return sum(r.calls for r in elsa_tune.served() if r.problem.startswith(f"{family}@") and r.kernel != ledger.TORCH)


def tensors(
    heads: int = 4, kv_heads: int | None = None, n: int = 50, dtype: torch.dtype = torch.float32, batch: int = 2
) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(batch, h, n, 16).to(dtype) for h in (heads, kv_heads or heads, kv_heads or heads)]


def settle() -> None:
    """Until what is built beside calls is there."""
    deadline = time.monotonic() + 60
    while serving.current()._builder is not None and time.monotonic() < deadline:
        time.sleep(0.01)


CALLS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "plain": ("fp32.d16", {}, {}),
    "causal": ("fp32.d16.causal", {}, {"is_causal": True}),
    "scale": ("fp32.d16", {}, {"scale": 0.3}),
    "groups": ("fp32.d16", {"kv_heads": 2}, {"enable_gqa": True}),
    "bias": ("fp32.d16.bias", {}, {"attn_mask": torch.randn(50, 50)}),
    "bias of heads": ("fp32.d16.bias", {}, {"attn_mask": torch.randn(1, 4, 50, 50)}),
    "bool": (
        "fp32.d16.bias",
        {},
        {"attn_mask": (torch.rand(2, 1, 50, 50, generator=torch.Generator().manual_seed(1)) > 0.4)},
    ),
    "padding": ("fp32.d16.lengths", {"n": 600, "batch": 1}, {"attn_mask": torch.arange(600)[None, None, None] < 320}),
    "double": ("fp64.d16", {"dtype": torch.float64}, {}),
    "half": ("bf16.d16", {"dtype": torch.bfloat16}, {}),
    "mask of halves": ("bf16.d16.bias", {"dtype": torch.bfloat16}, {"attn_mask": torch.randn(50, 50).bfloat16()}),
}


@pytest.mark.parametrize("name", CALLS)
def test_plain_calls_are_served(name: str, way: str) -> None:
    family, shape, arguments = CALLS[name]
    q, k, v = tensors(**shape)
    scaled_dot_product_attention(q, k, v, **arguments)
    settle()
    for _ in range(3):
        got = scaled_dot_product_attention(q, k, v, **arguments)
    assert of(family) >= 3
    before = elsa_tune.served()
    elsa_tune.disable()
    expected = scaled_dot_product_attention(q, k, v, **arguments)
    assert elsa_tune.served() == before, "torch's own is in no row"
    assert got.stride() == expected.stride() and got.dtype == expected.dtype
    exact = 2e-2 if q.dtype == torch.bfloat16 else 2e-6
    assert torch.allclose(got, expected, rtol=0, atol=exact)


@pytest.mark.parametrize("name", CALLS)
def test_gradients_are_torchs_from_our_output_and_sums(name: str, way: str) -> None:
    family, shape, arguments = CALLS[name]

    def gradients() -> list[Tensor]:
        x = [t.requires_grad_() for t in tensors(**shape)]
        scaled_dot_product_attention(*x, **arguments).square().sum().backward()
        return [t.grad for t in x if t.grad is not None]

    gradients()
    settle()
    got = gradients()
    assert of(family) >= 1
    elsa_tune.disable()
    exact = 0.3 if shape.get("dtype") == torch.bfloat16 else 2e-5
    assert all(torch.allclose(a, b, rtol=0, atol=exact) for a, b in zip(got, gradients(), strict=True))


def test_rows_that_see_nothing(way: str) -> None:
    """Output and gradients 0, and torch's 0 as their log-sum-exp, or its backward pass makes NaN."""
    seen = torch.ones(50, 50, dtype=torch.bool)
    seen[7] = False
    x = [t.requires_grad_() for t in tensors()]
    scaled_dot_product_attention(*x, seen)
    settle()
    out = scaled_dot_product_attention(*x, seen)
    out.sum().backward()
    assert of("fp32.d16.bias") and not out[:, :, 7].any() and not any(t.grad.isnan().any() for t in x)
    assert not x[0].grad[:, :, 7].any()
    bias = torch.zeros(50, 50).masked_fill(~seen, float("-inf"))
    q, k, v = tensors()
    ours = getattr(torch.ops.aten, OPERATOR)(q, k, v, attn_mask=bias)[1]
    elsa_tune.disable()
    theirs = getattr(torch.ops.aten, OPERATOR)(q, k, v, attn_mask=bias)[1]
    assert torch.allclose(ours, theirs, atol=1e-5) and ours.stride() == theirs.stride()


def test_a_mask_and_is_causal_intersect(way: str) -> None:
    """As they do in torch's operator; its function refuses both."""
    q, k, v = tensors()
    bias = torch.randn(50, 50)
    operator = getattr(torch.ops.aten, OPERATOR)
    operator(q, k, v, 0.0, True, attn_mask=bias)
    settle()
    got = operator(q, k, v, 0.0, True, attn_mask=bias)[0]
    assert of("fp32.d16.causal.bias")
    elsa_tune.disable()
    assert close(got, operator(q, k, v, 0.0, True, attn_mask=bias)[0])


def test_a_mask_that_changes_in_place_is_read_anew(way: str) -> None:
    q, k, v = tensors(n=600, batch=1)
    mask = torch.zeros(1, 1, 1, 600)
    mask[..., 300:] = float("-inf")
    for end in (300, 450, 600):
        mask[..., :end] = 0
        scaled_dot_product_attention(q, k, v, mask)
        settle()
        got = scaled_dot_product_attention(q, k, v, mask)
        assert close(got, incumbent.attention(q, k, v, mask))
    mask[..., 5] = -1.5  # no padding any more
    assert close(scaled_dot_product_attention(q, k, v, mask), incumbent.attention(q, k, v, mask))


LEFT_TO_TORCH: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "value_dim": lambda q, k, v: scaled_dot_product_attention(q, k, v[..., :8].contiguous()),
    "3-D": lambda q, k, v: scaled_dot_product_attention(q[0], k[0], v[0]),
    "3-D mask": lambda q, k, v: scaled_dot_product_attention(q, k, v, torch.zeros(4, 50, 50)),
    "mask that requires gradients": lambda q, k, v: scaled_dot_product_attention(
        q, k, v, torch.zeros(50, 50, requires_grad=True)
    ),
    "last stride": lambda q, k, v: scaled_dot_product_attention(q.mT.contiguous().mT, k, v),
    "broadcast batch": lambda q, k, v: scaled_dot_product_attention(q, k[:1], v[:1]),
    "empty": lambda q, k, v: scaled_dot_product_attention(q[:0], k[:0], v[:0]),
    "math": lambda q, k, v: _by_math(q, k, v),
    "dropout": lambda q, k, v: scaled_dot_product_attention(q, k, v, dropout_p=1e-30),
}


def _by_math(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize("name", LEFT_TO_TORCH)
def test_what_torch_keeps_for_itself_stays_as_it_is(name: str, way: str) -> None:
    q, k, v = tensors()
    got = LEFT_TO_TORCH[name](q, k, v)
    assert not elsa_tune.served(), "nobody of ours was asked"
    elsa_tune.disable()
    assert close(got, LEFT_TO_TORCH[name](q, k, v))


SERVED_IN_A_SCOPE = {name: LEFT_TO_TORCH[name] for name in ("value_dim", "last stride", "3-D mask")}


@pytest.mark.parametrize("name", SERVED_IN_A_SCOPE)
def test_a_scope_serves_what_torch_keeps_for_itself(name: str) -> None:
    q, k, v = tensors()
    expected = SERVED_IN_A_SCOPE[name](q, k, v)
    before = sum(r.calls for r in elsa_tune.served() if r.kernel == VARIANT)
    with elsa_tune.sdpa():
        got = SERVED_IN_A_SCOPE[name](q, k, v)
        settle()
        got = SERVED_IN_A_SCOPE[name](q, k, v)
    assert close(got, expected) and sum(r.calls for r in elsa_tune.served() if r.kernel == VARIANT) > before


def test_scopes_nest_end_with_exceptions_and_are_of_a_thread(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(
        "elsa_tune.integrations.scope.attention", lambda *given, **named: calls.append(threading.current_thread().name)
    )
    q, k, v = tensors()
    early = scaled_dot_product_attention

    def call() -> int:
        before = len(calls)
        early(q, k, v)
        return len(calls) - before

    with pytest.raises(ZeroDivisionError), elsa_tune.sdpa():
        assert call() == 1
        with elsa_tune.sdpa():
            assert call() == 1, "one scope answers"
        assert call() == 1
        outside: list[int] = []
        thread = threading.Thread(target=lambda: outside.append(call()))
        thread.start()
        thread.join()
        assert outside == [0]
        1 / 0  # noqa: B018
    assert call() == 0

    @elsa_tune.sdpa()
    def inside(depth: int) -> int:
        return call() + (inside(depth - 1) if depth else 0)

    assert inside(2) == 3 and call() == 0


def test_a_scope_takes_torchs_arguments_by_name_and_place(home: Path) -> None:
    q, k, v = tensors()
    mask = torch.rand(50, 50) > 0.5
    with elsa_tune.sdpa():
        both = scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=mask, scale=0.2)
        grouped = scaled_dot_product_attention(q, k[:, :2], v[:, :2], None, 0.0, True, enable_gqa=True)
        assert torch.nn.MultiheadAttention(16, 4, batch_first=True)(q[0], k[0], v[0])[0].shape == (4, 50, 16)
    assert close(both, scaled_dot_product_attention(q, k, v, mask, scale=0.2))
    assert close(grouped, scaled_dot_product_attention(q, k[:, :2], v[:, :2], is_causal=True, enable_gqa=True))


def test_enable_and_disable_again_and_from_threads(way: str) -> None:
    q, k, v = tensors()
    expected = incumbent.attention(q, k, v)
    stop, failures = threading.Event(), list[BaseException]()

    def work(step: Callable[[], Any]) -> None:
        try:
            while not stop.is_set():
                step()
        except BaseException as error:
            failures.append(error)

    def call() -> None:
        assert close(scaled_dot_product_attention(q, k, v), expected)

    threads = [
        threading.Thread(target=work, args=(step,)) for step in (call, call, elsa_tune.enable, elsa_tune.disable)
    ]
    for thread in threads:
        thread.start()
    time.sleep(1)
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures
    for _ in range(2):
        elsa_tune.enable()
    assert override.is_on()
    for _ in range(2):
        elsa_tune.disable()
    assert not override.is_on() and override.state()[1].startswith("off; torch answers")
    assert not incumbent.standing_in


def test_no_warning_is_shown_and_no_other_is_hidden() -> None:
    program = f"""
import warnings, torch, elsa_tune
elsa_tune.enable()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    warnings.warn("{OPERATOR} is theirs")
assert len(caught) == 1
"""
    done = _run(program)
    assert not done.stderr, done.stderr


def test_another_packages_override_is_noticed(home: Path) -> None:
    calls = []

    def theirs(keys: Any, *arguments: Any, **named: Any) -> Any:
        calls.append(arguments)
        return before.call_boxed(keys, *arguments, **named)

    q, k, v = tensors()
    before = torch.library.get_kernel(f"aten::{OPERATOR}", "CPU")
    library: Any = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library.impl(OPERATOR, theirs, "CPU", with_keyset=True)
    try:
        assert "another package answers" in override.state()[1]
        elsa_tune.enable()
        good, told = override.state()
        assert good and "by Python, for another package's override is behind it" in told and __file__ in told
        out = scaled_dot_product_attention(q, k, v)
        assert calls, "what no kernel of ours serves goes to whoever was there before"
        library._destroy()
        q = q[:, :, :20]
        gone = scaled_dot_product_attention(q, k, v)
        elsa_tune.disable()
        assert close(gone, scaled_dot_product_attention(q, k, v)), "whoever was there before may go first"
    finally:
        library._destroy()
    elsa_tune.enable()
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library.impl(OPERATOR, theirs, "CPU", with_keyset=True)
    try:
        good, told = override.state()
        assert not good and "overrode it later" in told and __file__ in told
    finally:
        library._destroy()
        elsa_tune.disable()
    assert close(out[:, :, :20], scaled_dot_product_attention(q, k, v))


def test_a_kernel_that_fails_hands_over(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = tensors()
    expected = incumbent.attention(q, k, v)
    monkeypatch.setattr(handovers, "counts", Counter())

    def broken(*arguments: Any) -> Tensor:
        raise MemoryError("planted")

    monkeypatch.setattr(
        serving, "find", lambda *about: serving.Serving(Problem.parse("fp32.d16"), ledger.Row(), call=broken)
    )
    assert torch.equal(scaled_dot_product_attention(q, k, v), expected)
    monkeypatch.setattr(serving, "find", broken)
    assert torch.equal(scaled_dot_product_attention(q, k, v), expected)
    assert any(asked == "fp32.d16" and "planted" in reason for asked, reason in handovers.counts), (
        "as explain looks for it"
    )


def test_who_stops_a_program_stops_it(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while a call is decided: it comes when the call, which is answered, is over."""
    q, k, v = tensors()
    expected = incumbent.attention(q, k, v)

    def stopped(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(serving, "find", stopped)
    got = None
    with pytest.raises(KeyboardInterrupt):
        got = scaled_dot_product_attention(q, k, v)
        time.sleep(5)
    assert got is None or torch.equal(got, expected)


def test_a_default_device_is_not_where_results_are(way: str) -> None:
    """Traced code has no mode that would say so."""
    q, k, v = tensors()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(scaled_dot_product_attention, (q, k, v))
    expected = traced(q, k, v)
    settle()
    torch.set_default_device("meta")
    try:
        serving.refresh()
        for _ in range(2):
            assert close(traced(q, k, v), expected)
            settle()
    finally:
        torch.set_default_device(None)
    assert of("fp32.d16")


def test_masks_of_halves_are_widened_once_a_call(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = tensors(dtype=torch.bfloat16)
    mask, widened = torch.randn(50, 50).bfloat16(), []
    scaled_dot_product_attention(q, k, v, mask)
    settle()
    original = masks.AttnMask.in_order

    def in_order(self: Any, *arguments: Any) -> Any:
        widened.append(self)
        return original(self, *arguments)

    monkeypatch.setattr(masks.AttnMask, "in_order", in_order)
    scaled_dot_product_attention(q, k, v, mask)
    assert len(widened) == 1


def test_torchs_errors_are_torchs(way: str) -> None:
    """What torch's kernel refuses is told in its words."""
    q, k, v = tensors()
    operator = getattr(torch.ops.aten, OPERATOR)
    with pytest.raises(RuntimeError, match="same data type|same dtype"):
        operator(q, k, v, attn_mask=torch.ones(50, 50, dtype=torch.bool))
    with pytest.raises(RuntimeError, match="^expected scalar type Float but found Double$"):
        operator(q, k.double(), v)


def test_second_derivatives_and_jvp_raise_as_without(way: str) -> None:
    q, k, v = (x.requires_grad_() for x in tensors())
    out = scaled_dot_product_attention(q, k, v)
    (first,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="not implemented"):
        first.sum().backward()
    with pytest.raises(NotImplementedError):
        torch.func.jvp(lambda x: scaled_dot_product_attention(x, k, v), (q.detach(),), (q.detach(),))


def test_accuracy_is_asked_of_each_call(way: str, home: Path) -> None:
    torchs = won(f"fp32.d16@{SHAPES[0]}", "sdpa.flash", ratio=1.0, error=2e-7)
    record(torchs, won(f"fp32.d16@{SHAPES[0]}", error=5e-7, ratio=2.0))
    elsa_tune.load(f"fp32.d16@{SHAPES[0]}", "cpu")
    q, k, v = tensors()

    def ours() -> bool:
        before = of("fp32.d16")
        scaled_dot_product_attention(q, k, v)
        return of("fp32.d16") > before

    ours()
    settle()
    assert ours() and ours()
    with elsa_tune.accuracy(1.0):
        assert not ours()
    assert ours() and ours() and exactness.active == 0


def test_rivals_are_torchs_own(way: str) -> None:
    """A race against ourselves would find every kernel of ours equal to torch's."""
    q, k, v = tensors()
    scaled_dot_product_attention(q, k, v)
    settle()
    before = elsa_tune.served()
    rival = elsa_tune.load("fp32.d16@b1.h1.q7.k7", "cpu")
    assert backends.role(str(rival.variant)) == "rival"
    got = rival(q, k, v)
    assert elsa_tune.served() == before
    with elsa_tune.sdpa():
        assert torch.equal(rival(q, k, v), got) and elsa_tune.served() == before, "in a scope, too"
    elsa_tune.disable()
    assert torch.equal(got, scaled_dot_product_attention(q, k, v))


def test_a_forked_child_is_served(way: str) -> None:
    """It has no threads of its parent's pool, nor its locks."""
    q, k, v = tensors()
    expected = scaled_dot_product_attention(q, k, v)
    settle()
    scaled_dot_product_attention(q, k, v)
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        before = of("fp32.d16")
        served = close(scaled_dot_product_attention(q, k, v), expected) and of("fp32.d16") == before + 1
        os.write(write, b"1" if served else b"0")
        os._exit(0)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not os.waitpid(pid, os.WNOHANG)[0]:
        time.sleep(0.01)
    assert os.read(read, 1) == b"1"


def test_rows_are_not_more_than_so_many(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "_rows", {})
    rows = [ledger.row(f"p{i % (2 * ledger.MOST)}", "k") for i in range(3 * ledger.MOST)]
    for row in rows:
        row.count(time.perf_counter())
    told = elsa_tune.served()
    assert sum(one.calls for one in told) == 3 * ledger.MOST and len(told) == ledger.MOST + 1
    assert next(one.calls for one in told if one.problem == ledger.OTHERS) == ledger.MOST


# One variable: each in a process of its own.


def _run(program: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True, timeout=120
    )


LOAD = "import elsa_tune_autoload, torch\nelsa_tune_autoload.load()\n"
"""As torch does where the package is installed by pip."""

CALL = "import torch\nq = torch.randn(1, 2, 64, 16)\nprint(torch.nn.functional.scaled_dot_product_attention(q, q, q).shape)\n"


def test_unset_it_imports_nothing_and_set_it_enables(tmp_path: Path) -> None:
    program = (
        LOAD + "import sys\nprint('elsa_tune' in sys.modules, sorted(torch.nn.attention.list_flash_attention_impls()))"
    )
    for off in ("", "0", "False"):
        assert _run(program, ELSA_TUNE=off).stdout.startswith("False ['ELSA'")
    program = LOAD + "from elsa_tune.integrations import override\nprint(override.state())"
    assert "(True, 'on, by" in _run(program, ELSA_TUNE="1", ELSA_TUNE_HOME=str(tmp_path)).stdout


def test_the_module_that_torch_imports_imports_os_alone() -> None:
    done = _run(
        "import sys\nbefore = set(sys.modules)\nimport elsa_tune_autoload\nprint(sorted(set(sys.modules) - before))"
    )
    assert done.stdout.strip() == "['elsa_tune_autoload']"


def test_torch_calls_it_where_the_package_is_installed(tmp_path: Path) -> None:
    (tmp_path / "elsa_tune_there-1.dist-info").mkdir()
    (tmp_path / "elsa_tune_there-1.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: elsa-tune-there\nVersion: 1\n"
    )
    (tmp_path / "elsa_tune_there-1.dist-info" / "entry_points.txt").write_text(
        "[torch.backends]\nthere = elsa_tune_autoload:load\n"
    )
    program = "import torch\nfrom elsa_tune.integrations import override\nprint(override.is_on())"
    done = _run(program, ELSA_TUNE="1", ELSA_TUNE_HOME=str(tmp_path / "home"), PYTHONPATH=f"{ROOT}:{tmp_path}")
    assert done.stdout.strip() == "True"


@pytest.mark.parametrize(
    "broken",
    [
        {"ELSA_TUNE_HOME": "/proc/nowhere"},
        {"CXX": "/bin/false", "PATH": "/nowhere"},
        {"ELSA_TUNE_DB": "/nowhere/at/all.db"},
    ],
    ids=["a home that cannot be written", "no compiler", "no database"],
)
def test_what_is_broken_breaks_no_program(broken: dict[str, str], tmp_path: Path) -> None:
    alone = "import sys\nsys.modules['ziglang'] = None\n"  # PyPI's compiler takes a minute to begin
    done = _run(alone + LOAD + CALL, **{"ELSA_TUNE": "1", "ELSA_TUNE_HOME": str(tmp_path / "home"), **broken})
    assert "torch.Size([1, 2, 64, 16])" in done.stdout


def test_a_corrupt_database_and_a_missing_dependency(tmp_path: Path) -> None:
    (tmp_path / "measurements.db").write_bytes(b"not a database" * 1000)
    done = _run(LOAD + CALL, ELSA_TUNE="1", ELSA_TUNE_HOME=str(tmp_path))
    assert "torch.Size([1, 2, 64, 16])" in done.stdout
    missing = "import sys\nsys.modules['platformdirs'] = None\n"
    done = _run(missing + LOAD + CALL, ELSA_TUNE="1", ELSA_TUNE_HOME=str(tmp_path))
    assert "torch.Size([1, 2, 64, 16])" in done.stdout and "is not enabled, torch serves" in done.stderr


def test_who_was_served_is_told_at_exit(tmp_path: Path) -> None:
    done = _run(LOAD + CALL, ELSA_TUNE="1", ELSA_TUNE_TRACE="1", ELSA_TUNE_HOME=str(tmp_path))
    assert "elsa-tune served" in done.stderr and "fp32.d16@b1.h2.q64.k64" in done.stderr and " torch " in done.stderr


def test_torchs_registry_of_implementations(home: Path) -> None:
    attention = torch.nn.attention
    if not hasattr(attention, "restore_flash_attention_impl"):
        pytest.skip("torch 2.10 has such a registry and no way back, torch before that has none")
    import elsa_tune_autoload

    elsa_tune_autoload.register()
    attention.activate_flash_attention_impl("ELSA")
    assert override.is_on() and attention.current_flash_attention_impl() == "ELSA"
    attention.restore_flash_attention_impl()
    assert not override.is_on()


# Compiled programs.


class _Model(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v) * 2


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("cpp_wrapper", [False, True], ids=["Python wrapper", "C++ wrapper"])
def test_compiled_programs_are_served(cpp_wrapper: bool, dynamic: bool, way: str) -> None:
    import torch._inductor.config as settings

    q, k, v = tensors()
    scaled_dot_product_attention(q, k, v)
    settle()
    torch._dynamo.reset()
    with settings.patch(cpp_wrapper=cpp_wrapper), torch.no_grad():
        compiled = torch.compile(_Model(), fullgraph=True, dynamic=dynamic)
        compiled(q, k, v)
        before = of("fp32.d16")
        got = compiled(q, k, v)
        assert of("fp32.d16") == before + 1
        elsa_tune.disable()
        expected = _Model()(q, k, v)
        assert close(got, expected) and close(compiled(q, k, v), expected), (
            "and torch serves it when nothing is enabled"
        )


def test_compiled_training_is_served(way: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(_Model(), fullgraph=True)
    x = [t.requires_grad_() for t in tensors()]
    compiled(*x)
    settle()
    before = of("fp32.d16")
    compiled(*x).square().sum().backward()
    assert of("fp32.d16") == before + 1
    elsa_tune.disable()
    y = [t.detach().clone().requires_grad_() for t in x]
    _Model()(*y).square().sum().backward()
    assert all(torch.allclose(a.grad, b.grad, rtol=0, atol=5e-5) for a, b in zip(x, y, strict=True))


def test_packages_of_aotinductor_are_served(way: str, tmp_path: Path) -> None:
    q, k, v = tensors()
    scaled_dot_product_attention(q, k, v)
    settle()
    with torch.no_grad():
        program = torch.export.export(_Model(), (q, k, v))
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        model = torch._inductor.aoti_load_package(package)
        before = of("fp32.d16")
        got = model(q, k, v)
        assert of("fp32.d16") == before + 1
        elsa_tune.disable()
        assert close(got, _Model()(q, k, v)) and close(model(q, k, v), got)
    elsewhere = f"import torch\nq = torch.ones(2, 4, 50, 16)\nprint(torch._inductor.aoti_load_package({package!r})(q, q, q).sum())"
    assert "tensor(12800.)" in _run(LOAD + elsewhere, ELSA_TUNE="").stdout, "also where nothing is enabled"


def test_the_graph_pass_keeps_who_was_there_before(home: Path) -> None:
    import torch._inductor.config as settings

    seen: list[Any] = []

    class Theirs:
        def __call__(self, graph: torch.fx.Graph) -> None:
            seen.append(graph)

        def uuid(self) -> str:
            return "theirs"

    theirs = Theirs()
    with settings.patch(post_grad_custom_pre_pass=theirs):
        graphs.install()
        ours = settings.post_grad_custom_pre_pass
        assert ours is not theirs and ours.uuid()[0] == "theirs"
        ours(torch.fx.Graph())
        assert len(seen) == 1
        graphs.install()
        assert settings.post_grad_custom_pre_pass is ours
        graphs.remove()
        assert settings.post_grad_custom_pre_pass is theirs
