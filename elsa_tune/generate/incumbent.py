"""The incumbent: torch's function, answered by torch's own kernels, whoever stands in their place."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

attention: Callable[..., Tensor] = scaled_dot_product_attention
"""Who puts others in the place of torch's kernels puts here what gets around them."""
