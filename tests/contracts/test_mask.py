"""What every mask promises: bounds that grow, a picture drawn by hand, torch's own form, and what is derived from bounds."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

from elsa_tune.errors import BadProblem
from elsa_tune.generate import operands as given
from elsa_tune.generate.posed import Posed
from elsa_tune.masks import AttnMask
from elsa_tune.parts import mask
from elsa_tune.parts.bound import Bound
from elsa_tune.parts.mask import Mask
from elsa_tune.parts.operand import Array
from elsa_tune.problem import Problem

BOUNDED = [name for name in mask.names() if mask.of_one_file(name).cuts_front or mask.of_one_file(name).cuts_back]
PAIRS = ["+".join(two) for two in itertools.combinations(BOUNDED, 2)]
LENGTHS = [(1, 1), (1, 9), (9, 1), (7, 7), (5, 12), (12, 5), (33, 50)]


def examples(one: Mask, q_len: int, kv_len: int) -> list[dict[str, Any]]:
    """Its integers and limits in each of its examples, of one sequence: an integer, or by position an array."""
    sizes = {"batch": 1, "q_len": q_len, "kv_len": kv_len}
    turns = max(len(one.examples), *[len(limit.hostile) for limit in one.by_position], 1)
    made = [dict(one.examples[turn % len(one.examples)]) for turn in range(turns)]
    for limit in one.by_position:
        for turn, example in enumerate(made):
            example[limit.name] = np.broadcast_to(limit.hostile[turn % len(limit.hostile)](sizes), (1, q_len))[0].copy()
    return made


def at(own: dict[str, Any], position: int) -> dict[str, int]:
    return {name: x if isinstance(x, int) else int(x[position]) for name, x in own.items()}


def by_rows(own: dict[str, Any]) -> dict[str, Any]:
    return {name: x if isinstance(x, int) else torch.as_tensor(x)[:, None] for name, x in own.items()}


def by_definition(one: Mask, q_len: int, kv_len: int, own: dict[str, Any]) -> list[list[bool]]:
    """Each key asked of each position, in Python's integers."""

    def sees(position: int) -> list[bool]:
        names = {"position": position, "q_len": q_len, "kv_len": kv_len, **at(own, position)}
        low, high = one.low.value(**names), one.high.value(**names)
        return [low <= key < high for key in range(kv_len)]

    return [sees(position) for position in range(q_len)]


def cases(one: Mask) -> Iterator[tuple[int, int, dict[str, Any]]]:
    for q_len, kv_len in LENGTHS:
        for own in examples(one, q_len, kv_len):
            yield q_len, kv_len, own


@pytest.mark.parametrize("name", [*mask.names(), *PAIRS])
class TestContract:
    def test_bounds_grow_with_the_position(self, name: str) -> None:
        one = mask.get(name)
        for q_len, kv_len, own in cases(one):
            seen = [one.seen(i, q_len, kv_len, **at(own, i)) for i in range(q_len)]
            assert seen == sorted(seen) and sorted(high for _, high in seen) == [high for _, high in seen]
            assert all(0 <= low <= kv_len and 0 <= high <= kv_len for low, high in seen)

    def test_dense_and_counted(self, name: str) -> None:
        one = mask.get(name)
        for q_len, kv_len, own in cases(one):
            expected = by_definition(one, q_len, kv_len, own)
            dense = one.dense(q_len, kv_len, **by_rows(own))
            assert dense.shape == (q_len, kv_len) and dense.tolist() == expected
            assert one.pairs(q_len, kv_len, **own) == sum(map(sum, expected))

    def test_lengths_of_several_sequences_at_once(self, name: str) -> None:
        """Positions of sequences that follow one another, with lengths of their own."""
        one = mask.get(name)
        each = [(i, q_len, kv_len, at(own, i)) for q_len, kv_len, own in cases(one) for i in range(q_len)]
        position, q_len, kv_len = (torch.tensor([row[n] for row in each]) for n in range(3))
        own = {name: torch.tensor([row[3][name] for row in each]) for name in each[0][3]}
        low, high = one.seen(position, q_len, kv_len, **own)
        expected = [one.seen(*row[:3], **row[3]) for row in each]
        assert list(zip(low.tolist(), high.tolist(), strict=True)) == expected

    def test_examples_cut_inside_small_shapes(self, name: str) -> None:
        one = mask.get(name)
        of_sequences = {limit.name for limit in one.limits if limit not in one.by_position}
        assert all(set(example) == {*one.integers, *of_sequences} for example in one.examples)
        cut = [one.pairs(12, 12, **own) < 144 for own in examples(one, 12, 12)]
        assert any(cut) or not (one.cuts_front or one.cuts_back)

    def test_what_a_tile_skips_and_need_not_test(self, name: str) -> None:
        """Keys that some position of a tile sees lie in [low(first), high(last)), those that all see fill [low(last), high(first))."""
        one = mask.get(name)
        for (q_len, kv_len, own), rows in itertools.product(cases(one), (1, 4, 8)):
            dense = torch.tensor(by_definition(one, q_len, kv_len, own))
            for first in range(0, q_len, rows):
                last = min(first + rows, q_len) - 1
                by_first, by_last = (one.seen(i, q_len, kv_len, **at(own, i)) for i in (first, last))
                (low, common_high), (common_low, high) = by_first, by_last
                tile = dense[first : last + 1]
                assert not tile[:, :low].any() and not tile[:, high:].any()
                assert tile[:, common_low : max(common_low, common_high)].all()


@pytest.mark.parametrize("name", [name for name in (*mask.names(), *PAIRS) if not mask.get(name).by_position])
def test_positions_that_see_a_key(name: str) -> None:
    one = mask.get(name)
    for q_len, kv_len, own in cases(one):
        dense = by_definition(one, q_len, kv_len, own)
        for key in range(kv_len):
            first, end = one.seeing(key, q_len, kv_len, **own)
            assert [first <= i < end for i in range(q_len)] == [row[key] for row in dense]


@pytest.mark.parametrize("name", [name for name in mask.names() if not mask.of_one_file(name).tested])
def test_the_picture_drawn_by_hand(name: str) -> None:
    one = mask.of_one_file(name)
    drawn = [[cell == "x" for cell in row] for row in one.picture.split()]
    own = by_rows(examples(one, len(drawn), len(drawn[0]))[0])
    assert one.dense(len(drawn), len(drawn[0]), **own).tolist() == drawn


Own = dict[str, Any]


def _whole(x: torch.Tensor, *sizes: int) -> list[Any]:
    nested: list[Any] = x.expand(sizes).tolist()
    return nested


def _dense(own: Own, b: int, h: int, i: int, j: int) -> bool:
    return bool(_whole(own["dense"], *SIZES)[b][h][i][j])


def _blocks(own: Own, b: int, h: int, i: int, j: int) -> bool:
    rows, columns = -(-Q_LEN // own["blockq"]), -(-KV_LEN // own["blockk"])
    return bool(_whole(own["blocks"], BATCH, HEADS, rows, columns)[b][h][i // own["blockq"]][j // own["blockk"]])


def _blocks_partial(own: Own, b: int, h: int, i: int, j: int) -> bool:
    q, k = own["partialq"], own["partialk"]
    kind = _whole(own["partial"], BATCH, HEADS, -(-Q_LEN // q), -(-KV_LEN // k))[b][h][i // q][j // k]
    if kind < 2:
        return bool(kind)
    words = -(-k // 32)
    word = own["bits"].tolist()[((kind - 2) * q + i % q) * words + j % k // 32]
    return bool(word % 2**32 // 2 ** (j % k % 32) % 2)


def _columns(first: str, end: str) -> Callable[..., bool]:
    def sees(own: Own, b: int, h: int, i: int, j: int) -> bool:
        low, high = (_whole(own[x], BATCH, KV_HEADS, KV_LEN)[b][h * KV_HEADS // HEADS][j] for x in (first, end))
        return i not in range(low, high)

    return sees


IN_PYTHON: dict[str, Callable[..., bool]] = {
    "dense": _dense,
    "blocks": _blocks,
    "blocks_partial": _blocks_partial,
    "columns": _columns("hidefrom", "hideto"),
    "columns_upper": _columns("upperfrom", "upperto"),
}
"""Each test of pairs in Python's own words, of its operands and of where a pair is."""

SIZES = BATCH, HEADS, Q_LEN, KV_LEN = 2, 4, 9, 50
KV_HEADS = 2


@pytest.mark.parametrize("name", [n for n in mask.names() if mask.of_one_file(n).tested])
class TestOfPairs:
    def test_each_pair_by_definition(self, name: str) -> None:
        shape = {"batch": BATCH, "heads": HEADS, "kv_heads": KV_HEADS, "q_len": Q_LEN, "kv_len": KV_LEN}
        family = Problem(head_dim=1, mask=name, **shape)
        for turn in range(given.turns(family)):
            problem = given.with_example(family, turn)
            for operands in (given.typical(problem), given.example(problem, turn)):
                own = given.named(problem, operands)
                found = _whole(Posed(problem, own, torch.device("cpu")).dense(), *SIZES)
                for b, h, i, j in itertools.product(range(BATCH), (0, HEADS - 1), range(Q_LEN), range(KV_LEN)):
                    assert found[b][h][i][j] is IN_PYTHON[name](own, b, h, i, j), (turn, b, h, i, j)

    def test_what_a_race_is_run_with_cuts_and_is_the_same_again(self, name: str) -> None:
        sizes = {"batch": 2, "heads": 2, "q_len": 512, "kv_len": 512}
        problem = given.with_example(Problem(head_dim=1, mask=name, **sizes))
        once, again = (given.typical(problem) for _ in range(2))
        assert all(torch.equal(torch.as_tensor(x), torch.as_tensor(y)) for x, y in zip(once, again, strict=True))
        share = float(Posed(problem, given.named(problem, once), torch.device("cpu")).dense().float().mean())
        assert 0.1 < share < 0.9


@pytest.mark.parametrize(
    ("text", "own", "drawn"),
    [
        ("blocks", {"blockq": 2, "blockk": 3, "blocks": [[True, False], [False, True], [True, True]]}, "xxx. xxx. ...x ...x xxxx"),
        ("blocks_partial", {"partialq": 2, "partialk": 3, "partial": [[2, 0], [1, 3]], "bits": [1, 5, -2, 6]}, "x... x.x. xxx. xxx."),
        ("columns", {"hidefrom": [2, 0, 1, 9], "hideto": [9, 1, 3, 9]}, "x.xx xx.x .x.x .xxx"),
        ("columns_upper", {"upperfrom": [0, 0, 0, 0], "upperto": [0, 1, 2, 3]}, "x... xx.. xxx. xxxx"),
        ("causal+columns", {"hidefrom": [2, 2, 4, 4], "hideto": [2**31 - 1]}, "x... xx.. ..x. ..xx"),
    ],
)  # fmt: skip
def test_pairs_drawn_by_hand(text: str, own: dict[str, Any], drawn: str) -> None:
    """A line a position: x where a key is seen."""
    rows = [[cell == "x" for cell in row] for row in drawn.split()]
    found = AttnMask(text, operands=own).dense(1, 1, len(rows), len(rows[0]))
    assert found.reshape(len(rows), -1).tolist() == rows


@pytest.mark.parametrize("text", ["blocks@b1.h1.q4.k4.blockq0.blockk4", "blocks@b1.h1.q4.k4.blockq4.blockk1048577"])
def test_blocks_of_no_size_are_refused(text: str) -> None:
    with pytest.raises(BadProblem, match="blockq from 1 to 1048576"):
        Problem.parse(f"fp32.d16.{text}")


@pytest.mark.parametrize("name", [n for n in mask.names() if mask.of_one_file(n).torchs])
def test_torchs_own_form(name: str) -> None:
    one = mask.of_one_file(name)
    forms = {"is_causal": causal_upper_left, "causal_lower_right": causal_lower_right}
    for q_len, kv_len in LENGTHS:
        assert one.dense(q_len, kv_len).tolist() == forms[one.torchs](q_len, kv_len)._materialize().tolist()


def test_a_million_positions_are_counted_at_once() -> None:
    assert mask.get("causal").pairs(1 << 20, 1 << 20) == (1 << 19) * ((1 << 20) + 1)
    estimated = mask.get("causal").pairs(1 << 26, 1 << 26)
    assert abs(estimated / ((1 << 25) * ((1 << 26) + 1)) - 1) < 1e-6


@pytest.mark.parametrize("text", ["banded", "window+causal", "causal+causal", "causal+none", "causal+", ""])
def test_misspelled(text: str) -> None:
    with pytest.raises(BadProblem, match="unknown|spelled"):
        mask.get(text)


def test_every_mask_is_one_short_file_and_their_integers_differ() -> None:
    ones = [mask.of_one_file(name) for name in mask.names()]
    operands = [operand.name for one in ones for operand in one.operands]
    assert len(set(operands)) == len(operands) and [one.name for one in ones] == list(mask.names())


def test_each_sequence_of_a_batch_has_its_own_bounds() -> None:
    """Unequal lengths, none, too many, and fewer than none: [batch, q_len, kv_len] by hand."""
    seen = mask.get("causal+lengths").dense(3, 4, lengths=torch.tensor([2, 0, 9, -1])[:, None, None])
    drawn = ["x... xx.. xx..", ".... .... ....", "x... xx.. xxx.", ".... .... ...."]
    assert [[["x."[not cell] for cell in row] for row in one] for one in seen] == [
        [list(row) for row in one.split()] for one in drawn
    ]


def test_limits_by_position_grow_in_races_too_and_what_may_fall_is_refused() -> None:
    for name in mask.names():
        for limit in mask.of_one_file(name).by_position:
            for q_len, kv_len in ((1, 1), (3, 400), (4096, 77)):
                drawn = np.asarray(limit.typical({"batch": 2, "q_len": q_len, "kv_len": kv_len}))
                assert (
                    drawn.shape[-1] == q_len
                    and (np.diff(drawn) >= 0).all()
                    and 0 <= drawn.min() <= drawn.max() <= kv_len
                )
    of_positions = Array("last", "int64", ("batch", "q_len"), lambda sizes: [[0]])
    assert Mask("grows", "", high=Bound("min(last, position + 1)"), arrays=(of_positions,)).by_position == (
        of_positions,
    )
    with pytest.raises(ValueError, match="not seen to grow"):
        Mask("falls", "", high=Bound("kv_len - last"), arrays=(of_positions,))


def test_what_is_counted_by_position_is_a_typical_batch() -> None:
    """Sixteen sequences that see themselves; of many positions as many are counted as fit memory."""
    each = [35 + 31 * n for n in range(16)]
    pairs = Problem(head_dim=4, mask="ranges", q_len=sum(each), kv_len=sum(each)).seen_pairs
    assert pairs == sum(n * n for n in each)
    many = Problem(head_dim=4, mask="ranges", q_len=sum(each) << 12, kv_len=sum(each), batch=3).seen_pairs
    assert abs(many / (pairs << 12) - 1) < 1e-3


def test_an_array_that_nothing_reads_is_refused() -> None:
    """Or it would be rendered as no mask at all."""
    array = Array("kept", "bool", ("batch", "kv_len"), lambda sizes: [[True]])
    with pytest.raises(ValueError, match="nothing reads kept"):
        Mask("kept", "what is kept", arrays=(array,))
    assert Mask("kept", "what is kept", arrays=(array,), test=lambda kept, **place: kept).tested


def test_what_is_counted_of_sequences_is_a_typical_batch() -> None:
    (array,) = mask.get("lengths").arrays
    for batch, kv_len in ((1, 1), (1, 4096), (3, 100), (64, 17)):
        drawn = array.typical({"batch": batch, "kv_len": kv_len})
        assert (
            len(drawn) == batch and all(kv_len // 2 <= n <= kv_len and n > 0 for n in drawn) and drawn == sorted(drawn)
        )
