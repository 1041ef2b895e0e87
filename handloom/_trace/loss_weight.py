"""The weight of a step's batch, by which gradient accumulation weights its gradients."""

from typing import TypeAlias

from handloom._keras import Tensor
from handloom._util.switch import Switch

Weight: TypeAlias = Tensor | float
"""A number, or a scalar tensor; `SUM` for a loss that is a sum."""

SUM = "sum"

_weight: Switch[Weight] = Switch(1.0)

step_weight = _weight.here
"""Sets the weight of gradients for a block: the examples in the batch, or the denominator of the loss."""

weight_of_step = _weight.get
"""The weight of gradients in the caller's block; 1 if none was set."""
