"""Examples of every command, as help and the reference show them; a test reads each as the command line does."""

from __future__ import annotations

from elsa_tune.shell.manual import examples

MAIN = examples(
    "elsa-tune  # tunes the default workload on this machine, 3 minutes",
    "elsa-tune run -- python program.py  # tunes what a program asks",
    "elsa-tune winners",
    "elsa-tune explain fp32.d64.causal@b1.h8.q4096.k4096",
    "elsa-tune doctor",
)
TUNE = examples(
    "elsa-tune --budget 600 --effort full  # ten minutes, more trials for each problem",
    "elsa-tune --problem fp32.d64@b4.h12.q333.k333 --budget 30",
    "elsa-tune --workload masks",
    "elsa-tune --watch  # with a report that goes along in a browser",
    "elsa-tune --storage sqlite:///study.db  # for optuna-dashboard",
    "elsa-tune --device sm_90 --offline  # ranks for a GPU that is not here",
    "elsa-tune --from-traffic traffic.jsonl  # what elsa-tune run -o recorded",
)
REPORT = examples(
    "elsa-tune report  # report.html, of what was measured here",
    "elsa-tune report own shipped -o compared.html",
    "elsa-tune report before.jsonl after.jsonl --device cpu",
)
WINNERS = examples(
    "elsa-tune winners",
    "elsa-tune winners --device cpu --family fp32.d64.causal",
    "elsa-tune winners --json",
)
SHOW = examples(
    "elsa-tune show cpp.serial.avx512.l16.q3.k8.v8.n192 fp32.d64.causal",
    "elsa-tune show triton.serial.half.m128.n64.warps8.stages3 fp16.d64",
)
EXPLAIN = examples(
    "elsa-tune explain fp32.d64.causal@b1.h8.q4096.k4096",
    "elsa-tune explain fp32.d64@b8.h12.q197.k197.bshd --device cpu",
)
KIT = examples(
    "elsa-tune kit --device sm_62 -o jetson",
    "elsa-tune kit --device cortex_a72 --problem fp32.d64@b1.h8.q256.k256",
)
EXPORT = examples(
    "elsa-tune export fp32.d64.causal@b1.h8.q4096.k4096",
    "elsa-tune export fp32.d64@b1.h8.q256.k256 --device sm_62 -o attention.h",
)
FLEET = examples(
    "elsa-tune fleet --storage journal:/shared/fleet.log",
)
COMPILE = examples(
    "elsa-tune compile --for sm_90",
    "elsa-tune compile --for gfx942 --workload gpu --budget 600 -o ready",
)
DOCTOR = examples(
    "elsa-tune doctor",
    "elsa-tune doctor --json  # what a bug report should hold",
)
COMPLETION = examples(
    "elsa-tune completion bash  # add to ~/.bashrc what it prints",
    "elsa-tune completion zsh",
    "elsa-tune completion fish",
)
RUN = examples(
    "elsa-tune run -- python program.py",
    "elsa-tune run --budget 600 -o traffic.jsonl -- python -m torch.distributed.run train.py",
)
DB = examples(
    "elsa-tune db info",
    "elsa-tune db export --device cpu -o mine.jsonl",
)
DB_EXPORT = examples(
    "elsa-tune db export -o measurements.jsonl.gz",
    "elsa-tune db export --device cpu --sign ~/.ssh/id_ed25519 -o mine.jsonl",
)
DB_IMPORT = examples(
    "elsa-tune db import theirs.jsonl",
    "elsa-tune db import https://example.org/team.jsonl.gz",
)
DB_MERGE = examples(
    "elsa-tune db merge mine.jsonl theirs.jsonl -o both.jsonl",
)
DB_DIFF = examples(
    "elsa-tune db diff before.jsonl after.jsonl",
)
DB_VERIFY = examples(
    "elsa-tune db verify",
)
DB_RACE = examples(
    "elsa-tune db race",
    "elsa-tune db race --device cpu --budget 60",
)
DB_GC = examples(
    "elsa-tune db gc",
)
DB_INFO = examples(
    "elsa-tune db info",
)
DB_DOCTOR = examples(
    "elsa-tune db doctor",
)
