"""Asking the controllers, and carrying out what they decide."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from redline import metrics
from redline.controller import (
    AfterUpdate,
    Controller,
    Decay,
    Keep,
    Number,
    Reject,
    RollBack,
    RunOutline,
    Scale,
    ScaleMatrices,
    Stop,
    Withhold,
)
from redline.errors import ConfigurationError, ControllerError, RunStoppedError
from redline.host_copy import is_on_host
from redline.interventions import Intervention, InterventionLog
from redline.monitor import Need
from redline.notes import Notes
from redline.optimizers import OptimizerState, watch_only_reason
from redline.parameters import MatrixLayer, by_parameter
from redline.readings import Readings
from redline.run_snapshot import RunningStatistics, RunSnapshot
from redline.step import Step
from redline.transaction import StepTransaction, times
from redline.weight_decay import DecayRules, Rates

T = TypeVar("T")


class Control:
    """Decisions of one session's controllers, applied to its transaction and traced.

    Attributes:
        log: what they did.
    """

    def __init__(
        self,
        controllers: Sequence[tuple[str, Controller]],
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        schedulers: Sequence[Any],
        read_tensors: Callable[[], Mapping[str, Tensor]],
        transaction: StepTransaction,
        readings: Readings,
    ) -> None:
        """Refuse at once what may only be watched.

        Args:
            controllers: with their names, in the order in which they are asked.
            model: whose running statistics a withheld step must not touch.
            optimizers: of the joint step.
            schedulers: whose state comes back on a roll-back.
            read_tensors: the live parameters that the optimizers move, and buffers, by name.
            transaction: on which decisions are carried out.
            readings: where they are counted.

        Raises:
            ConfigurationError: there are controllers, and an optimizer that they must not touch.
        """
        self.log = InterventionLog(readings, {name for name, one in controllers if one.lengthens})
        self._controllers, self._optimizers = controllers, optimizers
        self._transaction, self._readings = transaction, readings
        self._states: list[tuple[Optimizer, OptimizerState]] = []
        self._states_checked = False
        self._statistics = RunningStatistics(model)
        self._snapshots = {name: RunSnapshot(read_tensors, optimizers, schedulers) for name, _ in controllers}
        self._decay_rules = DecayRules() if any(one.per_parameter for _, one in controllers) else None
        self._refuse_watch_only()
        for name, _ in controllers:
            for decision in (Scale, Decay, Withhold, Reject, RollBack, Stop):
                readings.count(metrics.INTERVENTIONS, 0, name, decision.action)

    @property
    def sub_samples(self) -> set[tuple[int | None, int]]:
        """``max_samples`` and ``remember`` of the tangents that decisions go by."""
        return {one.sub_sample for _, one in self._controllers if one.sub_sample is not None}

    def begin(
        self,
        layers: Sequence[MatrixLayer],
        held_by: Callable[[Optimizer], Mapping[str, Tensor]],
        notes: Notes,
        *,
        sharded: bool = False,
    ) -> None:
        """Tell the controllers what they are to control; ``held_by``: an optimizer's parameters, by name."""
        rates: dict[str, Rates] = {}
        for optimizer in self._optimizers if self._decay_rules else ():
            assert self._decay_rules is not None
            parameters = held_by(optimizer)
            if shared := rates.keys() & parameters.keys():
                raise ConfigurationError(
                    f"got {min(shared)!r} in two optimizers; expected each parameter in one: with two, rate and decay "
                    "of its update cannot be told. Leave out the controllers that decide on single matrices."
                )
            rates.update(self._decay_rules.rates(optimizer, parameters))
        for name, controller in self._controllers:
            controller.begin(RunOutline(layers, self._optimizers, rates, partial(_say, notes, name), sharded))

    # The step, in order ---------------------------------------------------------------------------------------------

    def before_forward(self) -> None:
        """Ahead of a step's first forward."""
        if self._controllers:
            self._statistics.keep()

    def open(self, step: Step) -> None:
        """After backward, before the first update of the joint step: whether there is to be one.

        All are asked, since guards learn from every step. The first roll-back outranks what else is decided: it may
        save a run that another would stop.
        """
        answers = [
            (name, answer)
            for name, controller in self._controllers
            if (answer := self._ask(name, step, partial(_answer_before, controller))) is not None
        ]
        if (found := self.log.rejection) is not None:
            self.log.rejection = None
            raise RunStoppedError(_rejected(found))
        back = next(((name, answer) for name, answer in answers if isinstance(answer, RollBack)), None)
        objections = [
            (name, answer)
            for name, answer in answers
            if isinstance(answer, Withhold) or (isinstance(answer, Stop) and back is None)
        ]
        step.withheld = back is not None or bool(objections)
        if back is not None:
            if not self._snapshots[back[0]].taken:
                raise ConfigurationError(
                    f"got a roll-back from {back[0]}, which kept no snapshot; expected Keep first."
                )
            self._snapshots[back[0]].restore()
        elif objections:
            self._statistics.restore()
        told = [self.log.tell(step.index, *one) for one in (*objections, *([back] if back else []))]
        for name, answer in answers:
            if isinstance(answer, Keep):  # last: it must hold nothing of a step that was withheld
                self._snapshots[name].take(step.index, answer.memory, answer.in_checkpoints)
        for one in told:
            if one.action == Stop.action:
                raise RunStoppedError(f"{one.controller} stopped the run at step {one.step}: {one.reason}")

    def before_update(self, step: Step, optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> None:
        """Ahead of each optimizer's update: set its gradients aside, snapshot its state."""
        if step.withheld:
            self._transaction.withhold(parameters.values())
        if self._decay_rules:
            step.rates.update(self._decay_rules.rates_of_step(optimizer, parameters))
        if any(controller.snapshots_state for _, controller in self._controllers):
            self._states.append((optimizer, OptimizerState.of(optimizer)))

    def decide(self, step: Step) -> None:
        """After the update: its length, single parameters, then the whole of what is left; commit it all at once."""
        if step.withheld:
            self._read_out(0.0, 0.0)
            return
        if self._controllers and not self._states_checked:
            self._refuse_watch_only()  # shadow weights show only once the state is there
            self._states_checked = True
        scale: float | Tensor = 1.0
        size: float | Tensor | None = step.normalized_step_size
        taken: list[tuple[str, AfterUpdate]] = []
        for name, controller in sorted(self._controllers, key=_place):
            decisions = self._ask(name, step, partial(_answers_after, controller))
            # Asking may have measured r, of what the controllers before left of the step.
            size = size if step.normalized_step_size is None else step.normalized_step_size
            for decision in self._known(decisions):
                if isinstance(decision, Reject) and decision.when is True:
                    self._reject(step, name, decision)
                    return
                taken.append((name, decision))
                if isinstance(decision, (ScaleMatrices, Decay)):
                    if self._change_matrices(step, name, decision):
                        step.update_changed()
                        size = None  # r of what is left is known only if someone measures it
                    continue
                if isinstance(decision, Reject):
                    # Only the device knows: a scale of 0 or 1. What was measured of the update holds, or is idle.
                    factor: float | Tensor = 1.0 - torch.as_tensor(decision.when).float()
                else:
                    factor = decision.factor
                    step.update_changed()
                if isinstance(decision, Scale) and decision.parameter is not None:
                    self._scale(step, name, factor, [decision.parameter])
                    size = None
                else:
                    self._scale(step, name, factor, list(self._transaction.parameters))
                    scale, size = scale * factor, None if size is None else times(factor, size)
        for name, controller in self._controllers:
            self._ask(name, step, partial(controller.read_out, readings=self._readings))
        self._transaction.commit()
        if taken:
            step.update_changed()  # and so did the weights
        for name, decision in taken:
            self.log.add(step.index, name, decision)
        if size is not None or taken:
            self._read_out(scale, size)
        else:
            self._readings.gauge(metrics.STEP_SCALE, scale)

    def forget(self) -> None:
        """The step has ended: its copies go."""
        self._states = []
        self._statistics.forget()

    # State ----------------------------------------------------------------------------------------------------------

    @property
    def snapshots(self) -> dict[str, RunSnapshot]:
        """The snapshots there are, by controller."""
        return {name: snapshot for name, snapshot in self._snapshots.items() if snapshot.taken}

    def state_dict(self) -> dict[str, Any]:
        """The log, the snapshots that go with checkpoints, and the state of the controllers."""
        return {
            "log": self.log.state_dict(),
            "snapshots": {name: snapshot.state_dict() for name, snapshot in self._snapshots.items()},
            "controllers": {name: controller.state_dict() for name, controller in self._controllers},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` was taken; controllers that were not there start fresh."""
        self.log.load_state_dict(state["log"])
        for name, controller in self._controllers:
            if name in state["controllers"]:
                self._snapshots[name].load_state_dict(state["snapshots"][name])
                controller.load_state_dict(state["controllers"][name])

    # Carrying out ---------------------------------------------------------------------------------------------------

    def _scale(self, step: Step, name: str, factor: float | Tensor, parameters: Sequence[str]) -> None:
        """Scale whole updates: decoupled decay with the rest, as if the rate had been another."""
        for parameter in parameters:
            self._refuse_unmoved(name, parameter)
            if parameter in step.rates:
                step.rates[parameter] = step.rates[parameter]._replace(lr=step.rates[parameter].lr * factor)
        self._transaction.scale(factor, parameters)

    def _change_matrices(self, step: Step, name: str, decision: ScaleMatrices | Decay) -> bool:
        """Whether it came to anything."""
        for layer in decision.layers:
            self._refuse_unmoved(name, layer.parameter)
        changed = False
        if isinstance(decision, ScaleMatrices):
            factors = by_parameter(decision.layers, decision.factors, lambda parameter: 1.0)
            for parameter, factor in factors.items():
                if isinstance(factor, Tensor) or factor != 1:
                    here = step.layout.cut(parameter, factor), step.layout.cut(parameter, step.rates[parameter].decay)
                    self._transaction.scale_net(parameter, *here)
                    changed = True
            return changed
        in_force = by_parameter(
            decision.layers, decision.weight_decays, lambda parameter: step.rates[parameter].weight_decay
        )
        for parameter, weight_decay in in_force.items():
            rates = step.rates[parameter]
            if rates.coupled:
                raise ConfigurationError(
                    f"got a weight decay for {parameter!r} from {name}; expected one that can be told from the rest of "
                    f"the update: {rates.coupled}."
                )
            both = weight_decay, rates.weight_decay
            if any(isinstance(one, Tensor) for one in both) or _differ(*both, decision.weight_decays.dtype):
                more = rates.lr * (weight_decay - rates.weight_decay)
                self._transaction.shrink(parameter, step.layout.cut(parameter, more))
                step.rates[parameter] = rates._replace(weight_decay=weight_decay)
                changed = True
        return changed

    def _refuse_unmoved(self, name: str, parameter: str) -> None:
        if parameter not in self._transaction.parameters:
            raise ConfigurationError(
                f"got a decision on {parameter!r} from {name}, which the step did not move; expected the name of a "
                "parameter in the optimizers."
            )

    def _known(self, decisions: Iterable[AfterUpdate]) -> Iterator[AfterUpdate]:
        """The decisions that come to anything, with what the host knows of them read.

        Whether to reject is waited for where the optimizer's state can still be taken back.
        """
        for decision in decisions:
            if isinstance(decision, Reject):
                when = decision.when
                if isinstance(when, Tensor) and (is_on_host(when) or self._states):
                    when = bool(when)
                if when is not False:
                    yield replace(decision, when=when)
            elif isinstance(decision, ScaleMatrices):
                if not is_on_host(decision.factors) or decision.acts:
                    yield decision
            elif isinstance(decision, Decay):
                yield decision
            else:
                factor = decision.factor
                if isinstance(factor, Tensor) and is_on_host(factor):
                    factor = float(factor)
                if isinstance(factor, Tensor) or factor != 1:
                    yield replace(decision, factor=factor)

    def _reject(self, step: Step, name: str, decision: Reject) -> None:
        self._transaction.scale(0.0)
        self._transaction.commit()
        step.update_changed()
        self._statistics.restore()
        rejected = self.log.tell(step.index, name, decision)
        self._read_out(0.0, 0.0)
        if not self._states:
            raise RunStoppedError(_rejected(rejected))
        for optimizer, state in self._states:
            state.restore(optimizer)

    def _read_out(self, scale: float | Tensor, size: Tensor | float | None) -> None:
        self._readings.gauge(metrics.STEP_SCALE, scale)
        if size is None:
            self._readings.absent(metrics.COMMITTED_STEP_SIZE)
        else:
            self._readings.gauge(metrics.COMMITTED_STEP_SIZE, size)

    def _ask(self, name: str, step: Step, question: Callable[[Step], T]) -> T:
        try:
            return question(step)
        except ConfigurationError:
            raise
        except Exception as error:
            raise ControllerError(
                f"{name} failed at step {step.index} with {type(error).__name__}: {error}. The parameters are as the "
                "optimizer left them."
            ) from error

    # Refusals -------------------------------------------------------------------------------------------------------

    def _refuse_watch_only(self) -> None:
        for optimizer in self._optimizers if self._controllers else ():
            if reason := watch_only_reason(optimizer):
                raise ConfigurationError(
                    f"got controllers on {type(optimizer).__name__}, which may only be monitored: {reason}. Leave "
                    "controllers out."
                )


def _differ(decided: Number, before: Number, precision: torch.dtype) -> bool:
    """Whether a decay on the host is another, in the precision it was decided in."""
    return float(decided) != float(torch.tensor(before, dtype=precision))


def _say(notes: Notes, name: str, text: str) -> None:
    notes.add(f"{name}: {text}")


def _rejected(one: Intervention) -> str:
    return (
        f"{one.controller} rejected step {one.step}: {one.reason} The parameters are as they were before it; the "
        "optimizer's moments are not, so the run is stopped. Go on from a checkpoint, or use a controller that keeps a "
        "snapshot of the optimizer's state."
    )


def _place(named: tuple[str, Controller]) -> int:
    """What may lengthen the step first, so that clamps have the last word: single parameters, then the joint step."""
    _, controller = named
    return 0 if controller.lengthens else 1 if controller.per_parameter else 2


def _answers_after(controller: Controller, step: Step) -> list[AfterUpdate]:
    decisions = list(controller.inspect(step))  # a generator runs, and fails, here
    for decision in decisions:
        if not isinstance(decision, (Scale, ScaleMatrices, Decay, Reject)):
            raise TypeError(
                f"got {decision!r} from inspect; expected redline.Scale, ScaleMatrices, Decay or redline.Reject"
            )
        if isinstance(decision, (ScaleMatrices, Decay)) and not controller.per_parameter:
            raise TypeError(
                f"got {decision!r} from a controller of the joint step; expected per_parameter = True on it"
            )
    if decisions and Need.UPDATE not in controller.needs:
        raise TypeError(
            f"got {decisions[0]!r} from a controller that needs {controller.needs}; expected Need.UPDATE in it"
        )
    return decisions


def _answer_before(controller: Controller, step: Step) -> Withhold | RollBack | Stop | Keep | None:
    decision = controller.before_update(step)
    if decision is not None and not isinstance(decision, (Withhold, RollBack, Stop, Keep)):
        raise TypeError(f"got {decision!r} from before_update; expected redline.Withhold, RollBack, Stop, Keep or None")
    return decision
