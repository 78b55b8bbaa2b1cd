"""Everything that can be said of a model ahead of its run."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch.utils._pytree import tree_leaves

from redline.errors import ConfigurationError
from redline.integrations.doctor.cost import Costs, bytes_of, measure_costs
from redline.integrations.doctor.coverage import Coverage, cover
from redline.integrations.doctor.subject import Subject, described
from redline.integrations.doctor.tangents import Tangents, try_tangents
from redline.metrics import NORMALIZED_STEP_SIZE, UPDATE_SPECTRAL_NORM, WEIGHT_SPECTRAL_NORM

_SEED = 0xD0C


@dataclass(frozen=True)
class Memory:
    """Bytes, of what Redline holds.

    Attributes:
        parameters: of the model's own, for comparison.
        between_steps: kept from step to step by the default monitors: warm starts and remembered samples; None where no
            step could be taken.
        due_step: held at a step at which something is due, from backward to commit: a copy of the parameters, the
            update and the inputs. The tangent's pass comes on top: about twice the activations of one forward pass.
        controlled_step: held at every step as soon as there is a controller: a copy of the parameters.
        snapshot: kept by SpikeGuard: parameters, buffers and AdamW's state; None as above.
    """

    parameters: int
    between_steps: int | None
    due_step: int
    controlled_step: int
    snapshot: int | None


@dataclass(frozen=True)
class Diagnosis:
    """What will be measured of a model, how, and what it will cost.

    Attributes:
        subject: the model as it was given.
        coverage: of its parameters.
        tangents: how r can be taken.
        memory: what Redline will hold.
        costs: what a step costs; None where no step could be taken.
        gaps: what cannot be measured, in words; empty if everything can.
    """

    subject: Subject
    coverage: Coverage
    tangents: Tangents
    memory: Memory
    costs: Costs | None
    gaps: tuple[str, ...]


def examine(subject: Subject) -> Diagnosis:
    """Look at a model; it is left alone, and what is tried is tried on a copy.

    Raises:
        ConfigurationError: the model cannot be copied or called on its inputs, or its output holds no logits.
    """
    with torch.random.fork_rng():
        torch.manual_seed(_SEED)
        tried = _prepared(subject)
        coverage = cover(tried.model)
        tangents = try_tangents(tried)
        costs, gaps = _costs(tried)
    gaps = [*coverage.gaps, *gaps]
    if tangents.method is None:
        gaps.append("r is not measured: no way of taking the logit tangent works, see above.")
    if costs is not None:
        gaps += [note for note in costs.notes if note not in gaps and says_a_gap(note)]
        gaps += _absent(costs, coverage, told=bool(gaps))
    return Diagnosis(subject, coverage, tangents, _memory(tried, costs), costs, tuple(gaps))


def says_a_gap(note: str) -> bool:
    """Whether a note says that something is not measured, and not how it is."""
    return "not measured" in note or "could not measure" in note


def _prepared(subject: Subject) -> Subject:
    """A copy in training mode, called once so that lazy parameters are there."""
    try:
        model = copy.deepcopy(subject.model)
    except Exception as error:
        raise ConfigurationError(
            f"copying the model of {subject.name} failed with {described(error)}; expected one that copy.deepcopy can "
            "copy, so that what is tried leaves yours alone."
        ) from error
    if not model.training:
        model.train()
    try:
        with torch.no_grad():
            model(*subject.args, **subject.kwargs)
    except Exception as error:
        raise ConfigurationError(
            f"calling {type(model).__name__} on its example inputs failed with {described(error)}; expected inputs "
            "that its forward takes. Pass others by --input package.module:callable, or --shape with --dtype."
        ) from error
    return replace(subject, model=model)


def _costs(subject: Subject) -> tuple[Costs | None, list[str]]:
    try:
        return measure_costs(subject), []
    except ConfigurationError:
        raise
    except Exception as error:  # noqa: BLE001 a model may fail in any way: that is the answer
        return None, [f"Costs are not measured: a step of training on the example batch failed with {described(error)}"]


def _absent(costs: Costs, coverage: Coverage, *, told: bool) -> Iterator[str]:
    """What the watched steps did not read, where nothing told so far says why."""
    if not told and NORMALIZED_STEP_SIZE.name not in costs.snapshot:
        yield "r was not measured on the example batch."
    for metric, what in ((WEIGHT_SPECTRAL_NORM, "weight"), (UPDATE_SPECTRAL_NORM, "update")):
        read = costs.snapshot.layers(metric.name)
        if not told and coverage.matrices and not read:
            yield f"No {what} spectrum was measured on the example batch."


def _memory(subject: Subject, costs: Costs | None) -> Memory:
    parameters = list(subject.model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    before = bytes_of(trained)
    update = sum(parameter.numel() * max(parameter.element_size(), 4) for parameter in trained)
    inputs = bytes_of(tree_leaves((subject.args, subject.kwargs)))
    kept = bytes_of([*trained, *subject.model.buffers()])
    return Memory(
        parameters=bytes_of(parameters),
        between_steps=None if costs is None else costs.between_steps,
        due_step=before + update + inputs,
        controlled_step=before,
        snapshot=None if costs is None else kept + costs.optimizer_state,
    )
