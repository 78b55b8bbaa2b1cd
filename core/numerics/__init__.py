"""Pure tensor functions: spectra, tangents, radii. No state but what is passed in and returned."""

from redline.numerics.exact_radius import (
    LeastRadius,
    RadiusInterval,
    exact_ghost_radius,
    ghost_radius_interval,
    least_ghost_radius,
)
from redline.numerics.radii import binary_ghost_radius, ghost_radius, normalized_step_size, tangent_spread
from redline.numerics.spectra import SpectralEstimate, SpectralState, top_singular_values
from redline.numerics.tangents import LogitTangent, logit_tangent

__all__ = [
    "LeastRadius",
    "LogitTangent",
    "RadiusInterval",
    "SpectralEstimate",
    "SpectralState",
    "binary_ghost_radius",
    "exact_ghost_radius",
    "ghost_radius",
    "ghost_radius_interval",
    "least_ghost_radius",
    "logit_tangent",
    "normalized_step_size",
    "tangent_spread",
    "top_singular_values",
]
