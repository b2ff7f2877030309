"""What a run ends with: what was gained and what was not, in a line, and what to do with it."""

from __future__ import annotations

import math
import shlex
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from elsa_tune.device import Device
from elsa_tune.dispatch.serving import asks_for
from elsa_tune.parts.operand import Array
from elsa_tune.problem import Problem
from elsa_tune.tuning.report import Outcome


def lines(outcomes: Sequence[Outcome], program: str = "") -> list[str]:
    """What was gained, and how it is used: by ``program``, a command that the run was for, or by anybody's."""
    if program:
        return [gained(outcomes), f"Use it: ELSA_TUNE=1 {program}"]
    used = calls(outcomes) if any(o.winner and not o.winner.is_rival for o in outcomes) else []
    return [gained(outcomes), *used, *_next(outcomes)]


def gained(outcomes: Sequence[Outcome]) -> str:
    """Of how many problems who is faster than torch, and by how much."""
    if not outcomes:
        return "No problem was asked for: nothing was gained."
    won = [o.winner for o in outcomes if o.winner and not o.winner.is_rival]
    ratios = [winner.ratio for winner in won if not winner.measurement.disturbed]
    torchs = [o for o in outcomes if o.winner and o.winner.is_rival]
    untried = sum(o.tried == 0 for o in torchs)
    unsettled, none = len(won) - len(ratios), sum(o.winner is None for o in outcomes)
    told = [
        f"{len(ratios) or 'None'} of {len(outcomes)} problem{'s' * (len(outcomes) > 1)} {_are(max(1, len(ratios)))} {_faster(ratios)}"
    ]
    if len(torchs) > untried:
        told.append(f"of {len(torchs) - untried} torch's own kernel is the fastest of those measured, and serves")
    if untried:
        told.append(f"of {untried} no kernel of ours was tried yet: give a longer --budget")
    if unsettled:
        told.append(
            f"of {unsettled} a faster one is not settled, for others used the machine: run again when it is quiet"
        )
    if none:
        told.append(
            f"{none} could not be measured, and torch serves {'it' if none == 1 else 'them'}: see the notes, or give a longer --budget"
        )
    return f"{'; '.join(told)}."


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


def _faster(ratios: Sequence[float]) -> str:
    than = "faster than by torch's own kernels"
    if not ratios:
        return than
    if len(ratios) == 1:
        return f"{than}, {ratios[0]:.2f} times"
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    return f"{than}, {min(ratios):.2f} to {max(ratios):.2f} times, {mean:.2f} by the geometric mean"


def _next(outcomes: Iterable[Outcome]) -> list[str]:
    """What only a program's own calls can say: programs without a change are served, and recorded, on CPUs."""
    if not any(o.device.kind == "cpu" for o in outcomes):
        return []
    return [
        f"For your program, unchanged{_activation()}: elsa-tune run -- python your_program.py tunes what it asks, and then"
        " ELSA_TUNE=1 python your_program.py uses it."
    ]


def _activation() -> str:
    """What lets a shell find the command, and the Python that has it, where it does not: after `make tune`, for one."""
    script = Path(sys.prefix) / "bin" / "activate"
    if shutil.which("elsa-tune") or not script.is_file():
        return ""
    near = script.relative_to(Path.cwd()) if script.is_relative_to(Path.cwd()) else script
    return f" (first type: source {shlex.quote(str(near))})"


def calls(outcomes: Iterable[Outcome]) -> list[str]:
    """What serves the families of a run: attention() those that torch's function can pose, load() the others."""
    families = {o.problem.family: o for o in outcomes}.values()
    asked = [o for o in families if asks_for(o.problem, o.device)]
    use = ["Use it: elsa_tune.attention(query, key, value) instead of scaled_dot_product_attention."] if asked else []
    if any(o.problem.declared for o in asked):
        use = ["Use it: elsa_tune.attention(query, key, value, attn_mask) instead of scaled_dot_product_attention."]
    return use + [_loaded(o.problem, o.device) for o in families if o not in asked]


def _loaded(problem: Problem, device: Device) -> str:
    if problem.direction == "backward":
        return f"Of {problem.family}, no call asks for gradients yet: attention() knows no such family."
    given = ", attn_mask=attn_mask" if any(isinstance(one, Array) for one in problem.declared) else ""
    call = f'elsa_tune.load("{problem}", device="{device.kind}")(query, key, value{given})'
    return f"Use {problem.family}: {call}; attention() knows no such family."
