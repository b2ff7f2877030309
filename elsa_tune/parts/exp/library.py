"""The library's function: two units in the last place (CUDA C++ Programming Guide, table of single-precision functions)."""

from elsa_tune.parts.exp._base import Exp

EXP = Exp("library", "the device's library: its special-function unit between two guards", lambda degree: 2.0**-22, 4)
