"""What the worker's parent loads once, so that a replaced worker starts at once."""

import torch  # noqa: F401

import elsa_tune.backends.cpp
import elsa_tune.check
import elsa_tune.measure
import elsa_tune.reference  # noqa: F401
