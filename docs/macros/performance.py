"""Tables of what benchmarks measured, computed from benchmarks/results when the site is built; a file is named without ``.json``."""

from __future__ import annotations

import statistics
import textwrap
from typing import Any

from ._markdown import code, table
from ._results import TORCH, fastest, read, short, spelled, spread

PEERS = {"torch": TORCH, "ONNX Runtime": ("onnxruntime",), "OpenVINO": ("openvino",)}
"""Who is in a line of ``problems``, by the names that results have."""


def about(name: str) -> str:
    """Where, when and with what a file's results were measured, and the limits of the device in that run."""
    content = read(name)
    parts = [
        f"`{content['device']}`",
        content["name"],
        *([f"{content['threads']} threads"] if "threads" in content else []),
    ]
    parts += [content["date"]] if "date" in content else []
    parts += [
        f"{package} {text.partition('+')[0]}"
        for package, text in content.get("versions", {}).items()
        if text != "not installed"
    ]
    parts += [content["toolchain"]["compiler"]] if "toolchain" in content else []
    text = f"{', '.join(parts)} ([`{name}.json`](../benchmarks/results/{name}.json))."
    limits = [line["limits"] for line in content["results"].values() if "limits" in line]
    if limits:
        peak, width = _range([one["gflops"] for one in limits]), _range([one["gbytes"] for one in limits])
        text += f" Multiply-add peak {peak} GFLOP/s, read bandwidth {width} GB/s: the median of what was measured beside each problem."
    return text


def _range(values: list[float]) -> str:
    return f"{statistics.median(values):.0f} ({min(values):.0f} to {max(values):.0f})"


def goals(name: str) -> str:
    """What was asked and what was reached, losses like wins: of a set of problems the geometric mean of their ratios, the worst, and the
    mean that reaching the device's measured limits would give. Of errors and seconds the worst is the largest, and that is asked."""
    found = read(name)["goals"]
    limited = any("ceiling_geometric_mean" in goal for goal in found)
    heads = ["goal", "asked", "geometric mean", "worst", *(["the device allows"] if limited else [])]
    return table(heads, [_goal(goal)[: len(heads)] for goal in found])


def _goal(goal: dict[str, Any]) -> list[str]:
    if "worst" not in goal:
        return [goal["goal"], f"{goal['asked']:.2f}", "not measured", "", ""]
    mean, worst, asked = goal.get("geometric_mean"), goal["worst"], goal["asked"]
    at_most = goal.get("at_most", False)
    by_mean = not at_most and mean < asked
    digits = 0 if asked >= 100 else 2
    told = short(f"{worst:.{digits}f}", not goal["reached"] and not by_mean, at_most)
    return [
        goal["goal"],
        f"at {'most' if at_most else 'least'} {asked:.{digits}f}",
        "" if mean is None else short(f"{mean:.2f}", by_mean),
        f"{told} at {spelled(goal['worst_at'])}" if "worst_at" in goal else told,
        f"{goal['ceiling_geometric_mean']:.2f}" if "ceiling_geometric_mean" in goal else "",
    ]


def problems(name: str) -> str:
    """Every problem of a file, folded: our rate and share of the limit that binds, and how many times as long others took."""
    heads = ["problem", "GFLOP/s", "of the limit", *PEERS, "kernel"]
    return _folded("every problem", table(heads, map(_problem, read(name)["results"].values())))


def _problem(line: dict[str, Any]) -> list[str]:
    peers = [fastest(line["peers"], names) for names in PEERS.values()]
    return [
        spelled(line["problem"]),
        f"{line['peers']['elsa-tune']['gflops']:.0f}",
        f"{max(line['share_of_peak'], line['share_of_bandwidth']):.2f}",
        *(_ratio(peer) if peer else "" for peer in peers),
        spelled(line["variant"]),
    ]


def _ratio(peer: Any) -> str:
    return f"{peer['ratio']:.2f} [{peer['low']:.2f}, {peer['high']:.2f}]"


def _folded(title: str, text: str) -> str:
    return f'??? note "{title}"\n\n{textwrap.indent(text, "    ")}\n'


def cases(name: str) -> str:
    """Every case of masks, folded: how many times as long each peer took."""
    results = read(name)["results"]
    peers = list(dict.fromkeys(peer for line in results.values() for peer in line["peers"] if peer != "elsa-tune"))
    rows = [
        [case, *(_ratio(line["peers"][p]) if p in line["peers"] else "" for p in peers), spelled(line["variant"])]
        for case, line in results.items()
    ]
    return _folded("every case", table(["case", *peers, "kernel"], rows))


def once(name: str) -> str:
    """What a call, an import and a run cost in the run of a file."""
    content = read(name)
    call, run = content["call_microseconds"], content["tuning_seconds"]
    return (
        f"A call of the smallest problem takes {call['attention']:.1f} us, torch's {call['torch_sdpa']:.1f} us in the same run; beside its bare "
        f"kernel ours spends {call['overhead']:.1f} us. Importing adds {content['import_milliseconds']:.0f} ms to torch's own import. The first "
        f"`elsa-tune` took {run['first_run']:.0f} s, the second {run['second_run']:.1f} s."
    )


def calls(name: str) -> str:
    """What calls cost that torch serves, and the import of torch, in microseconds."""
    results, asked = read(name)["results"], read(name)["asked"]
    of_import = {key: 1000 * milliseconds for key, milliseconds in results["import"].items()}
    lines = [(f"by {way}", found, asked[way], 1) for way, found in results["call"].items() if way in asked]
    lines.append(("`import torch`, the variable unset", of_import, 1000 * asked["import"], 0))
    rows = [
        [what, f"{most:g}", short(spread(found, digits), found["median"] > most, True)]
        for what, found, most, digits in lines
    ]
    torchs = results["call"]["torch"]["median"]
    head = f"a call that torch serves, of tiny tensors, beside torch's own {torchs:.1f} us"
    return table([head, "at most", "microseconds more [quartiles]"], rows)


def decoding(name: str) -> str:
    """A token's attention, by a program that is not changed."""
    results, asked, rows = read(name)["results"], read(name)["asked"], []
    for case, found in results.items():
        if "enable_gqa" in found:
            dtype, length = case.split()
            beside = short(spread(found["enable_gqa"]), found["enable_gqa"]["median"] < asked[dtype])
            rows.append(
                [
                    f"{dtype}, after {length}",
                    f"{asked[dtype]:g}",
                    beside,
                    short(spread(found["folded"]), found["folded"]["high"] < 1),
                ]
            )
    heads = ["a token's attention", "at least", "times as fast as `enable_gqa`", "as groups folded into the queries"]
    return table(heads, rows)


def models(name: str, registered: bool = False, training: bool = False) -> str:
    """Whole models: those that are not changed, or those whose attention is registered; forward passes, or steps of ``training``. Short is what
    lies below nine tenths of the possible gain with its whole interval."""
    rows = []
    for model, found in read(name)["results"].items():
        if (found.get("way") == "registered", found.get("training", False)) == (registered, training):
            least = max(1.0, 1 + 0.9 * (found["possible_gain"] - 1))
            rows.append([
                code(model), found["date"], short(spread(found["gain"], 3), found["gain"]["high"] < least), f"{found['attention_share']:.2f}",
                spread(found["kernel_ratio"]), f"{found['possible_gain']:.3f}", "" if found["reached"] is None else f"{found['reached']:.2f}",
            ])  # fmt: skip
    return table(["model", "measured", "gain [95 %]", "attention", "kernels [95 %]", "possible", "of it"], rows)


def fine_tuning(name: str) -> str:
    """What a step of training costs by torch's attention and by ours, and how far the curves of losses are apart, by what is trained."""
    rows = []
    for method, found in read(name)["results"].items():
        seconds, losses = (
            [found["ways"][who][what] for who in ("torch", "elsa-tune")] for what in ("seconds", "losses")
        )
        torchs, ours = map(statistics.median, seconds)
        memory = [f"{mib:.0f}" for mib in found["mib"].values()]
        ends = [f"{curve[0]:.3f} to {curve[-1]:.6f}" for curve in losses]
        rows.append([
            method, short(spread(found["ratio"]), found["ratio"]["high"] < 1), f"{torchs:.2f}", f"{ours:.2f}", *memory, *ends,
            f"{found['difference']:.1e}",
        ])  # fmt: skip
    heads = [
        "trained", "times as fast [95 %]", "torch's step, s", "ours, s", "torch's peak, MiB", "ours, MiB", "torch's loss", "ours",
        "largest difference",
    ]  # fmt: skip
    return table(heads, rows)


def databases(name: str) -> str:
    """Reading, writing and asking databases of many measurements."""
    found = read(name)
    asked = found["asked"]
    count = f"{found['measurements']:,}"
    first = statistics.median(found["first_dispatch_ms"])
    lines = [
        (f"import of {count} measurements", "import_seconds", found["import_seconds"], "s"),
        ("export", "export_seconds", found["export_seconds"], "s"),
        ("merge of two such files", "merge_seconds", found["merge_seconds"], "s"),
        ("`db verify`", "verify_seconds", found["verify_seconds"], "s"),
        ("size after `db gc`, a measurement", "bytes_each", found["bytes_each"], "bytes"),
        (f"first dispatch of a fresh process with {count}: look-up and load", "first_dispatch_ms", first, "ms"),
    ]
    rows = [
        [
            what,
            f"{asked[key]:g} {unit}" if key in asked else "",
            short(f"{value:.{0 if unit == 'bytes' else 1}f} {unit}", value > asked.get(key, value), True),
        ]
        for what, key, value, unit in lines
    ]
    return table([f"on `{found['device']}`", "at most", "measured"], rows)


def fleets(name: str) -> str:
    """Wall time until the best variant is found, by workers."""
    found = read(name)
    rows = [
        [f"{workers} workers", f"{asked:g}", short(f"{found['share_of_one'][workers]:.2f}", found["share_of_one"][workers] > asked),
         f"{found['share_of_one_median'][workers]:.2f}"]
        for workers, asked in found["asked"].items()
    ]  # fmt: skip
    return table(
        [f"wall time over {found['storage']}, as a share of one worker's", "at most", "of sums", "the median"], rows
    )


def agreement(name: str) -> str:
    """Whether fresh runs name the same winners."""
    rows = []
    for state, found in read(name).items():
        seconds = found["seconds"]
        rows.append([
            f"{state}, {found['date']}", str(len(seconds)), f"{found['agree']:.0%}", str(found["contradictions"]),
            f"{statistics.median(seconds):.0f} of {found['budget']:.0f}", f"{found['fewest_tried']}",
        ])  # fmt: skip
    heads = [
        "machine",
        "runs",
        "same winner, or within 2 %",
        "torch in one run, ours in another",
        "seconds",
        "variants tried, at least",
    ]
    return table(heads, rows)


def offline(name: str) -> str:
    """Where the offline model ranks what torch's authors found best by measuring."""
    rows = []
    for line in read(name)["results"]:
        m, n, warps, stages = line["published"]
        place = [f"{line['rank']} of {line['of']}", f"{line['over_best']:.2f}"] if line["rank"] else ["refused", ""]
        rows.append([line["target"], str(line["head_dim"]), f"{m} x {n}, {warps}, {stages}", *place])
    return table(
        [
            "target",
            "d",
            "torch's choice: tile, warps, stages",
            "place by the model",
            "predicted over the best predicted",
        ],
        rows,
    )
