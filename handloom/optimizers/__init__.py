"""Optimizers by name and around others: accumulation, averaged weights, transforms, loss scaling."""

from handloom.optimizers._accumulation import Accumulated as Accumulated
from handloom.optimizers._averaging import Averaged as Averaged
from handloom.optimizers._averaging import averaged_weights as averaged_weights
from handloom.optimizers._extend import extend as extend
from handloom.optimizers._loss_scale import LossScaleOptimizer as LossScaleOptimizer
from handloom.optimizers._named import NamedOptimizers as NamedOptimizers
from handloom.optimizers._pcgrad import PCGrad as PCGrad
from handloom.optimizers._sam import SharpnessAware as SharpnessAware
from handloom.optimizers._transformed import Transformed as Transformed
from handloom.optimizers._transforms import AdaptiveClip as AdaptiveClip
from handloom.optimizers._transforms import AddNoise as AddNoise
from handloom.optimizers._transforms import Centralize as Centralize
from handloom.optimizers._transforms import ClipByGlobalNorm as ClipByGlobalNorm
from handloom.optimizers._transforms import ClipByNorm as ClipByNorm
from handloom.optimizers._transforms import ClipByValue as ClipByValue
from handloom.optimizers._transforms import Freeze as Freeze
from handloom.optimizers._transforms import Multiply as Multiply
from handloom.optimizers._transforms import global_norm as global_norm
from handloom.optimizers._update_every import UpdateEvery as UpdateEvery

__all__ = [
    "Accumulated",
    "AdaptiveClip",
    "AddNoise",
    "Averaged",
    "Centralize",
    "ClipByGlobalNorm",
    "ClipByNorm",
    "ClipByValue",
    "Freeze",
    "LossScaleOptimizer",
    "Multiply",
    "NamedOptimizers",
    "PCGrad",
    "SharpnessAware",
    "Transformed",
    "UpdateEvery",
    "averaged_weights",
    "extend",
    "global_norm",
]
