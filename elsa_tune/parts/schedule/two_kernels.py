"""Splits leave their states in memory, and a second kernel merges them: FlashAttention's decoding."""

from elsa_tune.parts.schedule._base import Schedule

SCHEDULE = Schedule("two_kernels", "a second kernel merges", splits=True, launches=2)
