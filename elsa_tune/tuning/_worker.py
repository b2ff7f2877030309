"""What the worker's parent loads once, so that a replaced worker starts at once."""

import torch  # noqa: F401
