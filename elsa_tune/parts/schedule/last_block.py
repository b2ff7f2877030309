"""Splits leave their states in memory, and whoever arrives last at a tile merges them: one launch."""

from elsa_tune.parts.schedule._base import Schedule

SCHEDULE = Schedule("last_block", "the last to arrive at a tile merges", splits=True, counts=True)
