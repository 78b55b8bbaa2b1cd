"""Asking the controllers, and carrying out what they decide."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeVar

from torch import Tensor
from torch.optim import Optimizer

from redline import metrics
from redline.controller import Controller, Decision, Intervention, Reject, Scale
from redline.errors import ConfigurationError, ControllerError, StepRejectedError
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

    def before_update(self, step: Step, optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> None:
        """After backward, before the update: withhold the gradients, snapshot the state."""
        for name, controller in self._controllers:
            if step.withheld:
                break
            withheld = self._ask(name, step, controller.before_update)
            if withheld is not None:
                step.withheld = True
                self._trace(name, step, "withhold", withheld)
        if step.withheld:
            self._transaction.withhold(parameters.values())
        if any(controller.snapshots_state for _, controller in self._controllers):
            self._states.append(OptimizerState(optimizer))

    def decide(self, step: Step) -> None:
        """After the update: single parameters first, then the whole of what is left; commit."""
        if not self._states_checked:
            self._refuse_watch_only()  # shadow weights show only once the state is there
            self._states_checked = True
        scale, size = 1.0, step.normalized_step_size
        if step.withheld:
            self._readings.gauge(metrics.STEP_SCALE, 0.0)
            return
        for name, controller in sorted(self._controllers, key=lambda pair: not pair[1].per_parameter):
            decisions = self._ask(name, step, partial(_decisions, controller))
            # Asking may have measured r, of what the controllers before left of the step.
            size = size if step.normalized_step_size is None else step.normalized_step_size
            for decision in decisions:
                if isinstance(decision, Reject):
                    self._reject(name, controller, step, decision)
                    return
                if decision.factor == 1:
                    continue
                self._trace(name, step, "scale", decision)
                self._scale(decision)
                step.parameters_moved()
                if decision.parameter is None:
                    scale *= decision.factor
                    size = None if size is None else size * decision.factor
                else:
                    size = None  # r of what is left is known only if someone measures it
        self._readings.gauge(metrics.STEP_SCALE, scale)
        if size is not None:
            self._readings.gauge(metrics.COMMITTED_STEP_SIZE, size)

    def forget(self) -> None:
        """The step has ended: its snapshots go."""
        self._states = []

    def _scale(self, decision: Scale) -> None:
        if decision.parameter is not None and decision.parameter not in self._transaction.parameters:
            raise ConfigurationError(
                f"got a scale for {decision.parameter!r}, which the step did not move; expected the name of one "
                "in the optimizers."
            )
        self._transaction.scale(decision.factor, None if decision.parameter is None else [decision.parameter])

    def _reject(self, name: str, controller: Controller, step: Step, decision: Reject) -> None:
        self._trace(name, step, "reject", decision)
        self._transaction.scale(0)
        step.parameters_moved()
        self._readings.gauge(metrics.STEP_SCALE, 0.0)
        if not controller.snapshots_state:
            raise StepRejectedError(
                f"{name} rejected step {step.index}: {decision.reason} The parameters are as they were before it; "
                "the optimizer's moments are not, so the run is stopped. Go on from a checkpoint, or use a controller "
                "that keeps a snapshot of the optimizer's state."
            )
        for state in self._states:
            state.restore()

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

    def _trace(self, name: str, step: Step, action: str, decision: Decision) -> None:
        self.interventions.append(Intervention(step.index, name, action, decision.reason, dict(decision.saw)))
        self._readings.count(metrics.INTERVENTIONS, 1, name, action)

    def _refuse_watch_only(self) -> None:
        for optimizer in self._optimizers if self._controllers else ():
            if reason := watch_only_reason(optimizer):
                raise ConfigurationError(
                    f"got controllers on {type(optimizer).__name__}, which may only be monitored: {reason}. Leave "
                    "controllers out."
                )


def _decisions(controller: Controller, step: Step) -> list[Scale | Reject]:
    return list(controller.inspect(step))  # a generator runs, and fails, here
