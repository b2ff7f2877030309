"""A kernel for programs without Python: everything that a header around its text says and computes."""

from __future__ import annotations

from dataclasses import dataclass

from elsa_tune.generate.render import Source


@dataclass(frozen=True, slots=True)
class Blocks:
    """How blocks are started: threads of one, query rows of its tile, numbers of a vector (rows that begin at multiples of it are
    aligned), bytes of shared memory; splits of the keys and who merges their states, with at most ``scratch_bytes`` of memory
    for them, and threads of a block of the second kernel, where there is one."""

    threads: int
    block_m: int
    vector: int
    shared_bytes: int
    splits: int
    schedule: str
    scratch_bytes: int
    finish_threads: int


@dataclass(frozen=True, slots=True)
class Portable:
    """The ``language`` of a header (a folder of ``templates/kit``), how the name of a program that includes it ends, the code, what
    a compiler is told beside input and output, and the launch, where a kernel is not simply called."""

    language: str
    program: str
    source: Source
    flags: tuple[str, ...] = ()
    launch: Blocks | None = None
