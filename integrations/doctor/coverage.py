"""What of a model is measured, and what is not."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from redline.errors import RedlineWarning
from redline.notes import Notes
from redline.parameters import MatrixLayer, matrix_layers, named_parameters
from redline.tangent_probe import couples_samples

_MOST_NAMED = 4


@dataclass(frozen=True)
class Coverage:
    """The parameters of a model by how they are measured.

    Attributes:
        matrices: whose spectra are measured.
        others: ``(name, elements)`` of the parameters that are no matrices: they count in the step's length and in r.
        remarks: what is measured in a way of its own, in words.
        gaps: what cannot be measured, in words.
    """

    matrices: tuple[MatrixLayer, ...]
    others: tuple[tuple[str, int], ...]
    remarks: tuple[str, ...]
    gaps: tuple[str, ...]

    @property
    def shapes(self) -> dict[tuple[int, int], int]:
        """``(d_out, d_in)`` to how many matrices are of that shape, the largest first."""
        found: dict[tuple[int, int], int] = {}
        for layer in sorted(self.matrices, key=lambda layer: -layer.d_out * layer.d_in):
            found[layer.d_out, layer.d_in] = found.get((layer.d_out, layer.d_in), 0) + 1
        return found

    @property
    def largest(self) -> MatrixLayer | None:
        """The matrix of most elements."""
        return max(self.matrices, key=lambda layer: layer.d_out * layer.d_in, default=None)


def cover(model: nn.Module) -> Coverage:
    """Sort a model's parameters; lazy ones have to be initialized."""
    notes = Notes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RedlineWarning)  # they are told here
        matrices = matrix_layers(model, notes)
    measured, parameters = {layer.parameter for layer in matrices}, named_parameters(model)
    gaps = list(notes)
    if not matrices:
        gaps.append("No weight matrix was found: spectra of weights and updates are not measured.")
    refused = [name for name in parameters if any(note.startswith(f"{name} ") for note in notes)]
    others = tuple(
        (name, parameter.numel())
        for name, parameter in parameters.items()
        if name not in measured and name not in refused
    )
    return Coverage(tuple(matrices), others, tuple(_remarks(model)), tuple(gaps))


def _remarks(model: nn.Module) -> Iterator[str]:
    first: dict[int, str] = {}
    tied = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in first:
            tied.append(f"{name} is {first[id(parameter)]}")
        first.setdefault(id(parameter), name)
    if tied:
        yield f"Tied parameters are measured once: {_listed(tied)}."
    if frozen := [name for name, parameter in model.named_parameters() if not parameter.requires_grad]:
        yield f"Frozen parameters have spectra but no updates: {_listed(frozen)}."
    if made := [name for name, module in model.named_modules() if is_parametrized(module)]:
        yield f"Parametrized modules: σ₁ is that of what is trained, not of the weight made from it: {_listed(made)}."
    if couples_samples(model):
        yield "BatchNorm in training couples the samples: r is measured on the whole batch, which costs more."
    inside = [name for name, module in model.named_modules() if isinstance(module, nn.RNNBase)]
    if inside:
        yield f"LayerRadii does not see inside recurrent layers: {_listed(inside)}."


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more
