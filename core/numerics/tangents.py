"""Logit tangents: the directional derivative of a model's logits along a direction in its parameters.

``a(x) = J_z(x) d`` for the logits ``z`` of sample ``x``, the Jacobian taken at the given parameters and ``d`` a
direction in them, from one forward-mode Jacobian-vector product. Where forward-mode AD has no rule for a kernel the
next rung of a ladder is tried: the same product with attention's math backend and without oneDNN's recurrent kernels,
then a central difference in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map

from redline.errors import ConfigurationError
from redline.numerics.layer_recorder import LayerSteps, recording_layers
from redline.numerics.replay import cloned_buffers, replaying

FORWARD_MODE = "forward_mode"
MATH_ATTENTION = "math_attention"
FINITE_DIFFERENCE = "finite_difference"
METHODS = (FORWARD_MODE, MATH_ATTENTION, FINITE_DIFFERENCE)
"""The ladder, best rung first."""

# Relative size of the finite difference's step: its entries are 3e-4 of the size of the model's own. A central
# difference errs by about h^2 / 6 from curvature, by machine precision / h from rounding, and by about h from what
# crosses a kink: on trained transformers with ReLU 2e-3 was up to 15 % off, 3e-4 at most 5 %.
_RELATIVE_STEP = 3e-4
_LOW_PRECISION = (torch.float16, torch.bfloat16)

LogitsFunction = Callable[[Any], Any]


@dataclass(frozen=True)
class LogitTangent:
    """Logits and their tangent.

    Attributes:
        logits: ``(..., classes)``, at the parameters given.
        tangent: ``(..., classes)``, ``J_z d``, in logits per unit of ``direction`` as it was given.
        mask: ``(...)``, bool: positions that count, or None where all do.
        method: the rung of the ladder that gave it, one of ``METHODS``.
        layers: how long the direction is for attention and activations, taken as a step; None if not asked for, and by
            finite difference, which sees nothing but logits.
    """

    logits: Tensor
    tangent: Tensor
    mask: Tensor | None
    method: str
    layers: LayerSteps | None = None


def logit_tangent(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    direction: Mapping[str, Tensor],
    *,
    logits: LogitsFunction | None = None,
    method: str = "auto",
    parameters: Mapping[str, Tensor] | None = None,
    layers: bool = False,
) -> LogitTangent:
    """Take the directional derivative of the model's logits along ``direction``.

    The model is called in the modes its modules are in, with dropout off, and is left as it was: parameters, buffers,
    random states, modes.

    Args:
        model: an eager, unwrapped module.
        args: positional inputs of its forward.
        kwargs: keyword inputs of its forward.
        direction: ``{parameter name: tensor of its shape}``; parameters left out stay where they are.
        logits: callable ``output -> (..., classes)`` or ``output -> (logits, mask of positions that count)``; by
            default the output itself, its ``.logits`` or its ``["logits"]``. A 1-D output counts as one logit a sample.
        method: one of ``METHODS``, or "auto": the first of them that works.
        parameters: ``{parameter name: tensor}`` at which to differentiate, where not at the model's own.
        layers: also gather, in the same pass, how long the direction is for each attention and activation.

    Returns:
        The tangent and the logits, in float32 at least; by finite difference the logits are the mean of the two
        evaluations.

    Raises:
        ConfigurationError: the logits are no floating tensor, a name is no parameter of the model, or the method is
            unknown.
    """
    if method != "auto" and method not in METHODS:
        raise ConfigurationError(f"got method={method!r}; expected 'auto' or one of {', '.join(METHODS)}.")
    direction = _canonical(model, direction, "direction")
    point = {name: tensor.detach() for name, tensor in model.named_parameters()}
    point.update(_canonical(model, parameters or {}, "value"))
    stretch = _stretch(point, direction)
    stretched = {name: (tensor * stretch).to(point[name].dtype) for name, tensor in direction.items()}
    function = logits or default_logits

    for rung in METHODS if method == "auto" else (method,):
        try:
            seen = None
            if rung == FINITE_DIFFERENCE:
                z, tangent, mask = _finite_difference(model, args, kwargs or {}, point, stretched, function)
            else:
                plain = rung == MATH_ATTENTION
                with recording_layers(model, stretch) if layers else nullcontext() as seen:
                    z, tangent, mask = _forward_mode(model, args, kwargs or {}, point, stretched, function, plain)
        except torch.OutOfMemoryError:
            raise
        except (NotImplementedError, RuntimeError):
            if rung == FINITE_DIFFERENCE or method != "auto":
                raise
        else:
            return LogitTangent(_widen(z), _widen(tangent) / stretch, mask, rung, seen)
    raise AssertionError("unreachable: the last rung returns or raises")


def _canonical(model: nn.Module, tensors: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """The same tensors under the first name of each parameter: tied ones have several."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    every = dict(model.named_parameters(remove_duplicate=False))
    if unknown := [name for name in tensors if name not in every]:
        raise ConfigurationError(
            f"got a {what} for {unknown[0]!r}, which is no parameter of the model; expected names out of "
            f"`model.named_parameters()`, such as {next(iter(every), 'none: the model has no parameters')!r}."
        )
    for name, tensor in tensors.items():
        if tensor.shape != every[name].shape:
            raise ConfigurationError(
                f"got a {what} of shape {tuple(tensor.shape)} for {name!r}; expected the parameter's own, "
                f"{tuple(every[name].shape)}."
            )
    return {first[id(every[name])]: tensor for name, tensor in tensors.items()}


def default_logits(output: Any) -> Any:
    """The logits of a model's output: the output itself, its ``.logits``, or its ``["logits"]``."""
    if isinstance(output, Mapping) and "logits" in output:
        return output["logits"]
    return getattr(output, "logits", output)


def read_logits(output: Any, function: LogitsFunction) -> tuple[Tensor, Tensor | None]:
    """Logits ``(..., classes)`` and mask ``(...)`` of a model's output, as ``function`` reads them.

    Raises:
        ConfigurationError: they are no floating tensor, or the mask is not of their shape.
    """
    result = function(output)
    z, mask = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
    if not isinstance(z, Tensor) or not z.is_floating_point() or z.dim() == 0:
        what = f"a {z.dtype} tensor of shape {tuple(z.shape)}" if isinstance(z, Tensor) else f"a {type(z).__name__}"
        raise ConfigurationError(
            f"got {what} as logits; expected a floating tensor (..., classes). Pass `logits=`, a callable that takes "
            "the model's output and returns its logits, such as `logits=lambda output: output[0]`."
        )
    z = z.unsqueeze(-1) if z.dim() == 1 else z
    if mask is not None and not (isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.shape == z.shape[:-1]):
        what = (
            f"of shape {tuple(mask.shape)} and {mask.dtype}"
            if isinstance(mask, Tensor)
            else f"of type {type(mask).__name__}"
        )
        raise ConfigurationError(
            f"got a mask {what} beside logits of shape {tuple(z.shape)}; "
            f"expected a bool tensor of shape {tuple(z.shape[:-1])}, true for the positions that count."
        )
    return z, mask


def _forward_mode(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    point: Mapping[str, Tensor],
    direction: Mapping[str, Tensor],
    function: LogitsFunction,
    plain_kernels: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    device_type = next(iter(point.values())).device.type
    autocast = torch.is_autocast_enabled(device_type)
    if autocast and device_type == "cpu":
        # Half precision would cost r up to 1.2 %, and on the CPU it buys nothing.
        autocast, (args, kwargs) = False, tree_map(_widen, (tuple(args), dict(kwargs)))
    with (
        replaying(model, plain_kernels=plain_kernels),
        torch.autocast(device_type, enabled=autocast, dtype=torch.get_autocast_dtype(device_type)),
        forward_ad.dual_level(),
    ):
        duals = dict(point)
        for name, tangent in direction.items():
            duals[name] = forward_ad.make_dual(point[name], tangent)
        z, mask = read_logits(
            functional_call(model, {**duals, **cloned_buffers(model)}, *_copied(args, kwargs)), function
        )
        primal, tangent_out = forward_ad.unpack_dual(z)
        # Clones, since what was unpacked may be a view of a dual tensor whose level ends here.
        return primal.clone(), torch.zeros_like(primal) if tangent_out is None else tangent_out.clone(), mask


def _finite_difference(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    point: Mapping[str, Tensor],
    direction: Mapping[str, Tensor],
    function: LogitsFunction,
) -> tuple[Tensor, Tensor, Tensor | None]:
    # In float32 at least: a difference in half precision measures rounding.
    wide_args, wide_kwargs = tree_map(_widen, (tuple(args), dict(kwargs)))
    ends = []
    device_type = next(iter(point.values())).device.type
    for sign in (1.0, -1.0):
        moved = {name: _widen(tensor) for name, tensor in point.items()}
        for name, tangent in direction.items():
            moved[name] = moved[name] + sign * _RELATIVE_STEP * _widen(tangent)
        buffers = {name: _widen(buffer) for name, buffer in cloned_buffers(model).items()}
        with replaying(model), torch.autocast(device_type, enabled=False):
            ends.append(
                read_logits(functional_call(model, {**moved, **buffers}, *_copied(wide_args, wide_kwargs)), function)
            )
    (z_plus, mask), (z_minus, _) = ends
    return (z_plus + z_minus) / 2, (z_plus - z_minus) / (2 * _RELATIVE_STEP), mask


def _copied(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inputs for one call: a model may work on them in place."""
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, (tuple(args), dict(kwargs)))


def _widen(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in _LOW_PRECISION else value


def _stretch(point: Mapping[str, Tensor], direction: Mapping[str, Tensor]) -> Tensor:
    """Factor that brings the direction's entries to the size of the parameters' own, 0-d.

    Neither a half-precision tangent nor a difference is then lost in rounding, however short the step is. Size is that
    of the whole model, since what moves may itself be zero; no tensor moves by more than 8 times its own, or the whole
    model's, so that a step in one scalar stays a small one.
    """
    whole = _root_mean_square([tensor for tensor in point.values() if tensor.is_floating_point()])
    moved = _root_mean_square(list(direction.values()))
    stretch = whole / moved
    for name, tensor in direction.items():
        stretch = torch.fmin(
            stretch, 8 * torch.maximum(whole, _root_mean_square([point[name]])) / _root_mean_square([tensor])
        )
    return torch.where(torch.isfinite(stretch) & (stretch > 0), stretch, 1.0)


def _root_mean_square(tensors: Sequence[Tensor]) -> Tensor:
    size = max(sum(tensor.numel() for tensor in tensors), 1)
    return torch.nn.utils.get_total_norm([_widen(tensor) for tensor in tensors]) / size**0.5
