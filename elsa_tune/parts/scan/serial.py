"""The fold: each state merged into the next, FlashAttention-2's order."""

from elsa_tune.parts.scan._base import Round, Scan, draw


def network(n: int) -> list[Round]:
    """n - 1 rounds of one merge; depth n - 1."""
    return [Round(first=i, stride=n, step=1) for i in range(1, n)]


SCAN = Scan("serial", "one state, folded left to right", network)

if __name__ == "__main__":
    print(draw(SCAN))
