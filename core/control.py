"""Asking the controllers, and carrying out what they decide."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeVar

from torch import Tensor
from torch.optim import Optimizer

from redline import metrics
from redline.controller import Controller, Decision, Intervention, Reject, Scale, Withhold
from redline.errors import ConfigurationError, ControllerError, StepRejectedError
from redline.monitor import Need
from redline.optimizers import OptimizerState, watch_only_reason
from redline.readings import Readings
from redline.step import Step
from redline.transaction import StepTransaction

T = TypeVar("T")


class Control:
    """Decisions of one session's controllers, applied to its transaction and traced."""

    def __init__(
        self,
        controllers: Sequence[tuple[str, Controller]],
        optimizers: Sequence[Optimizer],
        transaction: StepTransaction,
        readings: Readings,
    ) -> None:
        """Refuse at once what may only be watched.

        Raises:
            ConfigurationError: there are controllers, and an optimizer that they must not touch.
        """
        self.interventions: list[Intervention] = []
        self._controllers, self._optimizers = controllers, optimizers
        self._transaction, self._readings = transaction, readings
        self._states: list[OptimizerState] = []
        self._states_checked = False
        self._refuse_watch_only()
        for name, _ in controllers:
            for decision in (Scale, Withhold, Reject):
                self._readings.count(metrics.INTERVENTIONS, 0, name, _action(decision))

    def open(self, step: Step) -> None:
        """After backward, before the first update of the joint step: whether to withhold it."""
        for name, controller in self._controllers:
            withheld = self._ask(name, step, partial(_withheld, controller))
            if withheld is not None:
                step.withheld = True
                self._trace(step, name, withheld)
                return

    def before_update(self, step: Step, optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> None:
        """Ahead of each optimizer's update: set its gradients aside, snapshot its state."""
        if step.withheld:
            self._transaction.withhold(parameters.values())
        if any(controller.snapshots_state for _, controller in self._controllers):
            self._states.append(OptimizerState(optimizer))

    def decide(self, step: Step) -> None:
        """After the update: single parameters first, then the whole of what is left; then commit it all at once."""
        if step.withheld:
            self._read_out(0.0, 0.0)
            return
        if self._controllers and not self._states_checked:
            self._refuse_watch_only()  # shadow weights show only once the state is there
            self._states_checked = True
        scale, size, taken = 1.0, step.normalized_step_size, []
        for name, controller in sorted(self._controllers, key=lambda pair: not pair[1].per_parameter):
            decisions = self._ask(name, step, partial(_decisions, controller))
            # Asking may have measured r, of what the controllers before left of the step.
            size = size if step.normalized_step_size is None else step.normalized_step_size
            for decision in decisions:
                if isinstance(decision, Reject):
                    self._reject(step, name, controller, decision)
                    return
                if decision.factor == 1:
                    continue
                taken.append((name, decision))
                step.update_changed()
                if decision.parameter is None:
                    self._transaction.scale(decision.factor)
                    scale *= decision.factor
                    size = None if size is None else size * decision.factor
                else:
                    self._scale_one(name, decision.factor, decision.parameter)
                    size = None  # r of what is left is known only if someone measures it
        self._transaction.commit()
        for name, decision in taken:
            self._trace(step, name, decision)
            step.update_changed()  # and so did the weights
        if size is not None or taken:
            self._read_out(scale, size)
        else:
            self._readings.gauge(metrics.STEP_SCALE, scale)

    def forget(self) -> None:
        """The step has ended: its snapshots go."""
        self._states = []

    def _scale_one(self, name: str, factor: float, parameter: str) -> None:
        if parameter not in self._transaction.parameters:
            raise ConfigurationError(
                f"got a scale for {parameter!r} from {name}, which the step did not move; expected the name of a "
                "parameter in the optimizers."
            )
        self._transaction.scale(factor, [parameter])

    def _reject(self, step: Step, name: str, controller: Controller, decision: Reject) -> None:
        self._transaction.scale(0)
        self._transaction.commit()
        step.update_changed()
        self._trace(step, name, decision)
        self._read_out(0.0, 0.0)
        if not controller.snapshots_state:
            raise StepRejectedError(
                f"{name} rejected step {step.index}: {decision.reason} The parameters are as they were before it; "
                "the optimizer's moments are not, so the run is stopped. Go on from a checkpoint, or use a controller "
                "that keeps a snapshot of the optimizer's state."
            )
        for state in self._states:
            state.restore()

    def _read_out(self, scale: float, size: Tensor | float | None) -> None:
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

    def _trace(self, step: Step, name: str, decision: Decision) -> None:
        action = _action(type(decision))
        self.interventions.append(Intervention(step.index, name, action, decision.reason, dict(decision.saw)))
        self._readings.count(metrics.INTERVENTIONS, 1, name, action)

    def _refuse_watch_only(self) -> None:
        for optimizer in self._optimizers if self._controllers else ():
            if reason := watch_only_reason(optimizer):
                raise ConfigurationError(
                    f"got controllers on {type(optimizer).__name__}, which may only be monitored: {reason}. Leave "
                    "controllers out."
                )


def _action(decision: type[Decision]) -> str:
    return decision.__name__.lower()


def _decisions(controller: Controller, step: Step) -> list[Scale | Reject]:
    decisions = list(controller.inspect(step))  # a generator runs, and fails, here
    for decision in decisions:
        if not isinstance(decision, (Scale, Reject)):
            raise TypeError(f"got {decision!r} from inspect; expected redline.Scale or redline.Reject")
    if decisions and Need.UPDATE not in controller.needs:
        raise TypeError(
            f"got {decisions[0]!r} from a controller that needs {controller.needs}; expected Need.UPDATE in it"
        )
    return decisions


def _withheld(controller: Controller, step: Step) -> Withhold | None:
    decision = controller.before_update(step)
    if decision is not None and not isinstance(decision, Withhold):
        raise TypeError(f"got {decision!r} from before_update; expected redline.Withhold or None")
    return decision
