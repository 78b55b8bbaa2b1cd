"""Monitors: one a file; each observes and never changes anything."""

from redline.monitor import Monitor
from redline.monitors.ghost_radius import GhostRadius
from redline.monitors.layer_radii import LayerRadii
from redline.monitors.step_health import StepHealth
from redline.monitors.update_spectrum import UpdateSpectrum
from redline.monitors.weight_spectrum import WeightSpectrum

__all__ = ["GhostRadius", "LayerRadii", "StepHealth", "UpdateSpectrum", "WeightSpectrum", "default_monitors"]


def default_monitors() -> list[Monitor]:
    """Weights, updates and the ghost radius every 50 steps, health every step."""
    return [WeightSpectrum(), UpdateSpectrum(), GhostRadius(), StepHealth()]
