"""The special-function unit's own instruction: 2^-22 on NVIDIA GPUs (PTX ISA, ex2.approx.f32), elsewhere what the device says."""

from elsa_tune.parts.exp._base import Exp

EXP = Exp("native", "the device's special-function unit", lambda degree: 2.0**-22, 1)
