"""Controllers: one a file; each decides on a step, and the session carries the decision out."""

from redline.controllers.non_finite_guard import NonFiniteGuard
from redline.controllers.spike_guard import SpikeGuard
from redline.controllers.step_clamp import StepClamp

__all__ = ["NonFiniteGuard", "SpikeGuard", "StepClamp"]
