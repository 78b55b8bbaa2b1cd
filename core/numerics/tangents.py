"""Logit tangents: the directional derivative of a model's logits along a direction in its parameters.

``a(x) = J_z(x) d`` for the logits ``z`` of sample ``x``, the Jacobian taken at the given parameters and ``d`` a
direction in them, from one forward-mode Jacobian-vector product. Where forward-mode AD has no rule for a kernel the
next rung of a ladder is tried: the same product with attention's math backend and without oneDNN's recurrent kernels,
then a central difference in float32. A model whose parameters lie over several ranks is replayed as the plain module it
was made of, one unit gathered at a time; one that cannot be has a last rung of its own, a central difference through
the model as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map

from redline.errors import ConfigurationError
from redline.numerics.agreement import Agree, ElsewhereError, Total, agreed_in_run, alone, in_step, total_of_run
from redline.numerics.gathered import GatheredModel, Made, whole
from redline.numerics.layer_recorder import LayerSteps, recording_layers
from redline.numerics.replay import cloned_buffers, replaying
from redline.numerics.sharded import Sharding, device_type, fsdp_modules, is_sharded, local_part
from redline.numerics.wrapped import computing_dtype, moved_in_place

FORWARD_MODE = "forward_mode"
MATH_ATTENTION = "math_attention"
FINITE_DIFFERENCE = "finite_difference"
SHARDED_DIFFERENCE = "sharded_difference"
LADDER = (FORWARD_MODE, MATH_ATTENTION, FINITE_DIFFERENCE)
"""The rungs for any model, best first."""
METHODS = (*LADDER, SHARDED_DIFFERENCE)
"""The same and the last rung for models whose parameters lie over several ranks."""

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
    total: Total | None = None,
    agree: Agree | None = None,
) -> LogitTangent:
    """Take the directional derivative of the model's logits along ``direction``.

    The model is called in the modes its modules are in, with dropout off, and is left as it was: parameters, buffers,
    random states, modes.

    A model whose parameters are DTensors (``fully_shard``, tensor parallelism) is called by all ranks at once, each
    with its own inputs; direction and parameters are DTensors that lie as the model's own.

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
        total: the sum over ranks; by default over the default process group, of models with DTensors.
        agree: whether all ranks say so, of a rung that must work on all of them; by default as ``total``.

    Returns:
        The tangent and the logits, in float32 at least; by finite difference the logits are the mean of the two
        evaluations.

    Raises:
        ConfigurationError: the logits are no floating tensor, a name is no parameter of the model, or the method is
            unknown, or "sharded_difference" for a model without DTensors.
        ElsewhereError: another rank could not take its own.
    """
    direction = _canonical(model, direction, "direction")
    point = {name: tensor.detach() for name, tensor in model.named_parameters()}
    given = _canonical(model, parameters or {}, "value")
    point.update(given)
    sharded = any(map(is_sharded, (*point.values(), *direction.values()))) or bool(fsdp_modules(model))
    ladder = _rungs(method, sharded)
    if sharded:
        total, agree = total or total_of_run, agree or agreed_in_run
    agree = agree or alone
    stretch = _stretch(point, direction, total if sharded else None)
    with in_step(agree) if sharded else nullcontext():
        stretched = {name: _scaled(tensor, stretch, point[name].dtype) for name, tensor in direction.items()}
    model_at: _Called = (
        GatheredModel(model, point, stretched, agree) if sharded else _PlainModel(model, point, stretched)
    )
    replay = _Replay(model, args, kwargs or {}, logits or default_logits, next(iter(point.values())))

    for rung, following in zip(ladder, (*ladder[1:], None), strict=True):
        try:
            seen = None
            with in_step(agree):
                if rung == SHARDED_DIFFERENCE:
                    changed = {name: point[name] for name in (*given, *stretched)}
                    z, tangent, mask = replay.sharded_difference(changed, stretched)
                elif rung == FINITE_DIFFERENCE:
                    z, tangent, mask = replay.finite_difference(model_at)
                else:
                    with recording_layers(model, stretch) if layers else nullcontext() as seen:
                        z, tangent, mask = replay.forward_mode(model_at, plain_kernels=rung == MATH_ATTENTION)
        except Exception as error:
            if following is None or not agree(_may_go_on(error, following, sharded)):
                raise
        else:
            return LogitTangent(_widen(z), _widen(tangent) / stretch, mask, rung, seen)
    raise AssertionError("unreachable: the last rung returns or raises")


def _rungs(method: str, sharded: bool) -> tuple[str, ...]:
    if method != "auto" and method not in METHODS:
        raise ConfigurationError(f"got method={method!r}; expected 'auto' or one of {', '.join(METHODS)}.")
    if method == SHARDED_DIFFERENCE and not sharded:
        raise ConfigurationError(
            f"got method={method!r} for a model that is whole on each rank; expected one of {', '.join(LADDER)}."
        )
    return (METHODS if sharded else LADDER) if method == "auto" else (method,)


def _may_go_on(error: Exception, following: str, sharded: bool) -> bool:
    """Whether the next rung may do better; a model made for its shards fails in any way when called whole."""
    if isinstance(error, (torch.OutOfMemoryError, ConfigurationError)):
        return False
    if following == SHARDED_DIFFERENCE and isinstance(error, ElsewhereError):
        return False  # the rank that failed alone would do so again, and leave the others waiting within FSDP
    return sharded or isinstance(error, (NotImplementedError, RuntimeError))


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


class _Called(Protocol):
    """A model that can be called at other parameters than its own."""

    def call(self, made: Made, buffers: Mapping[str, Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The output with ``made(value, direction)`` in place of each parameter."""


class _PlainModel:
    """One that is whole in this process."""

    def __init__(self, model: nn.Module, point: Mapping[str, Tensor], direction: Mapping[str, Tensor]) -> None:
        self._model, self._point, self._direction = model, point, direction

    def call(self, made: Made, buffers: Mapping[str, Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        parameters = {name: made(tensor, self._direction.get(name)) for name, tensor in self._point.items()}
        return functional_call(self._model, {**parameters, **buffers}, tuple(args), dict(kwargs))


@dataclass(frozen=True)
class _Replay:
    """Calling the model again on its inputs: one rung a method, each returns logits, tangent and mask.

    Attributes:
        model: the module.
        args: positional inputs.
        kwargs: keyword inputs.
        function: reads the logits.
        like: one of its parameters.
    """

    model: nn.Module
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    function: LogitsFunction
    like: Tensor

    def forward_mode(self, model_at: _Called, *, plain_kernels: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        device = device_type(self.like)
        args, kwargs = self.args, self.kwargs
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else computing_dtype(self.model)
        autocast = dtype in _LOW_PRECISION
        if autocast and device == "cpu":
            # Half precision would cost r up to 1.2 %, and on the CPU it buys nothing.
            autocast, (args, kwargs) = False, tree_map(_widen, (tuple(args), dict(kwargs)))
        with (
            replaying(self.model, plain_kernels=plain_kernels),
            torch.autocast(device, enabled=autocast, dtype=dtype),
            forward_ad.dual_level(),
        ):
            z, mask = self._logits(model_at.call(_dual, cloned_buffers(self.model), *_copied(args, kwargs)))
            primal, tangent = forward_ad.unpack_dual(z)
            # Clones, since what was unpacked may be a view of a dual tensor whose level ends here.
            return primal.clone(), torch.zeros_like(primal) if tangent is None else tangent.clone(), mask

    def finite_difference(self, model_at: _Called) -> tuple[Tensor, Tensor, Tensor | None]:
        def end(sign: float) -> tuple[Tensor, Tensor | None]:
            def moved(tensor: Tensor, tangent: Tensor | None) -> Tensor:
                wide = _widen(tensor)
                return wide if tangent is None else wide + sign * _RELATIVE_STEP * _widen(tangent)

            # In float32 at least: a difference in half precision measures rounding.
            args, kwargs, buffers = tree_map(_widen, (tuple(self.args), dict(self.kwargs), cloned_buffers(self.model)))
            with replaying(self.model), torch.autocast(device_type(self.like), enabled=False):
                return self._logits(model_at.call(moved, buffers, *_copied(args, kwargs)))

        return _central(end)

    def sharded_difference(
        self, point: Mapping[str, Tensor], direction: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Through the model's own machinery, its parameters moved where they are."""
        args, kwargs = tree_map(_widen, (tuple(self.args), dict(self.kwargs)))

        def end(sign: float) -> tuple[Tensor, Tensor | None]:
            with (
                moved_in_place(self.model, point, direction, sign * _RELATIVE_STEP),
                replaying(self.model),
                torch.autocast(device_type(self.like), enabled=False),
            ):
                output = functional_call(self.model, cloned_buffers(self.model), *_copied(args, kwargs))
                z, mask = self._logits(output)
                return whole(z), None if mask is None else whole(mask)

        return _central(end)

    def _logits(self, output: Any) -> tuple[Tensor, Tensor | None]:
        return read_logits(output, self.function)


def _dual(tensor: Tensor, tangent: Tensor | None) -> Tensor:
    return tensor if tangent is None else forward_ad.make_dual(tensor, tangent)


def _central(end: Callable[[float], tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Logits, their tangent and mask of a model's logits at either end of a step of ``_RELATIVE_STEP``."""
    (z_plus, mask), (z_minus, _) = end(1.0), end(-1.0)
    return (z_plus + z_minus) / 2, (z_plus - z_minus) / (2 * _RELATIVE_STEP), mask


def _copied(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inputs for one call: a model may work on them in place."""
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, (tuple(args), dict(kwargs)))


def _widen(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in _LOW_PRECISION else value


def _scaled(tensor: Tensor, stretch: Tensor, dtype: torch.dtype) -> Tensor:
    part = (local_part(tensor) * stretch.to(tensor.device)).to(dtype)
    return Sharding.of(tensor, 1).whole(part) if is_sharded(tensor) else part


def _stretch(point: Mapping[str, Tensor], direction: Mapping[str, Tensor], total: Total | None) -> Tensor:
    """Factor that brings the direction's entries to the size of the parameters' own, 0-d.

    Neither a half-precision tangent nor a difference is then lost in rounding, however short the step is. Size is that
    of the whole model, since what moves may itself be zero; no tensor moves by more than 8 times its own, or the whole
    model's, so that a step in one scalar stays a small one. ``total`` sums over ranks: it is the same on all of them.
    """
    floating = {name: tensor for name, tensor in point.items() if tensor.is_floating_point()}
    tensors = [*floating.values(), *direction.values()]
    norms = _norms(tensors, total)
    sizes = dict(zip(floating, norms, strict=False))
    steps = dict(zip(direction, norms[len(floating) :], strict=True))
    size = _root_mean_square(norms[: len(floating)], tensors[: len(floating)])
    stretch = size / _root_mean_square(norms[len(floating) :], tensors[len(floating) :])
    for name, tensor in direction.items():
        room = 8 * torch.maximum(size, sizes.get(name, steps[name] * 0) / max(tensor.numel(), 1) ** 0.5)
        stretch = torch.fmin(stretch, room / (steps[name] / max(tensor.numel(), 1) ** 0.5))
    return torch.where(torch.isfinite(stretch) & (stretch > 0), stretch, 1.0)


def _norms(tensors: Sequence[Tensor], total: Total | None) -> Tensor:
    """The L2 norm of each whole tensor, ``(n,)``; of DTensors with one message for all."""
    like = tensors[0]
    norms = torch.stack([torch.linalg.vector_norm(_widen(local_part(one))).to(like.device) for one in tensors])
    if total is None:
        return norms
    ranks = torch.distributed.get_world_size()
    shares = [Sharding.of(one, ranks).share if is_sharded(one) else 1 / ranks for one in tensors]
    norms = norms.double().to(device_type(like))
    return total(torch.tensor(shares, dtype=norms.dtype, device=norms.device) * norms.square()).sqrt()


def _root_mean_square(norms: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    return torch.linalg.vector_norm(norms) / max(sum(tensor.numel() for tensor in tensors), 1) ** 0.5
