"""Width transfer: what was tuned on a narrow model, carried over to a wide one, and the check that it worked.

Symbols: ``d`` the width, ``m = width / base_width``; lr and wd the learning rate and weight decay of AdamW.

- Matrix-like parameters, whose fan-in grows with the width: ``lr / m`` and ``wd * sqrt(m)``.
- Vector-like ones, whose fan-in does not (embeddings, input layers, gains, biases): ``lr`` and no decay.

Under AdamW a matrix's singular values settle in proportion to ``sqrt(lr / wd)``, the top one to
``sqrt(lr / wd) * d^0.75``; with this rule it is the same at every width, and with it each sublayer's gain.

Source: *Robust Layerwise Scaling Rules by Proper Weight Decay Tuning* (arXiv 2510.15262) for the decay; muP (arXiv
2203.03466, table 3) for the rates. A readout counts as matrix-like here, to which that table gives the same rate: where
a model divides its logits by the width itself, name the readout in ``vector_like``. A readout tied to the embedding is
one, and needs that division. Attention is left to the model: heads of fixed width, or logits divided by it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import numpy as np
from torch import Tensor, nn

from redline import metrics
from redline.errors import ConfigurationError
from redline.notes import Notes
from redline.numerics.names import plain_name
from redline.optimizers import numbered
from redline.parameters import matrix_layers, named_parameters
from redline.readings import Snapshot
from redline.session import Session

_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_SCALED = "width_scale"  # in a parameter group: it was made by ``transfer``

Kind = Literal["matrix-like", "vector-like"]


@dataclass(frozen=True)
class ScaledParameter:
    """What was decided for one parameter, and why."""

    name: str
    shape: tuple[int, ...]
    kind: Kind
    why: str


def classify(
    model: nn.Module, width: int, *, matrix_like: Collection[str] = (), vector_like: Collection[str] = ()
) -> dict[str, ScaledParameter]:
    """Which parameters are matrix-like at this width, and which vector-like; by qualified name.

    Matrix-like is what has a fan-in of at least the width and is no embedding. An input layer with as many inputs looks
    the same and has to be named.

    Args:
        model: trainable parameters only are classified, tied ones once.
        width: of the model: what grows from the narrow model to the wide one.
        matrix_like: names, or patterns such as "blocks.*.gate", to be taken for matrix-like whatever they look like.
        vector_like: likewise.

    Raises:
        ConfigurationError: a width below 1, a pattern that fits no parameter, a name that both lists claim.
    """
    if not 1 <= width < math.inf:
        raise ConfigurationError(f"got width={width}; expected the model's width, at least 1.")
    parameters = {name: p for name, p in named_parameters(model).items() if p.requires_grad}
    if sharded := [name for name, parameter in parameters.items() if hasattr(parameter, "placements")]:
        raise ConfigurationError(
            f"got {sharded[0]!r} sharded (DTensor); expected whole parameters: make the groups before sharding."
        )
    first = {id(parameter): name for name, parameter in parameters.items()}
    names = {  # a tied parameter by each of its names
        plain_name(name): first[id(p)] for name, p in model.named_parameters(remove_duplicate=False) if id(p) in first
    }
    claimed: dict[str, Kind] = {}
    for kind, patterns in (("matrix-like", matrix_like), ("vector-like", vector_like)):
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            fitting = [own for name, own in names.items() if name == pattern or fnmatchcase(name, pattern)]
            if not fitting:
                raise ConfigurationError(
                    f"got {pattern!r} as {kind}; expected the name of a trainable parameter, or a pattern that fits "
                    f"some, such as {next(iter(parameters), 'none: the model has none')!r}."
                )
            for name in fitting:
                if claimed.setdefault(name, kind) != kind:  # type: ignore[arg-type]
                    raise ConfigurationError(f"got {name!r} as matrix-like and as vector-like; expected one of them.")

    def held_by(kinds: tuple[type[nn.Module], ...]) -> set[int]:
        owners = (module for module in model.modules() if isinstance(module, kinds))
        return {id(parameter) for module in owners for parameter in module.parameters()}

    embedded, convolving = held_by(_EMBEDDINGS), held_by((nn.modules.conv._ConvNd,))
    fan_in = {layer.parameter: layer.d_in for layer in matrix_layers(model, Notes())}
    found = {}
    for name, parameter in parameters.items():
        is_vector = parameter.dim() == 3 and 1 in parameter.shape and id(parameter) not in convolving
        kind, why = _kind(None if is_vector else fan_in.get(name), id(parameter) in embedded, width)
        if name in claimed:
            kind, why = claimed[name], "as you said"
        found[name] = ScaledParameter(name, tuple(parameter.shape), kind, why)
    return found


def _kind(fan_in: int | None, embedded: bool, width: int) -> tuple[Kind, str]:
    if embedded:
        return "vector-like", "embedding"
    if fan_in is None:
        return "vector-like", "vector"
    if fan_in < width:
        return "vector-like", f"fan-in {fan_in}, below the width"
    return "matrix-like", f"fan-in {fan_in}"


def transfer(
    model: nn.Module,
    *,
    base_width: int,
    width: int,
    lr: float,
    weight_decay: float,
    matrix_like: Collection[str] = (),
    vector_like: Collection[str] = (),
    groups: Sequence[Mapping[str, Any]] | None = None,
    show: bool = True,
) -> list[dict[str, Any]]:
    """Parameter groups for AdamW that carry what was tuned at ``base_width`` over to ``width``.

    The initialization is the model's own business: hidden matrices at variance ``1 / fan_in`` (torch's default is in
    proportion), the readout at 0 or at standard deviation ``1 / fan_in``.

    Args:
        model: the wide one; its trainable parameters are classified by ``classify``.
        base_width: of the model that was tuned.
        width: of this one.
        lr: tuned at ``base_width``.
        weight_decay: tuned at ``base_width``.
        matrix_like: names, or patterns such as "blocks.*.gate", to be taken for matrix-like.
        vector_like: likewise.
        groups: parameter groups of your own over the model, where these differ in more than this rule; a ``lr`` or
            ``weight_decay`` of theirs is scaled instead of the argument. By default one group of all parameters.
        show: whether to print what was decided for each parameter.

    Returns:
        Groups with ``params``, ``lr``, ``weight_decay`` and a ``name``, to be given to ``torch.optim.AdamW``.

    Raises:
        ConfigurationError: a width below 1, a rate or decay that cannot work, groups that are scaled already or hold a
            parameter that the model does not, and what ``classify`` refuses.
    """
    if not isinstance(model, nn.Module):
        raise ConfigurationError(
            f"got a {type(model).__name__} as model; expected a torch.nn.Module. Parameter groups of your own go into "
            "groups=."
        )
    if not 1 <= base_width < math.inf:
        raise ConfigurationError(f"got base_width={base_width}; expected the width it was tuned at, at least 1.")
    decided = classify(model, width, matrix_like=matrix_like, vector_like=vector_like)
    _refuse_rates({"lr": lr, "weight_decay": weight_decay}, base_width)
    parameters = named_parameters(model)
    kinds: dict[int, Kind] = {id(parameters[name]): one.kind for name, one in decided.items()}
    scale = width / base_width
    made: list[dict[str, Any]] = []
    given: list[Any] = [{"params": [parameters[name] for name in decided]}] if groups is None else [*groups]
    if isinstance(groups, Mapping) or not all(isinstance(group, Mapping) and "params" in group for group in given):
        raise ConfigurationError("got groups that are no parameter groups; expected a list of dicts with 'params'.")
    for k, group in enumerate(given):
        if _SCALED in group:
            raise ConfigurationError(
                f"got parameter group {k} ({group.get('name', 'no name')!r}), which is scaled already, by a width "
                f"{group[_SCALED]:g} times the base; expected groups as they were tuned at width {base_width}."
            )
        members = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        members = [one[1] if isinstance(one, tuple) else one for one in members]  # (name, parameter) pairs
        if strangers := [p for p in members if id(p) not in kinds and p.requires_grad]:
            raise ConfigurationError(
                f"got parameter group {k} with {len(strangers)} parameters that {type(model).__name__} does not have, "
                f"the first of shape {tuple(strangers[0].shape)}; expected groups over the model's own."
            )
        rate, decay = group.get("lr", lr), group.get("weight_decay", weight_decay)
        _refuse_rates({"lr": rate, "weight_decay": decay}, base_width, f" in parameter group {k}")
        # What an optimizer and its schedulers left there: names of other groups, and the rate they start from.
        others = {key: value for key, value in group.items() if key not in ("param_names", "initial_lr")}
        settings: dict[Kind, tuple[float, float]] = {
            "matrix-like": (rate / scale, decay * math.sqrt(scale)),
            "vector-like": (rate, 0.0),
        }
        for kind, (rate, decay) in settings.items():
            params = [p for p in members if kinds.get(id(p)) == kind]
            if params:
                own = {"params": params, "lr": rate, "weight_decay": decay, _SCALED: scale}
                made.append({**others, **own, "name": f"{group['name']} {kind}" if "name" in group else kind})
    for group, name in zip(made, numbered([group["name"] for group in made]), strict=True):
        group["name"] = name
    if show:
        from redline.scaling_view import print_decisions  # rich is loaded only by who prints

        rates = {id(p): (group["lr"], group["weight_decay"]) for group in made for p in group["params"]}
        title = f"From width {base_width} to {width}"
        print_decisions(title, [(one, rates.get(id(parameters[name]))) for name, one in decided.items()])
    return made


def _refuse_rates(rates: Mapping[str, Any], base_width: int, where: str = "") -> None:
    for what, value in rates.items():
        if not 0 <= float(value) < math.inf:
            raise ConfigurationError(
                f"got {what}={float(value)}{where}; expected what was tuned at width {base_width}, 0 or more."
            )


@dataclass(frozen=True)
class LayerRatio:
    """Top singular values of one matrix in two runs, and the second over the first."""

    layer: str
    reference: float
    run: float
    ratio: float


@dataclass(frozen=True)
class SpectraComparison:
    """Whether top singular values match across two runs; ``rich.print`` shows it, ``to_dict`` gives it as plain data.

    Attributes:
        layers: matrices that both have, the worst match first.
        unmatched: names that only one of them has.
        tolerance: by which a ratio may differ from 1.
        median_ratio: of the run's to the reference's; NaN where one is.
        matches: whether every layer is within the tolerance.
    """

    layers: tuple[LayerRatio, ...]
    unmatched: tuple[str, ...]
    tolerance: float
    median_ratio: float
    matches: bool

    def to_dict(self) -> dict[str, Any]:
        """As plain dicts, lists, numbers and strings."""
        return asdict(self)

    def __rich__(self) -> Any:
        from redline.scaling_view import comparison_view

        return comparison_view(self)


def compare_spectra(
    reference: Session | Snapshot | Mapping[str, float],
    run: Session | Snapshot | Mapping[str, float],
    *,
    layers: Collection[str] | None = None,
    tolerance: float = 0.1,
) -> SpectraComparison:
    """Do top singular values match across widths? The diagnostic of arXiv 2510.15262: where they do, so do the gains.

    Args:
        reference: the narrow run: a session or snapshot that ``WeightSpectrum`` has measured, or ``{layer: sigma_1}``.
        run: the wide one, likewise, with the same layer names.
        layers: names or patterns of the matrices to compare, a stack's name for all of it; all by default. The rule
            speaks of matrix-like ones that grow in both dimensions, neither embeddings nor the readout:
            ``[one.name for one in classify(model, width).values() if one.kind == "matrix-like"]``, but the readout.
        tolerance: by which a ratio may differ from 1. The default is Redline's choice.

    Raises:
        ConfigurationError: nothing to compare: no spectra were measured, or no layer has a name in both.
    """
    if not 0 <= tolerance < math.inf:
        raise ConfigurationError(f"got tolerance={tolerance}; expected a ratio's distance from 1, such as 0.1.")
    first, second = _spectra(reference, "reference"), _spectra(run, "run")
    chosen = [layers] if isinstance(layers, str) else layers
    names = [
        name
        for name in dict.fromkeys([*first, *second])
        if chosen is None or any(one in (name, name.partition("[")[0]) or fnmatchcase(name, one) for one in chosen)
    ]
    ratios = [
        LayerRatio(name, first[name], second[name], second[name] / first[name] if first[name] else math.inf)
        for name in names
        if name in first and name in second
    ]
    if not ratios:
        raise ConfigurationError(
            f"got no layer to compare: {len(first)} in the reference (such as {next(iter(first))!r}), {len(second)} in "
            f"the run (such as {next(iter(second))!r}); expected common names"
            + ("." if chosen is None else f" among layers={list(chosen)}.")
        )
    ratios.sort(key=lambda one: abs(math.log(one.ratio)) if 0 < one.ratio < math.inf else math.inf, reverse=True)
    return SpectraComparison(
        tuple(ratios),
        tuple(name for name in names if not (name in first and name in second)),
        tolerance,
        float(np.median([one.ratio for one in ratios])),
        all(abs(one.ratio - 1) <= tolerance for one in ratios),
    )


def _spectra(of: Session | Snapshot | Mapping[str, float], what: str) -> Mapping[str, float]:
    snapshot = of.latest if isinstance(of, Session) else of
    found = snapshot.layers(metrics.WEIGHT_SPECTRAL_NORM.name) if isinstance(snapshot, Snapshot) else dict(snapshot)
    if not found:
        raise ConfigurationError(
            f"got a {what} without spectra; expected {metrics.WEIGHT_SPECTRAL_NORM.name} to have been measured: attach "
            "with redline.WeightSpectrum() among the monitors, or pass {layer: sigma_1}."
        )
    return found
