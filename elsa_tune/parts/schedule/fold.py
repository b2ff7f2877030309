"""One worker has all keys of a tile: nobody merges, nothing is left in memory."""

from elsa_tune.parts.schedule._base import Schedule

SCHEDULE = Schedule("fold", "nobody merges: one worker has all keys", splits=False)
