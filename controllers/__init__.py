"""Controllers: one a file; each decides on a step, and the session carries the decision out."""

from redline.controllers.non_finite_guard import NonFiniteGuard
from redline.controllers.radius_lr import RadiusLR
from redline.controllers.spike_guard import SpikeGuard
from redline.controllers.step_clamp import StepClamp
from redline.controllers.update_clamp import UpdateClamp
from redline.controllers.weight_decay_control import WeightDecayControl

__all__ = ["NonFiniteGuard", "RadiusLR", "SpikeGuard", "StepClamp", "UpdateClamp", "WeightDecayControl"]
