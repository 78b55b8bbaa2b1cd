"""Pure tensor functions: spectra, tangents, radii. No state but what is passed in and returned."""

from redline.numerics.exact_radius import RadiusInterval, exact_ghost_radius, ghost_radius_interval
from redline.numerics.radii import binary_ghost_radius, ghost_radius, normalized_step_size, tangent_spread
from redline.numerics.spectra import SpectralEstimate, SpectralState, top_singular_values
from redline.numerics.tangents import LogitTangent, logit_tangent

__all__ = [
    "LogitTangent",
    "RadiusInterval",
    "SpectralEstimate",
    "SpectralState",
    "binary_ghost_radius",
    "exact_ghost_radius",
    "ghost_radius",
    "ghost_radius_interval",
    "logit_tangent",
    "normalized_step_size",
    "tangent_spread",
    "top_singular_values",
]
