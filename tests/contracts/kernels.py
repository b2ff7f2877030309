"""What every kernel must do, whatever language rendered it: hostile inputs, strides, groups, repeatability, log-sum-exp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from elsa_tune.generate import operands as given
from elsa_tune.generate.backends import Call, Kernel
from elsa_tune.generate.operands import with_example
from elsa_tune.generate.tensors import lse_dtype
from elsa_tune.order import CONTIGUOUS, ORDERS
from elsa_tune.parts import element as elements
from elsa_tune.parts import mask as masks
from elsa_tune.parts import score as parts_of_scores
from elsa_tune.parts.score import farthest
from elsa_tune.problem import Problem
from elsa_tune.prove import check, reference


def obeys(
    kernel: Kernel, problem: Problem, peers: list[Kernel], keys: int = 1500, longest: int = reference.LONG
) -> None:
    """The whole contract; repeatability with ``keys`` keys, hostile inputs of up to ``longest``."""
    verdict = check.check_family(kernel, problem, peers, longest=longest)
    assert not verdict.reason, verdict.reason
    problem = with_example(problem)
    call = calling(kernel, problem)
    strides(call, problem)
    same_bits_again(call, problem, keys)
    inputs_untouched(call, problem)
    log_sum_exp(call, problem)


def calling(kernel: Kernel, problem: Problem) -> Call:
    """The kernel with the problem's numbers, and arrays that all sequences share."""

    def call(query: Tensor, key: Tensor, value: Tensor, *more: Any, **named: Any) -> Tensor:
        return kernel(query, key, value, *more, operands=given.typical(_posed(problem, query, key, 1)), **named)

    return call


def _posed(problem: Problem, query: Tensor, key: Tensor, batch: int) -> Problem:
    shape = {"heads": query.shape[1], "kv_heads": key.shape[1], "q_len": query.shape[2], "kv_len": key.shape[2]}
    return problem.reshaped(batch=batch, **shape)


def logits(problem: Problem, query: Tensor, key: Tensor, operands: tuple[Any, ...]) -> Tensor:
    """float64 scores [batch, heads, q_len, kv_len] as softmax meets them, -inf where no key is seen; behind them, of scores that are
    terms, one more each."""
    posed = _posed(problem, query, key, query.shape[0])
    own = given.named(posed, operands)
    scores = query.double() @ key.double().repeat_interleave(posed.group, 1).mT / posed.head_dim**0.5
    where = _pairs(posed)
    mask, chain = masks.get(posed.mask), parts_of_scores.get(posed.score)
    limits = given.limits_at(posed, own, batch=where["batch"][..., :1], position=where["position"][..., :1])
    seen = posed.dense(**limits) & torch.as_tensor(mask.passes(own, **where))
    scores = chain.of(scores, own, **where).masked_fill(~seen, float("-inf"))
    terms = [own[term.name].double()[:, None, None].expand(*scores.shape[:3], 1) for term in chain.terms]
    return torch.cat([scores, *terms], -1)


def _pairs(posed: Problem) -> dict[str, Any]:
    """Where each pair is, tensors [batch, heads, q_len, kv_len]."""
    lengths = (posed.batch, posed.heads, posed.q_len, posed.kv_len)
    place = torch.meshgrid(*(torch.arange(n) for n in lengths), indexing="ij")
    where: dict[str, Any] = dict(zip(("batch", "head", "position", "key"), place, strict=True))
    return where | {"kv_head": where["head"] // posed.group, "behind": posed.kv_len - posed.q_len}


def factors(problem: Problem, operands: tuple[Any, ...]) -> Tensor | float:
    """What weights are multiplied by, [batch, heads, q_len, kv_len]."""
    found = parts_of_scores.get(problem.score).factor(given.named(problem, operands), **_pairs(problem))
    return 1.0 if found is None else found


def _inputs(problem: Problem, **shape: int) -> tuple[Problem, reference.Inputs]:
    shaped = problem.reshaped(batch=2, heads=2 * problem.group, kv_heads=2, **{"q_len": 29, "kv_len": 83, **shape})
    return shaped, reference.random_inputs(shaped, torch.Generator().manual_seed(5))


def strides(kernel: Call, problem: Problem) -> None:
    """The same values from any memory layout: views of larger tensors, expanded batches, reversed storage order."""
    _, x = _inputs(problem)
    expected = kernel(x.query, x.key, x.value)

    def padded(t: Tensor) -> Tensor:
        big = torch.full((*t.shape[:2], t.shape[2] + 3, t.shape[3] + 5), float("nan"), dtype=t.dtype)
        big[:, :, 1:-2, 2:-3] = t
        return big[:, :, 1:-2, 2:-3]

    def last_stride_two(t: Tensor) -> Tensor:
        return torch.stack([t, t], -1).flatten(-2)[..., ::2]

    for layout in (padded, last_stride_two, lambda t: t.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2)):
        assert torch.equal(kernel(*map(layout, (x.query, x.key, x.value))), expected)
    for order in ORDERS:
        y = x.ordered([order] * 3)
        assert torch.equal(kernel(y.query, y.key, y.value), expected), order
    one = kernel(x.query[:1], x.key[:1], x.value[:1])
    again = kernel(
        x.query[:1].expand(3, -1, -1, -1), x.key[:1].expand(3, -1, -1, -1), x.value[:1].expand(3, -1, -1, -1)
    )
    weighing = parts_of_scores.get(problem.score).weighing  # by what differs between batch entries
    assert weighing or all(torch.equal(again[i], one[0]) for i in range(3))


def same_bits_again(kernel: Call, problem: Problem, keys: int) -> None:
    """No result depends on which thread came first."""
    _, x = _inputs(problem, kv_len=keys)
    first = kernel(x.query, x.key, x.value)
    assert all(torch.equal(kernel(x.query, x.key, x.value), first) for _ in range(5))


def inputs_untouched(kernel: Call, problem: Problem) -> None:
    """Inputs keep every bit."""
    _, x = _inputs(problem)
    copies = [t.clone() for t in (x.query, x.key, x.value)]
    kernel(x.query, x.key, x.value)
    assert all(torch.equal(a, b) for a, b in zip(copies, (x.query, x.key, x.value), strict=True))


def log_sum_exp(kernel: Call, problem: Problem) -> None:
    """The log-sum-exp beside an output that asking for it does not change."""
    shaped, x = _inputs(problem, kv_len=97)
    lse = torch.full(x.query.shape[:3], float("nan"), dtype=lse_dtype(x.query))
    with_it = kernel(x.query, x.key, x.value, lse=lse)
    assert torch.equal(with_it, kernel(x.query, x.key, x.value))
    scores = logits(shaped, x.query, x.key, given.typical(shaped.reshaped(batch=1)))
    assert torch.allclose(lse.double(), torch.logsumexp(scores, -1), rtol=0, atol=allowed_of_lse(problem))


def allowed_of_lse(problem: Problem) -> float:
    """Error of a log-sum-exp of normal inputs: of sums in floats of states, or of scores summed in halves."""
    return (
        8e-3 if problem.precision == "approx" else 64 * elements.get(problem.dtype).unit
    )  # up to 8, and as much of more


def compute(
    kernel: Kernel,
    problem: Problem,
    aligned: bool = True,
    order: str = CONTIGUOUS,
    q_len: int = 29,
    kv_len: int = 53,
    group: int = 2,
) -> tuple[Tensor, Tensor, float]:
    """Output, log-sum-exp and their largest error as a share of what is allowed; two KV heads, rows aligned or not."""
    generator = torch.Generator().manual_seed(3)
    shape = {"batch": 2, "heads": 2 * group, "kv_heads": 2, "q_len": q_len, "kv_len": kv_len}
    dtype, posed = elements.get(problem.dtype).dtype, with_example(problem).reshaped(**shape)

    def tensor(heads: int, length: int, dim: int) -> Tensor:
        x = torch.randn(2, heads, length, dim, generator=generator).to(dtype)
        return x if aligned else torch.nn.functional.pad(x, (1, 2))[..., 1 : dim + 1]

    made = (
        tensor(2 * group, q_len, problem.head_dim),
        tensor(2, kv_len, problem.head_dim),
        tensor(2, kv_len, problem.value_dim),
    )
    q, k, v = reference.Inputs("", *made).ordered([order] * 3).tensors if order != CONTIGUOUS else made
    lse = torch.full(q.shape[:3], float("nan"), dtype=lse_dtype(q))
    operands = given.example(posed, 2)
    out = kernel(q, k, v, None, None, lse, operands)
    scores = logits(posed, q, k, operands)
    weights = scores.softmax(-1).nan_to_num()[..., :kv_len] * factors(posed, operands)
    truth = weights @ v.double().repeat_interleave(group, 1)
    of_out, of_lse = 64 * elements.precision(problem.precision).unit, allowed_of_lse(problem)
    sums = scores.logsumexp(-1)
    far = (lse == sums) | (sums < farthest(elements.get(problem.dtype).unit))  # -inf where no key is seen
    difference = torch.where(far, 0.0, (lse - sums) / (sums.abs() / 8).clip(min=1))
    error = max(float((out - truth).abs().max()) / of_out, float(difference.abs().max()) / of_lse)
    return out, lse, error


def far_logits(kernel: Kernel, problem: Problem) -> None:
    """Logits so large that their products with log2(e) are rounded by whole numbers: the largest alone counts, equal ones alike. All are
    whole numbers of few bits, so that whoever multiplies rounds nothing."""
    posed = with_example(problem).reshaped(batch=2, heads=4, kv_heads=2, q_len=29, kv_len=83)
    dtype, generator = elements.get(problem.dtype).dtype, torch.Generator().manual_seed(6)
    unit = 2.0**12 if dtype == torch.float16 else 2.0**40

    def tensor(heads: int, length: int) -> Tensor:
        return (torch.randint(-8, 9, (2, heads, length, problem.head_dim), generator=generator) * unit).to(dtype)

    query, key = tensor(4, 29), tensor(2, 83)
    value = torch.randn(2, 2, 83, problem.value_dim, generator=generator).to(dtype)
    lse = torch.full(query.shape[:3], float("nan"), dtype=lse_dtype(query))
    operands = given.example(posed, 2)
    out = kernel(query, key, value, 1.0, None, lse, operands)
    exact = query.double() @ key.double().repeat_interleave(2, 1).mT
    scores = exact.where(logits(posed, query, key, operands).isfinite(), float("-inf"))
    truth = scores.softmax(-1).nan_to_num() @ value.double().repeat_interleave(2, 1)
    assert float((out - truth).abs().max()) <= 64 * elements.precision(problem.precision).unit
    assert torch.allclose(lse.double(), scores.logsumexp(-1), rtol=16 * elements.get(problem.dtype).unit, atol=0)


def of_exact_sums(kernel: Kernel, problem: Problem, **shape: int) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of equal logits and whole values: sums are exact, so whoever merges what in whatever order gives the
    same bits, unless a key is lost or counted twice."""
    shaped = {"batch": 2, "heads": 4, "kv_heads": 2, "q_len": 29, "kv_len": 53, **shape}
    posed = with_example(problem).reshaped(**shaped)
    x = reference.random_inputs(posed, torch.Generator().manual_seed(4))
    value = (8 * x.value).round()
    lse = torch.full(x.query.shape[:3], float("nan"))
    return kernel(x.query, x.key, value, 0.0, None, lse, given.example(posed, 2)), lse
