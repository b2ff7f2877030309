"""ELSA's hybrid (arXiv 2604.23798): Hillis-Steele inside a block, Blelloch across blocks.

In a kernel: Hillis-Steele among the workers of a core, Blelloch among splits.
"""

from elsa_tune.parts.scan import blelloch
from elsa_tune.parts.scan._base import Round, Scan, draw


def network(n: int) -> list[Round]:
    """Blocks of about sqrt(n) cells: prefixes inside each, a scan of block totals, totals handed on.

    One parallel step of "reach back s inside the block" is a round per offset, highest first, so that no
    round reads a cell that an earlier round of the same step wrote.
    """
    block = 1 << ((n - 1).bit_length() // 2)
    inside = [
        Round(first=offset, stride=block, step=1 << k)
        for k in range((block - 1).bit_length())
        for offset in range(block - 1, (1 << k) - 1, -1)
    ]
    blocks = n // block
    across = [
        Round(first=(r.first + 1) * block - 1, stride=r.stride * block, step=r.step * block)
        for r in blelloch.network(blocks)
    ]
    hand_on = [Round(first=block + offset, stride=block, step=offset + 1) for offset in range(block - 1)]
    return inside + across + hand_on


SCAN = Scan(
    "hybrid", "Hillis-Steele inside a block, Blelloch across blocks", network, block="hillis_steele", grid="blelloch"
)

if __name__ == "__main__":
    print(draw(SCAN))
