"""The session: everything that happens around one step of training, in the order in which it happens."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from redline import metrics
from redline.capture import ForwardCapture, unwrapped
from redline.control import Control
from redline.controller import Controller
from redline.delivery import Delivery
from redline.errors import ConfigurationError
from redline.history import RunHistory
from redline.hooks import OptimizerHooks
from redline.interventions import Intervention
from redline.live_model import LiveModel
from redline.loss_kind import refuse_other_losses
from redline.margins import StepMargins
from redline.monitor import Monitor, Need
from redline.notes import Notes
from redline.optimizers import (
    gradient_norm,
    is_stepped_by_scaler,
    joint_norm,
    numbered,
    optimizer_labels,
    refuse_flat_parameters,
    refuse_in_backward,
)
from redline.overhead_budget import OverheadBudget, checked_share
from redline.own_time import Account, OwnTime
from redline.parameters import ParameterNames, matrix_layers, named_parameters
from redline.ranks import Ranks
from redline.readings import Readings, RunInfo, Snapshot
from redline.report import KeptSnapshot, StabilityReport
from redline.same_on_all_ranks import SameOnAllRanks
from redline.sharding import Layout
from redline.sink import Sink
from redline.spectrum_tracker import SpectrumTracker
from redline.step import Step
from redline.tangent_probe import TangentProbe
from redline.timetable import Timetable
from redline.transaction import StepTransaction

_STATE_VERSION = 4
_SETTLED = 10  # steps before the overhead is a reading: the first pays for what later ones reuse
_SEED = 0x5EED  # of Redline's own random columns; the run's streams are never drawn from


class Session:
    """Drives monitors, controllers and sinks along a run. Made by ``redline.attach`` and by the trainers' callbacks.

    The training loop, and what happens in it::

        output = model(x)                  before_forward: a joint step still open is concluded as it stands;
                                           the inputs are kept, if the next step's tangent is due,
                                           and running statistics, if there are controllers
        loss.backward()
        optimizer.step()
            before_update                  controllers may withhold the gradients, or roll the run back;
                                           theta_before is copied, if someone needs the update
            (the optimizer's own update)
            after_update                   when each optimizer has stepped, the step is concluded:
                _measure                       monitors read the step as proposed
                _control.decide                controllers scale, or reject; the transaction commits
                _measure                       monitors read what was committed
                _publish                       when a sink is due, one copy to the host is started; as soon as it has
                                               arrived, here or at one of the moments above, the sink is handed a
                                               snapshot
                _arm                           what is due at the next step is decided; it is put off if monitoring has
                                               overdrawn its budget
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        *,
        monitors: Sequence[Monitor],
        run: RunInfo,
        controllers: Sequence[Controller] = (),
        sinks: Sequence[Sink] = (),
        schedulers: Sequence[Any] = (),
        logits: Callable[[Any], Any] | None = None,
        batch_dim: int = 0,
        module: str | None = None,
        overhead_budget: float | None = None,
        around_replay: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        """Attach; see ``redline.attach`` for the arguments.

        ``around_replay`` is opened around each further call of the model, for a trainer whose models do more in
        ``forward`` than compute.
        """
        budget = checked_share(overhead_budget)
        self._notes = Notes()
        self._model = unwrapped(model)
        self._optimizers = list(optimizers)
        self._monitors = _named(monitors, "monitor", "measure")
        self._controllers = _named(controllers, "controller", "inspect")
        named_sinks = _named(sinks, "sink", "emit")
        refuse_in_backward(self._model)
        refuse_flat_parameters(self._model)
        self._names = ParameterNames(self._model, self._optimizers, self._notes)
        self._layers = matrix_layers(self._model, self._notes)
        self._labels = optimizer_labels(self._optimizers)
        self._ranks = ranks = Ranks.of_run()
        self._live = LiveModel(self._model, self._optimizers, self._names)
        parameters = self._live.parameters() if ranks.size > 1 else named_parameters(self._model)
        self._same = SameOnAllRanks(ranks, model)
        self._same.set_up(parameters, [*self._monitors, *self._controllers], budget)
        self._layout = Layout(ranks, parameters)

        self._history = RunHistory()
        self._readings = Readings(self._history.record)
        self._weight_spectra = SpectrumTracker(_SEED)
        self._transaction = StepTransaction()
        self._control = Control(
            self._controllers,
            self._model,
            self._optimizers,
            schedulers,
            self._live.training_state,
            self._transaction,
            self._readings,
        )
        self._control.begin(self._layers, self._names.held_by, self._notes, sharded=bool(self._layout.shardings))
        self._time = OwnTime(next((parameter.device for parameter in self._model.parameters()), None))
        self._budget = OverheadBudget(budget)
        if budget is not None:
            self._readings.gauge(metrics.OVERHEAD_BUDGET_RATIO, budget)
        self._due = Timetable(self._monitors, self._controllers, self._budget, self._time, ranks, self._notes)
        self._closed = False
        for name, _ in self._monitors:
            self._readings.count(metrics.MEASUREMENTS, 0, name)
            self._readings.count(metrics.PUT_OFF, 0, name)

        self._index, self._unfetched = 0, False
        self._step: Step | None = None
        self._forward_seen = False  # since the last step
        self._updating: Optimizer | None = None
        self._stepped: list[Optimizer] = []
        self._gradient_norms: dict[Optimizer, Tensor] = {}
        self._loss: Tensor | None = None
        self._margins: StepMargins | None = None

        self._capture = ForwardCapture(model, module, self.before_forward, lambda: self._at_work_for(Need.TANGENT))
        self._probe = TangentProbe(
            self._capture, logits, batch_dim, self._notes, around_replay, self._control.sub_samples, self._layout
        )
        self._hooks = [OptimizerHooks(optimizer, self) for optimizer in self._optimizers]
        self._delivery = Delivery(self._readings, self._control.log, named_sinks, run, self._notes)
        self._arm()
        self._delivery.open()

    # What users call ------------------------------------------------------------------------------------------------

    def observe(self, *, loss: Tensor | float) -> None:
        """Tell the session the loss of the step to come; call it before ``optimizer.step()``.

        Args:
            loss: 0-d tensor on any device, or a float. It is not waited for.

        Raises:
            ConfigurationError: it is not one number, or a controller holds the step inside cross-entropy's radius and
                this is another kind of loss.
        """
        if self._index == 0 and self._loss is None and any(Need.TANGENT in one.needs for _, one in self._controllers):
            refuse_other_losses(loss)
        # A copy: the loop may go on to divide the loss in place.
        loss = loss.detach().clone() if isinstance(loss, Tensor) else torch.tensor(float(loss))
        if loss.numel() != 1:
            raise ConfigurationError(
                f"got a loss of shape {tuple(loss.shape)}; expected a single number, such as loss.mean()."
            )
        self._loss = loss.reshape(())

    @property
    def seconds(self) -> tuple[float, float, float]:
        """Seconds of training, of observing and of controlling so far; on CUDA some steps late unless synchronized."""
        return self._time.totals()

    @property
    def latest(self) -> Snapshot:
        """Everything measured so far, fetched from the device now if it has not been, which waits."""
        if self._unfetched or self._delivery.under_way:
            with self._at_work():
                if self._unfetched:
                    self._fetch()
                self._delivery.finish()
        return self._delivery.snapshot

    @property
    def interventions(self) -> tuple[Intervention, ...]:
        """What the controllers did, oldest first; of very many, the last 10,000."""
        self._read()
        return tuple(self._control.log.latest)

    @property
    def margins(self) -> StepMargins | None:
        """How near each sample came to the redline at the last step measured, as it stood when first measured.

        None before that, and where logits cannot be told by sample.
        ``session.margins.most_fragile()`` names the samples that bind, to look at the data behind a fragile step.
        """
        return self._margins

    @property
    def notes(self) -> tuple[str, ...]:
        """What could not be measured or shown, in words, each said once."""
        return tuple(self._notes)

    def report(self) -> StabilityReport:
        """The stability report so far; print it with ``rich.print``, or take ``.to_dict()``."""
        return StabilityReport.of(
            self.latest,
            self._history,
            self._control.log.tallies,
            [KeptSnapshot.of(name, snapshot) for name, snapshot in self._control.snapshots.items()],
            self.notes,
            self._time.seconds,
            self._budget.share,
        )

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: step count, counters, history, and the state of monitors and controllers."""
        _ = self.latest
        return {
            "version": _STATE_VERSION,
            "index": self._index,
            "readings": self._readings.state_dict(),
            "history": self._history.state_dict(),
            "control": self._control.state_dict(),
            "weight_spectra": self._weight_spectra.state_dict(),
            "probe": self._probe.state_dict(),
            "monitors": {name: monitor.state_dict() for name, monitor in self._monitors},
            "put_off": self._due.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` was taken; monitors and controllers that were not there start fresh.

        Raises:
            ConfigurationError: the state is of a version this Redline does not know.
        """
        if state.get("version") != _STATE_VERSION:
            raise ConfigurationError(
                f"got a session state of version {state.get('version')!r}; expected {_STATE_VERSION}. Was it written "
                "by another version of Redline?"
            )
        self._fetch()
        self._delivery.finish()  # what was on its way is none of the other run's
        self._index = state["index"]
        self._same.loaded()
        self._readings.load_state_dict(state["readings"])
        self._history.load_state_dict(state["history"])
        self._control.load_state_dict(state["control"])
        self._weight_spectra.load_state_dict(state["weight_spectra"])
        self._probe.load_state_dict(state["probe"])
        for name, monitor in self._monitors:
            if name in state["monitors"]:
                monitor.load_state_dict(state["monitors"][name])
        self._due.load_state_dict(state["put_off"])
        self._delivery.refresh()
        self._arm()

    def close(self, *, failed: bool = False) -> None:
        """Conclude an open step, take every hook off and let the sinks finish. Calling it again does nothing.

        ``failed``: the run ended in an error. On several ranks an open step is then given up: to conclude it would be
        to wait for the others, which may not come.
        """
        if self._closed:
            return
        self._closed = True
        try:
            with self._at_work():
                if self._stepped and not (failed and self._ranks.size > 1):
                    self._conclude()
        finally:
            self._discard()
            for hooks in self._hooks:
                hooks.remove()
            self._capture.remove()
            self._delivery.close(self.report())

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(failed=kind is not None)

    # The step, in order ---------------------------------------------------------------------------------------------

    def before_forward(self) -> None:
        """The model is about to be called in training: a joint step still open has ended."""
        self._time.start()
        self._arrive()
        if self._stepped and self._updating is None:  # within an update it is a closure that is called again
            with self._at_work():
                self._conclude()
        if not self._forward_seen and self._updating is None:
            self._forward_seen = True
            with self._at_work(), self._in_control():
                self._control.before_forward()

    def before_update(self, optimizer: Optimizer) -> None:
        """After backward, before this optimizer's update."""
        with self._at_work():
            self._delivery.arrive()
            if self._updating is not None:
                self._discard()  # the last update raised, and was given up
            if optimizer in self._stepped:
                self._conclude()  # others were skipped
            try:
                parameters = self._names.of(optimizer)
                if self._step is None:
                    step = self._begin()
                    self._measure_gradients(step, self._optimizers)
                    step.observed, step.scaled = self._loss, bool(self._controllers) and is_stepped_by_scaler()
                    with self._in_control():
                        self._control.open(step)
                else:
                    step = self._step
                    self._measure_gradients(step, [optimizer])  # AMP has unscaled them by now
                with self._in_control():
                    self._control.before_update(step, optimizer, parameters)
                if Need.UPDATE in self._due.needs:
                    with self._at_work_for(Need.UPDATE):
                        self._transaction.save(parameters)
            except BaseException:
                self._discard()
                raise
            self._updating = optimizer

    def after_update(self, optimizer: Optimizer) -> None:
        """After this optimizer's update."""
        with self._at_work():
            self._delivery.arrive()
            self._updating = None
            self._transaction.return_gradients()
            self._stepped.append(optimizer)
            if len(self._stepped) == len(self._optimizers):
                self._conclude()

    def _begin(self) -> Step:
        self._same.at_step(self._index)
        self._readings.step = self._index
        groups = [
            (label, str(group.get("name", k)), group)
            for label, optimizer in zip(self._labels, self._optimizers, strict=True)
            for k, group in enumerate(optimizer.param_groups)
        ]
        self._step = Step(
            self._index,
            groups,
            self._layers,
            self._live.weights,
            self._live.gradients,
            self._transaction,
            self._read,
            self._take_tangent,
            lambda tolerance: self._weight_spectra.measure(self._layers, self._live.weights(), tolerance, self._layout),
            self._layout,
        )
        self._gradient_norms = {}
        return self._step

    def _measure_gradients(self, step: Step, optimizers: Sequence[Optimizer]) -> None:
        if Need.GRADIENTS not in self._due.needs:
            return
        with self._at_work_for(Need.GRADIENTS):
            for optimizer in optimizers:
                norm = gradient_norm(optimizer, self._names.of(optimizer).values(), self._ranks)
                if norm is not None:
                    self._gradient_norms[optimizer] = norm
            step.gradient_norm = joint_norm(self._gradient_norms.values())

    def _conclude(self) -> None:
        """All optimizers have stepped, or those that will: measure, decide, commit, publish."""
        step = self._step
        assert step is not None
        step.observed, self._loss = self._loss, None
        step.update_changed()  # what was measured ahead of the update is of other weights
        step.gradient_norm = joint_norm([norm for one, norm in self._gradient_norms.items() if one in self._stepped])
        try:
            try:
                self._measure(step, after_commit=False)
                with self._in_control():
                    self._control.decide(step)
                self._measure(step, after_commit=True)
                self._keep_margins(step.margins)
            finally:
                self._end(step)
            self._publish()
        except BaseException:
            self._arm(alone=True)  # the others may be waiting for another message
            raise
        self._arm()  # last: by now the time of all this is known

    def _keep_margins(self, margins: StepMargins | None) -> None:
        if margins is not None:
            self._margins = margins
            self._delivery.add_margins(margins)

    def _end(self, step: Step) -> None:
        self._discard()
        self._capture.forget()
        self._probe.end_step(step.decided_by)
        self._readings.count(metrics.STEPS)
        for name in self._due.put_off:
            self._readings.count(metrics.PUT_OFF, 1, name)
        self._readings.gauge(metrics.LAST_STEP_TIMESTAMP, time.time())
        self._index = step.index + 1
        self._unfetched = True

    def _measure(self, step: Step, *, after_commit: bool) -> None:
        for name, monitor in self._due.monitors:
            if monitor.after_commit is not after_commit or (step.withheld and Need.UPDATE in monitor.needs):
                continue
            try:
                monitor.measure(step, self._readings)
            except ConfigurationError:
                raise
            except Exception as error:
                if self._ranks.size > 1:  # the others may be waiting for what it was to send
                    raise
                self._notes.add(f"{name} could not measure a step: {type(error).__name__}: {error}")
            else:
                self._readings.count(metrics.MEASUREMENTS, 1, name)

    def _publish(self) -> None:
        if self._due.sinks or self._readings.overflowing or self._control.log.overflowing:
            self._fetch(self._due.sinks)

    def _discard(self) -> None:
        """Let go of everything that belongs to one step."""
        self._transaction.close()
        self._step, self._updating = None, None
        self._stepped, self._forward_seen = [], False
        self._control.forget()

    # Services -------------------------------------------------------------------------------------------------------

    def _arm(self, *, alone: bool = False) -> None:
        """Decide, once, what the next step is for; its inputs are kept only if somebody will ask for a tangent."""
        self._due.arm(self._index, self._delivery.sinks, alone=alone)
        self._capture.armed = Need.TANGENT in self._due.needs

    def _take_tangent(self, update: Mapping[str, Tensor], max_samples: int | None, remember: int) -> Any:
        taken = self._probe.measure(
            self._transaction.parameters,
            self._transaction.before,
            update,
            max_samples,
            remember,
            layers=Need.LAYERS in self._due.needs,
        )
        if taken is not None and taken.method in metrics.TANGENT_FALLBACKS.label_values:
            self._readings.count(metrics.TANGENT_FALLBACKS, 1, taken.method)
        return taken

    def _read(self, tensors: Sequence[Tensor] = ()) -> list[float]:
        """Bring 0-d tensors to the host now, behind all that is under way."""
        if self._delivery.under_way:
            with self._at_work():
                self._delivery.finish()
        return self._control.log.read(tensors)

    def _arrive(self) -> None:
        if self._delivery.under_way:
            with self._at_work():
                self._delivery.arrive()

    def _fetch(self, due: Sequence[tuple[str, Sink]] = ()) -> None:
        if self._index >= _SETTLED:
            overhead, monitoring = self._time.ratios()
            self._readings.gauge(metrics.OVERHEAD_RATIO, overhead)
            self._readings.gauge(metrics.MONITORING_RATIO, monitoring)
        self._unfetched = False
        self._delivery.start(due)

    @contextmanager
    def _at_work(self, account: Account = Account.OBSERVING) -> Iterator[None]:
        """Redline's own time: no gradients are recorded, and it is counted as overhead."""
        with self._time.spent(account), torch.no_grad():
            yield

    def _in_control(self) -> AbstractContextManager[None]:
        return self._time.spent(Account.CONTROLLING) if self._controllers else nullcontext()

    def _at_work_for(self, need: Need) -> AbstractContextManager[None]:
        """What is done here would be done for controllers alone, if they need it."""
        return self._at_work(Account.CONTROLLING if need in self._due.controllers_need else Account.OBSERVING)


def _named(plugins: Sequence[Any], kind: str, method: str) -> list[tuple[str, Any]]:
    """Each with a name of its own: the class name, numbered where it occurs twice."""
    for plugin in plugins:
        if isinstance(plugin, type) or not hasattr(plugin, method):
            what = f"the class {plugin.__name__}" if isinstance(plugin, type) else f"a {type(plugin).__name__}"
            raise ConfigurationError(f"got {what} as {kind}; expected an instance with a method `{method}`.")
    return list(zip(numbered([type(plugin).__name__ for plugin in plugins]), plugins, strict=True))
