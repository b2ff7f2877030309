"""What nobody wrote a text of is refused by its name, everywhere: it never renders as another part, nor as none."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import jinja2
import pytest
import torch

import elsa_tune
from elsa_tune import parts, places, space
from elsa_tune import problem as problems
from elsa_tune.device import Device, host_cpu, named
from elsa_tune.dispatch import serving
from elsa_tune.errors import BadProblem, BadVariant, ElsaTuneError, KernelMissing
from elsa_tune.generate import backends, lawful, laws
from elsa_tune.generate.cuda import laws as cuda_laws
from elsa_tune.measurement import Measurement
from elsa_tune.parts.bound import Bound
from elsa_tune.problem import Problem
from elsa_tune.prove import reference
from elsa_tune.remember import foreign
from elsa_tune.remember.database import Database
from elsa_tune.ship import export, kit
from elsa_tune.space import Space
from elsa_tune.variant import Variant

KINDS = sorted(path.parent.name for path in Path(parts.__path__[0]).glob("*/__init__.py"))
BY_TORCH = {"score": "its function"}
"""Kinds of which a part says in torch's operations what it does: torch's own, plain operations serve what is planted, as what it is."""

CLOSED = {"mask": "its bounds", "scan": "its rounds"}
"""Kinds of which a part says everything itself: no text is needed, and what is planted is rendered as what it is."""

FIELDS = {field.name for field in fields(Problem)}
GENERATED = backends.candidates()
DEVICES = {"cpp": "zen4", "cuda": "sm_75", "triton": "sm_90"}
PLANTED = "planted"


def field_of(kind: str) -> str | None:
    """The field of a problem that names a part of the kind, or None where an axis does."""
    return next((name for name in ({"element": "dtype"}.get(kind, kind), f"{kind}s") if name in FIELDS), None)


def axes_of(kind: str) -> list[str]:
    """Backends of which an axis names parts of the kind."""
    return [name for name in GENERATED if any(axis.name == kind for axis in Space.read(name).axes)]


def forget(package: ModuleType) -> None:
    for value in vars(package).values():
        if hasattr(value, "cache_clear"):
            value.cache_clear()


Plant = Callable[..., None]


@pytest.fixture
def plant(tmp_path: Path) -> Iterator[Plant]:
    """Drops a file ``planted.py`` in a kind's folder, as whoever adds a part does: one of that kind, but for its name and what else
    is given."""
    planted: list[ModuleType] = []

    def add(kind: str, like: str, **changes: Any) -> None:
        package = import_module(f"elsa_tune.parts.{kind}")
        constant = kind.upper()
        made = replace(getattr(import_module(f"{package.__name__}.{like}"), constant), name=PLANTED, **changes)
        (tmp_path / kind).mkdir()
        (tmp_path / kind / f"{PLANTED}.py").write_text(f"{constant} = None\n")
        package.__path__.append(str(tmp_path / kind))
        planted.append(package)
        forget(package)
        forget(problems)
        setattr(import_module(f"{package.__name__}.{PLANTED}"), constant, made)

    yield add
    for package in planted:
        package.__path__.remove(str(tmp_path / package.__name__.rpartition(".")[2]))
        del sys.modules[f"{package.__name__}.{PLANTED}"]
        delattr(package, PLANTED)
        forget(package)
    forget(problems)


def planted_problem(kind: str, plant: Plant) -> Problem:
    """A problem of a part that is in its registry, and has no text in any language; torch knows it no better."""
    package = import_module(f"elsa_tune.parts.{kind}")
    more: dict[str, dict[str, Any]] = {
        "element": {"torch": PLANTED},
        "operator": {"torchs": ""},
        "mask": {"high": Bound("position + 3"), "torchs": ""},
    }
    like = {"element": "fp32", "mask": "causal"}.get(kind, package.names()[0])
    plant(kind, like, **more.get(kind, {}))
    field = field_of(kind)
    assert field is not None
    precision = {"precision": "fp32"} if kind == "element" else {}
    return Problem(**{field: PLANTED, **precision}, head_dim=64, heads=2, q_len=64, kv_len=64)


OF_FAMILIES = [kind for kind in KINDS if field_of(kind)]
OF_AXES = [(kind, backend) for kind in KINDS for backend in axes_of(kind)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_is_named_by_a_problem_or_an_axis(kind: str) -> None:
    assert field_of(kind) or axes_of(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_in_no_registry_is_refused_by_name(kind: str) -> None:
    package = import_module(f"elsa_tune.parts.{kind}")
    with pytest.raises(ElsaTuneError, match=f"'{PLANTED}' is unknown"):
        package.get(PLANTED)
    if field := field_of(kind):
        with pytest.raises(BadProblem, match=PLANTED):
            Problem(**{field: PLANTED}, head_dim=64)  # type: ignore[arg-type]
        with pytest.raises(BadProblem, match=PLANTED):
            Problem.parse(f"{PLANTED}.d64" if kind == "element" else f"fp32.d64.{PLANTED}")
    for backend in axes_of(kind):
        values = Space.read(backend).parse(Space.read(backend).start[0]).axes
        with pytest.raises(BadVariant, match=PLANTED):
            Space.read(backend).variant({**values, kind: PLANTED})
    assert not any(PLANTED in str(Space.read(backend).start) for backend in axes_of(kind))


@pytest.mark.parametrize("kind", [kind for kind in OF_FAMILIES if kind not in CLOSED])
class TestPlantedInAFamily:
    def test_every_backend_refuses_it(self, kind: str, plant: Plant) -> None:
        problem = planted_problem(kind, plant)
        for name in GENERATED if kind in BY_TORCH else backends.names():
            device = named(DEVICES.get(name, "sm_90"))
            assert PLANTED in str(backends.get(name).refusal(problem, device)), name
        for name in GENERATED:
            variant = Space.read(name).parse(Space.read(name).start[0])
            with pytest.raises(jinja2.TemplateNotFound, match=PLANTED):
                backends.get(name).source(variant, problem)

    def test_what_ships_refuses_it(self, kind: str, plant: Plant, tmp_path: Path, home: Path) -> None:
        problem = planted_problem(kind, plant)
        for device in ("sm_75", "opencl", "aarch64"):
            assert PLANTED in str(export.refusal(problem, named(device)))
            with pytest.raises(KernelMissing, match=PLANTED):
                export.export(problem, device)
            with pytest.raises(KernelMissing, match=PLANTED):
                kit.make(device, tmp_path / "kit", [problem])

    def test_dispatch_refuses_it(self, kind: str, plant: Plant, home: Path) -> None:
        problem = planted_problem(kind, plant)
        if kind in BY_TORCH:
            assert elsa_tune.load(problem).variant.backend in backends.rivals()
            return
        with pytest.raises(ElsaTuneError, match=PLANTED):
            elsa_tune.load(problem)


def test_a_planted_score_is_served_as_its_function(plant: Plant, home: Path) -> None:
    plant("score", "softcap", function=lambda score, **own: score * 3, reals=(), examples=({},))
    problem = Problem(score=PLANTED, head_dim=64, heads=2, q_len=64, kv_len=64)
    x = reference.random_inputs(problem, torch.Generator().manual_seed(0))
    truth = (x.query.double() @ x.key.double().mT * 3 / 8).softmax(-1) @ x.value.double()
    assert torch.allclose(elsa_tune.load(problem)(*x.tensors).double(), truth, rtol=0, atol=1e-5)
    rows = reference.attention_rows(problem, x, reference.every_row(problem)).view(1, 2, 64, 64)
    assert torch.allclose(rows, truth, rtol=0, atol=1e-12)


def test_the_oracle_refuses_an_element_that_torch_has_not(plant: Plant) -> None:
    problem = planted_problem("element", plant)
    with pytest.raises(BadProblem, match=PLANTED):
        reference.random_inputs(problem, torch.Generator())


@pytest.mark.parametrize("backend", GENERATED)
def test_a_planted_mask_is_rendered_as_its_bounds(backend: str, plant: Plant) -> None:
    problem = planted_problem("mask", plant)
    device = named(DEVICES[backend])
    assert backends.get(backend).refusal(problem, device) is None
    variant = Space.read(backend).parse(Space.read(backend).start[0])
    digests = set()
    for mask in (PLANTED, "causal", "none"):
        source = backends.get(backend).source(variant, problem.reshaped(mask=mask))
        assert source is not None
        digests.add(source.digest)
    assert len(digests) == 3
    hidden = ~problem.dense()
    x = reference.random_inputs(problem, torch.Generator().manual_seed(0))
    scores = (x.query.double() @ x.key.double().mT / 8).masked_fill(hidden, -torch.inf)
    truth = reference.attention_rows(problem, x, reference.every_row(problem)).view(1, 2, 64, 64)
    assert torch.allclose(scores.softmax(-1) @ x.value.double(), truth, rtol=0, atol=1e-12)
    peer = backends.get("sdpa").load(backends.get("sdpa").build(SDPA, problem), SDPA, problem)
    assert torch.allclose(peer(x.query, x.key, x.value).double(), truth, rtol=0, atol=1e-5)


SDPA = Space.read("sdpa").parse(Space.read("sdpa").start[0])


def test_a_test_of_pairs_without_a_text_is_refused(plant: Plant, tmp_path: Path, home: Path) -> None:
    """It is no bound: rendered without its text, it would be no mask at all."""
    plant("mask", "none", test=lambda position, key, **place: position != key, placed=True)
    problem = Problem(mask=PLANTED, head_dim=16, heads=2, q_len=40, kv_len=40)
    for name in GENERATED:
        reason = str(backends.get(name).refusal(problem, named(DEVICES[name])))
        assert f"no text for the mask {PLANTED}" in reason, name
        variant = Space.read(name).parse(Space.read(name).start[0])
        with pytest.raises(jinja2.TemplateNotFound, match=PLANTED):
            backends.get(name).source(variant, problem)
    for device in ("sm_75", "opencl", "zen4"):
        assert PLANTED in str(export.refusal(problem, named(device)))
        with pytest.raises(KernelMissing, match=PLANTED):
            kit.make(device, tmp_path / "kit", [problem])
    x = reference.random_inputs(problem, torch.Generator().manual_seed(0))
    scores = (x.query.double() @ x.key.double().mT / 4).masked_fill(torch.eye(40, dtype=torch.bool), -torch.inf)
    truth = scores.softmax(-1) @ x.value.double()
    rows = reference.attention_rows(problem, x, reference.every_row(problem)).view(1, 2, 40, 16)
    assert torch.allclose(rows, truth, rtol=0, atol=1e-12)
    assert torch.allclose(elsa_tune.load(problem)(*x.tensors).double(), truth, rtol=0, atol=1e-5)


def test_what_ships_refuses_bounds_that_it_does_not_know(plant: Plant) -> None:
    problem = planted_problem("mask", plant)
    for device in ("sm_75", "opencl", "zen4"):
        assert PLANTED in str(export.refusal(problem, named(device)))


def first(backend: str, problem: Problem, device: Device) -> Variant:
    return lawful.starts(Space.read(backend), problem, device)[0]


@pytest.mark.parametrize(("kind", "backend"), [pair for pair in OF_AXES if pair[0] not in CLOSED])
def test_an_axis_value_without_a_text_is_refused(kind: str, backend: str, plant: Plant) -> None:
    problem = Problem.parse("fp32.d64@b1.h8.q512.k512")
    device = named(DEVICES[backend])
    variant = first(backend, problem, device)
    plant(kind, str(variant.axes[kind]))
    wider = wider_space(kind, backend)
    assert lawful.refusal(wider.variant(variant.axes), problem, device) is None
    other = wider.variant({**variant.axes, kind: PLANTED})
    reason = str(lawful.refusal(other, problem, device))
    assert reason.startswith(f"{kind}_has_text: ") and PLANTED in reason
    with pytest.raises(jinja2.TemplateNotFound, match=PLANTED):
        backends.get(backend).source(other, problem)


Offer = Callable[[str, str], None]


@pytest.fixture
def offer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Offer]:
    """Names what is planted in a backend's search space, too."""

    def also(kind: str, backend: str) -> None:
        read, wider = space._read, wider_space(kind, backend)
        monkeypatch.setattr(space, "_read", lambda name: wider if name == backend else read(name))
        space.parse.cache_clear()

    forget(foreign)
    yield also
    space.parse.cache_clear()
    forget(foreign)


def wider_space(kind: str, backend: str) -> Space:
    known = Space.read(backend)
    axes = [replace(a, values=(*a.values, PLANTED)) if a.name == kind else a for a in known.axes]
    return replace(known, axes=tuple(axes))


def won(variant: Variant, problem: Problem, device: Device, digest: str = "") -> Measurement:
    """A final that nothing speaks against."""
    return Measurement(
        device=str(device), problem=str(problem), variant=str(variant), status="ok", stage="final", error=1e-7,
        digest=digest, seconds=1e-3, ratio=3.0, ratio_low=2.9, ratio_high=3.1, incumbent="sdpa.flash", created=1.0,
    )  # fmt: skip


def record(*rows: Measurement) -> None:
    with Database.for_writing() as database:
        for row in rows:
            database.record(row)
    serving.refresh()


POSED = Problem.parse("fp32.d64@b1.h8.q512.k512")
OWN = {"cpp": host_cpu(), "cuda": named("opencl"), "triton": named("sm_90")}
"""Devices whose winners are recorded; headers are compiled for none of them."""


@pytest.mark.parametrize("offered", [False, True], ids=["in no space", "in its space"])
@pytest.mark.parametrize(("kind", "backend"), [pair for pair in OF_AXES if pair[0] not in CLOSED])
class TestPlantedInAWinner:
    def recorded(self, kind: str, backend: str, offered: bool, plant: Plant, offer: Offer) -> tuple[Variant, Variant]:
        """A winner of what is planted, and one for a shape nearby of what its part was copied from."""
        device = OWN[backend]
        sound = first(backend, POSED, device)
        plant(kind, str(sound.axes[kind]))
        strange = wider_space(kind, backend).variant({**sound.axes, kind: PLANTED})
        assert PLANTED in str(strange)
        if offered:
            offer(kind, backend)
        digest = backends.get(backend).build(sound, POSED).digest if backend == "cpp" else ""
        record(won(strange, POSED, device, digest), won(sound, POSED.reshaped(q_len=600, kv_len=600), device))
        return strange, sound

    def test_dispatch_falls_to_the_next_rung(
        self, kind: str, backend: str, offered: bool, plant: Plant, offer: Offer, home: Path
    ) -> None:
        strange, sound = self.recorded(kind, backend, offered, plant, offer)
        chosen = serving.explain(POSED, OWN[backend])
        assert (chosen.variant, chosen.rung) == (sound, "neighbour"), chosen.steps
        refused = f"exact: {strange}, won {POSED}: {kind}_has_text: no text for the {kind} {PLANTED}"
        assert chosen.steps[0].startswith(refused) == offered and PLANTED not in chosen.steps[-1]
        if backend == "cpp":  # though the digest it names is that of a kernel which is there
            assert elsa_tune.load(POSED).variant == sound
            places.database().unlink()
            record(won(strange, POSED, OWN[backend], backends.get(backend).build(sound, POSED).digest))
            assert elsa_tune.load(POSED).variant.backend in backends.rivals()

    def test_what_ships_leaves_it_out(
        self, kind: str, backend: str, offered: bool, plant: Plant, offer: Offer, home: Path, tmp_path: Path
    ) -> None:
        strange, sound = self.recorded(kind, backend, offered, plant, offer)
        device, speaks = OWN[backend], backends.get(backend).no_header(POSED) is None
        found = export.best(POSED, device)
        assert strange not in found and (not speaks or found[0] == sound)
        if speaks:
            made = [export.export(POSED, str(device)), *kit.make(str(device), tmp_path / "kit", [POSED])]
            assert made[0].variant == made[1].variant == sound and strange not in {one.variant for one in made}
            assert not any(PLANTED in path.read_text() for path in (tmp_path / "kit").rglob("*") if path.is_file())
            with pytest.raises(jinja2.TemplateNotFound, match=PLANTED):
                export.header(strange, POSED)

    def test_nobody_else_may_name_it_but_where_it_is_offered(
        self, kind: str, backend: str, offered: bool, plant: Plant, offer: Offer, home: Path
    ) -> None:
        strange, _ = self.recorded(kind, backend, offered, plant, offer)
        line = won(strange, POSED, OWN[backend]).line
        if offered:  # then laws refuse it, as above
            assert foreign.sound(line).variant == str(strange)
            return
        with pytest.raises(ValueError, match=f"variant: .*'{PLANTED}' is not understood"):
            foreign.sound(line)


@pytest.mark.parametrize(("kind", "backend"), OF_AXES)
def test_every_value_of_an_axis_is_a_part_with_a_text(kind: str, backend: str) -> None:
    values = next(axis.values for axis in Space.read(backend).axes if axis.name == kind)
    assert set(values) <= set(import_module(f"elsa_tune.parts.{kind}").names())
    if kind not in CLOSED:
        texts = Path(__file__).parents[2] / "templates" / backend / kind
        assert {path.stem for path in texts.glob("*.j2")} == set(values), (
            "a text that no axis offers, or none for a value"
        )


def test_a_state_is_carried_for_its_own_operator(plant: Plant) -> None:
    problem = planted_problem("operator", plant)
    assert PLANTED in str(laws.state_is_of_operator("triple", problem))
    assert laws.state_is_of_operator("triple", Problem(head_dim=64)) is None


def test_a_rough_way_to_an_exponential_is_in_no_exact_class(plant: Plant) -> None:
    plant("exp", "native", error=lambda degree: 0.03)
    for family in ("fp32.d64", "fp16.d64", "fp32.strict.d64"):
        assert "errs" in str(cuda_laws.exp_is_exact(PLANTED, Problem.parse(family)))
    assert cuda_laws.exp_is_exact("native", Problem.parse("fp32.strict.d64")) is None
