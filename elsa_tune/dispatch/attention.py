"""attention(query, key, value): look up, call; torch's own SDPA serves whatever no kernel of ours may.

The hot path is one dictionary look-up and one foreign call. Everything else happens once per shape.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from elsa_tune.device import Device, detect, of_tensor
from elsa_tune.dispatch import exactness, handovers
from elsa_tune.dispatch.choose import Choice, choose, choose_as_exact
from elsa_tune.dispatch.gradients import differentiable
from elsa_tune.errors import ElsaTuneError, KernelMissing, WrongArguments
from elsa_tune.generate import backends
from elsa_tune.generate import kernel_cache as _kernel_cache
from elsa_tune.generate.backends import Built, Call, Gradients, Kernel, Operands
from elsa_tune.generate.render import Source
from elsa_tune.generate.tensors import by_name
from elsa_tune.measurement import Winner
from elsa_tune.order import joined, order_of
from elsa_tune.parts import element as elements
from elsa_tune.problem import Problem
from elsa_tune.prove import check
from elsa_tune.remember import layers, winners
from elsa_tune.space import Space
from elsa_tune.tuning.clock import tf32_allowed
from elsa_tune.variant import Variant

_MOST_SHAPES = 4096
"""Shapes remembered before the table starts anew: a growing key cache makes a new one at every step."""

_PLAIN = frozenset((Tensor, torch.nn.Parameter))
_FLOAT32 = torch.float32
_is_compiling = torch.compiler.is_compiling
_grad_enabled = torch.is_grad_enabled
_autocast = torch._C._is_any_autocast_enabled
_dispatch_modes = torch._C._len_torch_dispatch_stack  # fake tensors, counters and tracers want to see torch's own call
_is_tracing = torch._C._is_tracing  # a recorded trace would hold the allocation of the output, and no kernel
_transforms = torch._C._functorch.peek_interpreter_stack  # functorch's tensors have no memory of their own
_SCALES = frozenset((type(None), float))


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch's scaled_dot_product_attention, by the fastest kernel measured on this device.

    query [batch, heads, q_len, head_dim], key [batch, kv_heads, kv_len, head_dim], value [batch, kv_heads, kv_len,
    value_dim], no mask or causal: float32 on a CPU where no gradient is needed, float32, float16 and bfloat16 on a GPU,
    gradients included, served by a tuned kernel where one is faster. Everything else, and every shape that is not tuned,
    goes to torch. The output's memory follows the query's. Raises what torch raises, and WrongArguments (a ValueError) for
    mistakes that torch's fused CPU kernel lets pass: key and value of different lengths, a mask together with is_causal, a
    mask on another device.
    """
    if (
        attn_mask is None
        and not dropout_p
        and not _is_compiling()  # before what older compilers do not understand
        and (type(query) in _PLAIN and type(key) in _PLAIN and type(value) in _PLAIN)
        and type(is_causal) is bool is type(enable_gqa)
        and not _dispatch_modes()
        and not _is_tracing()
        and forward_ad._current_level < 0
        and _transforms() is None
    ):
        if type(scale) is int:
            scale = float(scale)
        try:
            entry = _entry(query, key, value, is_causal, enable_gqa)
        except RuntimeError:  # nested tensors have no shape
            return _torch_attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        if exactness.active:
            entry = (*entry, exactness.asked())
        serve = _serving.get(entry)
        if serve is None:
            serve = _serving_for(entry, query, key, value, is_causal, enable_gqa)
        if serve is not _torch_serves and type(scale) in _SCALES and not _autocast():
            try:
                if not (_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)):
                    return serve(query, key, value, scale)
                gradients = _gradients_for(entry, query, key, value, is_causal, enable_gqa)
                if gradients is not None:
                    return differentiable(query, key, value, scale, serve, gradients)
            except Exception as error:  # no storage of its own (vmap), no memory for splits, a failed launch
                _hand_over(error, query, key, value, is_causal, enable_gqa)
    return _torch_attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)


def serve_with_lse(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float | None, enable_gqa: bool
) -> tuple[Tensor, Tensor] | None:
    """The output and its log-sum-exp [batch, heads, q_len] by a kernel that is ready, or None."""
    plain = type(query) in _PLAIN and type(key) in _PLAIN and type(value) in _PLAIN and type(scale) in _SCALES
    observed = _dispatch_modes() or _is_tracing() or forward_ad._current_level >= 0 or _transforms() is not None
    needs_grad = _grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    if not plain or needs_grad or _is_compiling() or _autocast() or observed:
        return None
    entry = _entry(query, key, value, is_causal, enable_gqa)
    if exactness.active:
        entry = (*entry, exactness.asked())
    serve = _serving.get(entry) or _serving_for(entry, query, key, value, is_causal, enable_gqa)
    if serve is _torch_serves:
        return None
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    try:
        return serve(query, key, value, scale, None, lse), lse
    except Exception as error:
        _hand_over(error, query, key, value, is_causal, enable_gqa)
        return None


def _hand_over(error: Exception, query: Tensor, key: Tensor, value: Tensor, is_causal: bool, enable_gqa: bool) -> None:
    """Count that torch answers in a kernel's place."""
    with suppress(Exception):
        problem = problem_of(query, key, value, is_causal, enable_gqa)
        handovers.note(problem.family if problem else "a tensor without memory of its own", error)


def _entry(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, enable_gqa: bool) -> _Key:
    """Where the tables keep what was decided for such tensors."""
    layout = (query.shape, key.shape, value.shape, query.stride(), key.stride(), value.stride(), is_causal, enable_gqa)
    if query.dtype is key.dtype is value.dtype is _FLOAT32 and query.is_cpu and key.is_cpu and value.is_cpu:
        return layout
    return layout, _place(query, key, value)


def _place(query: Tensor, key: Tensor, value: Tensor) -> object:
    """What decides on a GPU who serves, beside shapes: dtype, GPU, whether a graph is being captured, torch's setting."""
    if not (query.is_cuda and query.device == key.device == value.device and query.dtype is key.dtype is value.dtype):
        return query.dtype, key.dtype, value.dtype, query.device, key.device, value.device
    return query.dtype, query.device, torch.cuda.is_current_stream_capturing(), tf32_allowed()


def _torch_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, is_causal: bool,
    scale: float | None, enable_gqa: bool,
) -> Tensor:  # fmt: skip
    """torch's function, kept away from what its fused CPU kernel gets wrong: causal with a scale of 0 or less, a float32
    mask with a float64 query, and mistakes it lets pass."""
    dense = isinstance(key, Tensor) and isinstance(value, Tensor) and not key.is_nested and not value.is_nested
    if dense and key.dim() >= 2 and value.dim() >= 2 and key.shape[-2] != value.shape[-2]:
        raise WrongArguments(
            f"key {tuple(key.shape)} and value {tuple(value.shape)} differ in length; both must have kv_len rows"
        )
    if attn_mask is not None and is_causal:
        raise WrongArguments(
            "attn_mask and is_causal are both given; fold causality into the mask, or drop one of them"
        )
    if attn_mask is not None and attn_mask.device != query.device:
        raise WrongArguments(f"attn_mask is on {attn_mask.device}, query on {query.device}; move the mask there")
    arguments: dict[str, Any] = {
        "attn_mask": attn_mask,
        "dropout_p": dropout_p,
        "is_causal": is_causal,
        "scale": scale,
        "enable_gqa": enable_gqa,
    }
    causal_without_scale = is_causal and scale is not None and scale <= 0
    mixed_mask = attn_mask is not None and attn_mask.dtype not in (query.dtype, torch.bool)
    if (causal_without_scale or mixed_mask) and query.device.type == "cpu":
        with sdpa_kernel(SDPBackend.MATH):
            return scaled_dot_product_attention(query, key, value, **arguments)
    return scaled_dot_product_attention(query, key, value, **arguments)


def _torch_serves(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    operands: Operands = (),
) -> Tensor:
    raise AssertionError("a mark in the table, never called")


# Once per shape.

_Key = tuple[object, ...]
_serving: dict[_Key, Call] = {}
_gradients: dict[_Key, Gradients | None] = {}
_lock = threading.RLock()


def _serving_for(entry: _Key, query: Tensor, key: Tensor, value: Tensor, is_causal: bool, enable_gqa: bool) -> Call:
    """Decide who serves a shape, and remember it."""
    shelf = _shelf
    like = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") for x in (query, key, value)]

    def ready(kernel: Kernel) -> None:
        if shelf is _shelf:  # nothing was tuned meanwhile
            _serving[entry] = kernel.bind(*like)

    kernel = _ready_kernel(problem_of(query, key, value, is_causal, enable_gqa), query, ready)
    if len(_serving) >= _MOST_SHAPES:
        _serving.clear()
    return _serving.setdefault(entry, kernel.bind(query, key, value) if kernel else _torch_serves)


def _gradients_for(
    entry: _Key, query: Tensor, key: Tensor, value: Tensor, is_causal: bool, enable_gqa: bool
) -> Gradients | None:
    """The kernel for a shape's gradients, if one is faster than torch's, decided once."""
    if entry not in _gradients:
        shelf = _shelf

        def ready(kernel: Gradients) -> None:
            if shelf is _shelf:
                _gradients[entry] = kernel

        problem = problem_of(query, key, value, is_causal, enable_gqa)
        backward = problem.reshaped(direction="backward") if problem else None
        found = _ready_kernel(backward, query, ready)
        if len(_gradients) >= _MOST_SHAPES:
            _gradients.clear()
        _gradients.setdefault(entry, found)
    return _gradients[entry]


def _ready_kernel(problem: Problem | None, query: Tensor, ready: Callable[[Any], object]) -> Any:
    """A kernel that serves the problem now, or None; then ``ready`` is called if one is built later. Never raises."""
    try:
        device = of_tensor(query.device.type, query.device.index)
        return _shelf.kernel(problem, device, ready) if problem and device else None
    except Exception as error:  # dispatch never raises because of databases, compilers or caches
        _shelf.troubles[str(problem)] = f"{type(error).__name__}: {error}"
        handovers.note(problem.family if problem else "a device", error)
        return None


_DTYPES = {getattr(torch, elements.get(name).torch): name for name in elements.names()}


def problem_of(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, enable_gqa: bool) -> Problem | None:
    """The problem these tensors pose, or None if no kernel of ours is meant for such tensors.

    On a GPU, torch's setting that lets float32 matrix products use TF32 is read as the class tf32.
    """
    if not (query.dtype == key.dtype == value.dtype and query.dim() == key.dim() == value.dim() == 4):
        return None
    if not (query.device == key.device == value.device and query.dtype in _DTYPES):
        return None
    batch, heads, q_len, head_dim = query.shape
    _, kv_heads, kv_len, value_dim = value.shape
    if key.shape != (batch, kv_heads, kv_len, head_dim) or value.shape[0] != batch or 0 in (*query.shape, *value.shape):
        return None
    if heads != kv_heads and (not enable_gqa or heads % kv_heads):
        return None
    rough = query.is_cuda and query.dtype == torch.float32 and tf32_allowed()
    captured = query.is_cuda and torch.cuda.is_current_stream_capturing()
    return Problem(
        dtype=_DTYPES[query.dtype], precision="tf32" if rough else "", launch="graph" if captured else "eager",
        head_dim=head_dim, value_dim=value_dim, mask="causal" if is_causal else "none",
        batch=batch, heads=heads, kv_heads=kv_heads, q_len=q_len, kv_len=kv_len,
        order=joined(*(order_of(x.shape, x.stride()) for x in (query, key, value))),
    )  # fmt: skip


class _Shelf:
    """Winners of this device, read once per process, and the kernels loaded or being built because of them."""

    def __init__(self) -> None:
        self.troubles: dict[str, str] = {}
        self._layers: list[layers.Layer] | None = None
        self._families: dict[tuple[object, ...], list[Winner]] = {}
        self._exact: dict[tuple[Problem, Device, float], Choice] = {}
        self._below: dict[Device, set[tuple[str, str]]] = {}
        self._kernels: dict[tuple[str, str], Any] = {}  # (family, variant) -> Kernel or Gradients
        self._hopeless: set[tuple[str, str]] = set()  # (family, variant) that could not be built or is wrong here
        self._building: SimpleQueue[Callable[[], object]] | None = None

    def choice(self, problem: Problem, device: Device) -> Choice:
        """Who should serve a problem, and why: asked of its own winner, of its family's, then of those that differ in
        dimensions. A family is read once, then kept in memory."""
        if exactness.active and (times := exactness.asked()) is not None:
            return self._as_exact(problem, device, times)
        chosen = choose(problem, device, self._known("problem", problem, device), set())
        if chosen.rung != "exact":
            slower = self._slower(device)
            chosen = choose(problem, device, self._known("family", problem, device), slower)
            if chosen.winner is None:
                chosen = choose(problem, device, self._known("akin", problem, device), slower)
        if chosen.by_sdpa and problem.precision == "tf32":  # more exact than asked is welcome
            return self.choice(problem.reshaped(precision="fp32"), device)
        return chosen

    def _known(self, reach: str, problem: Problem, device: Device) -> list[Winner]:
        """Winners for the very problem on the very device, for its family, or for families akin to it."""
        kinds: dict[str, tuple[object, ...]] = {
            "problem": (problem,),
            "family": (problem.family,),
            "akin": (problem.dtype, problem.mask, problem.score, problem.precision, problem.direction),
        }
        entry = (str(device), reach, *kinds[reach])
        with _lock:
            if entry not in self._families:
                if len(self._families) >= _MOST_SHAPES:
                    self._families.clear()
                if reach == "problem":
                    found = layers.winners_of(problem, device, self._layers or layers.nearest_first())
                    if not found or found[0].layer != "own":
                        self._every_layer()  # a team's database that was not read yet may know better
                else:
                    wanted = problem.akin if reach == "akin" else problem.family.__eq__
                    found = layers.known_winners(device, self._every_layer(), wanted)
                self._families[entry] = found
            return self._families[entry]

    def _as_exact(self, problem: Problem, device: Device, times: float) -> Choice:
        entry = (problem, device, times)
        with _lock:
            if entry not in self._exact:
                if len(self._exact) >= _MOST_SHAPES:
                    self._exact.clear()
                self._exact[entry] = choose_as_exact(problem, device, times, self._layers or layers.nearest_first())
            return self._exact[entry]

    def _slower(self, device: Device) -> set[tuple[str, str]]:
        with _lock:
            if device not in self._below:
                self._below[device] = layers.slower_than_sdpa(device, self._every_layer())
            return self._below[device]

    def _every_layer(self) -> list[layers.Layer]:
        """All layers, opened once; the team's that have changed are read again beside the calls."""
        if self._layers is None:
            self._layers = layers.layers()
            for source in layers.stale():
                self._later(partial(_reread, source))
        return self._layers

    def kernel(self, problem: Problem, device: Device, ready: Callable[[Any], object]) -> Any:
        """A kernel that serves now, or None: then torch serves, until a build in the background calls ``ready``."""
        chosen = self.choice(problem, device)
        if chosen.variant is None or chosen.winner is None or chosen.by_sdpa:
            return None
        problem = chosen.problem
        name = (problem.family, str(chosen.variant))

        def attempt() -> None:
            if name in self._hopeless:  # another shape asked for it meanwhile, in vain
                return
            try:
                ready(self.build(problem, device, chosen))
            except Exception:
                self._hopeless.add(name)
                raise

        with _lock:
            loaded = self._kernels.get(name)
            if loaded is None and (built := self._trusted(chosen)):
                loaded = self._load(chosen.variant, problem, built)
            if loaded is None and name not in self._hopeless:
                self._later(attempt)
        return loaded

    def build(self, problem: Problem, device: Device, chosen: Choice) -> Any:
        """Compile the chosen variant if needed, and check it here unless it was measured here. Raises KernelMissing."""
        assert chosen.variant is not None
        with _lock:
            loaded = self._kernels.get((problem.family, str(chosen.variant)))
        if loaded is not None:
            return loaded
        if built := self._trusted(chosen):
            return self._load(chosen.variant, problem, built)
        backend = backends.get(chosen.variant.backend)
        built = backend.build(chosen.variant, problem, device)
        if not _kernel_cache.checked(built.digest, str(device)):  # somebody else's winner, used here for the first time
            kernel = backend.load(built, chosen.variant, problem)
            longest = check.longest(chosen.variant, problem, device)
            verdict = check.check_family(kernel, problem, [], device=device.torch, longest=longest)
            if verdict.reason:
                raise KernelMissing(f"{chosen.variant} is wrong on this device: {verdict.reason}; torch's SDPA serves")
            _kernel_cache.note_checked(built.digest, str(device))
        return self._load(chosen.variant, problem, built)

    def _trusted(self, chosen: Choice) -> Built | None:
        """The very kernel that was checked and measured on this device for this family, if it is still built."""
        winner, variant = chosen.winner, chosen.variant
        if winner is None or variant is None or winner.layer != "own" or winner.rung != "exact":
            return None
        if winner.measurement.family != chosen.problem.family or winner.measurement.is_of_faulty_code:
            return None
        return backends.get(variant.backend).find(winner.measurement.digest)

    def _load(self, variant: Variant, problem: Problem, built: Built) -> Any:
        kernel = backends.get(variant.backend).load(built, variant, problem)
        with _lock:
            return self._kernels.setdefault((problem.family, str(variant)), kernel)

    def _later(self, job: Callable[[], object]) -> None:
        if self._building is None:
            self._building = SimpleQueue()
            threading.Thread(target=self._work, args=(self._building,), name="elsa-tune-build", daemon=True).start()
        self._building.put(job)

    def _work(self, jobs: SimpleQueue[Callable[[], object]]) -> None:
        while True:
            try:
                jobs.get()()
            except Exception as error:
                self.troubles["background build"] = f"{type(error).__name__}: {error}"
                handovers.note("a kernel built beside the calls", error)


_shelf = _Shelf()


def _reread(source: str) -> None:
    layers.refresh(source)
    refresh()


def refresh() -> None:
    """Forget what was read: the next call looks at the database again."""
    global _shelf
    with _lock:
        _shelf = _Shelf()
        _serving.clear()
        _gradients.clear()


winners.listeners.append(refresh)


def explain(problem: Problem, device: Device) -> Choice:
    """Which rung answers a problem, what the rungs before it said, and where torch had to answer in its place."""
    chosen = _shelf.choice(problem, device)
    return replace(chosen, steps=(*chosen.steps, *handovers.told(problem.family)))


# A kernel as an object.


@dataclass(frozen=True, slots=True)
class LoadedKernel:
    """A kernel chosen for a problem: call it, and ask what it is.

    ``rung`` is how it was chosen (see elsa_tune.dispatch.choose), ``error`` the measured error relative to max|v| (None if
    it was measured for another shape or device), ``ratio`` its measured advantage over torch's SDPA.
    """

    problem: Problem
    device: Device
    variant: Variant
    rung: str
    error: float | None
    ratio: float | None
    _kernel: Kernel

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None = None,
        lse: Tensor | None = None,
        operands: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """Attention for any shape of the problem's family; ``lse`` [batch, heads, q_len], float32 and contiguous, receives
        the log-sum-exp. ``operands`` are those of its mask and scores by name: numbers, by default the problem's own, and tensors,
        like ``lengths``, int64 [batch]. Raises WrongArguments for other tensors."""
        posed = problem_of(query, key, value, is_causal=False, enable_gqa=True)
        family = posed and posed.reshaped(mask=self.problem.mask, score=self.problem.score).family
        if family != self.problem.family:
            shapes = ", ".join(str(tuple(x.shape)) for x in (query, key, value))
            raise WrongArguments(
                f"query, key, value {shapes} are not of family {self.problem.family}; use elsa_tune.attention"
            )
        if not self.problem.declared:
            return self._kernel(query, key, value, scale, None, lse)
        given = by_name(self.problem, operands or {}, query, key)
        return self._kernel(query, key, value, scale, None, lse, given)

    @property
    def source(self) -> Source | None:
        """The rendered code; None if torch's own kernel serves."""
        return backends.get(self.variant.backend).source(self.variant, self.problem)


def load(problem: Problem | str, device: str = "auto") -> LoadedKernel:
    """The best known kernel for a problem, built now if it must be. Raises BadProblem, BadDevice, KernelMissing.

    ``device`` auto is the CPU, or the first GPU for what only GPUs serve.
    """
    wanted = Problem.parse(problem) if isinstance(problem, str) else problem
    found = detect(device)
    here = next((d for d in found if wanted.dtype == "fp32" or d.is_gpu), found[0])
    chosen = _shelf.choice(wanted, here)
    measured = chosen.winner.measurement if chosen.winner else None
    if chosen.by_sdpa:
        variant = chosen.variant or next(Space.load("sdpa").variants(wanted, here))
        kernel = backends.get("sdpa").load(Built(str(variant)), variant, wanted)
    else:
        assert chosen.variant is not None
        variant = chosen.variant
        try:
            kernel = _shelf.build(chosen.problem, here, chosen)
        except ElsaTuneError as error:
            raise KernelMissing(f"{variant} cannot be built for {wanted}: {error}") from error
    here_exactly = chosen.rung == "exact"
    return LoadedKernel(
        wanted, here, variant, chosen.rung, measured.error if measured and here_exactly else None,
        measured.ratio if measured else None, kernel,
    )  # fmt: skip
