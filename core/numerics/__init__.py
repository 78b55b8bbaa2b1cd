"""Pure tensor functions: spectra, tangents, radii. No state but what is passed in and returned."""

from redline.numerics.radii import binary_ghost_radius, ghost_radius, normalized_step_size, tangent_spread
from redline.numerics.spectra import SpectralEstimate, SpectralState, top_singular_values
from redline.numerics.tangents import LogitTangent, logit_tangent

__all__ = [
    "LogitTangent",
    "SpectralEstimate",
    "SpectralState",
    "binary_ghost_radius",
    "ghost_radius",
    "logit_tangent",
    "normalized_step_size",
    "tangent_spread",
    "top_singular_values",
]
