"""Optimizers by name and around others: accumulation, averaged weights, transforms, loss scaling."""

from handloom.optimizers._accumulation import GradientAccumulation as GradientAccumulation
from handloom.optimizers._accumulation import UpdateEvery as UpdateEvery
from handloom.optimizers._add_variables import add_variables as add_variables
from handloom.optimizers._averaging import WeightAveraging as WeightAveraging
from handloom.optimizers._averaging import averaged_weights as averaged_weights
from handloom.optimizers._loss_scale import LossScaleOptimizer as LossScaleOptimizer
from handloom.optimizers._named import NamedOptimizers as NamedOptimizers
from handloom.optimizers._take_gradients import SAM as SAM
from handloom.optimizers._take_gradients import PCGrad as PCGrad
from handloom.optimizers._transforms import AdaptiveGradientClip as AdaptiveGradientClip
from handloom.optimizers._transforms import AddNoise as AddNoise
from handloom.optimizers._transforms import Centralize as Centralize
from handloom.optimizers._transforms import ClipByGlobalNorm as ClipByGlobalNorm
from handloom.optimizers._transforms import ClipByNorm as ClipByNorm
from handloom.optimizers._transforms import ClipByValue as ClipByValue
from handloom.optimizers._transforms import Freeze as Freeze
from handloom.optimizers._transforms import GradientTransforms as GradientTransforms
from handloom.optimizers._transforms import Scale as Scale
from handloom.optimizers._transforms import global_norm as global_norm

__all__ = [name for name in dir() if not name.startswith("_")]
