"""Hillis and Steele's scan (Data Parallel Algorithms, 1986): few rounds, many merges."""

from elsa_tune.parts.scan._base import Round, Scan, draw


def network(n: int) -> list[Round]:
    """ceil(log2 n) rounds; every cell reaches back 1, 2, 4, ..."""
    return [Round(first=1 << k, stride=1, step=1 << k) for k in range((n - 1).bit_length())]


SCAN = Scan("hillis_steele", "every state reaches back 1, 2, 4, ... at once", network)

if __name__ == "__main__":
    print(draw(SCAN))
