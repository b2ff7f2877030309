"""Blelloch's work-efficient scan (Prefix Sums and Their Applications, 1990), in its inclusive form."""

from elsa_tune.parts.scan._base import Round, Scan, draw


def network(n: int) -> list[Round]:
    """An up-sweep that pairs states, then a down-sweep that completes the prefixes.

    For n that is no power of two the last cell is completed on the way down.
    """
    steps = [1 << k for k in range((n - 1).bit_length())]
    up = [Round(first=2 * step - 1, stride=2 * step, step=step) for step in steps]
    down = [Round(first=3 * step - 1, stride=2 * step, step=step) for step in reversed(steps)]
    return up + down


SCAN = Scan("blelloch", "an up-sweep of pairs; the total needs no down-sweep", network)

if __name__ == "__main__":
    print(draw(SCAN))
