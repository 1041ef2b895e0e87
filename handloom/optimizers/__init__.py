"""Optimizers by name, and loss scaling that cannot be forgotten."""

from handloom.optimizers._loss_scale import LossScaleOptimizer as LossScaleOptimizer
from handloom.optimizers._named import NamedOptimizers as NamedOptimizers

__all__ = ["LossScaleOptimizer", "NamedOptimizers"]
