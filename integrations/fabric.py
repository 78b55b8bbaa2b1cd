"""Redline in Lightning Fabric: attached to what ``fabric.setup`` returned, by hand or by a callback."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.optim import Optimizer

from redline.integrations.attach import attach_as, refuse_unknown
from redline.integrations.trainer_logs import TrainerLogs
from redline.optimizers import refuse_engine
from redline.overhead_budget import checked_share
from redline.session import Session
from redline.sink import Sink


def attach(
    fabric: Fabric,
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    *,
    sinks: Sequence[Sink] = (),
    log_every: int = 50,
    **arguments: Any,
) -> Session:
    """Attach Redline to a loop that Fabric drives; readings go to Fabric's own loggers too.

    The session can stand in what is saved and loaded: ``fabric.save(path, {"model": model, "redline": session})``.

    Args:
        fabric: that set model and optimizer up.
        model: that ``fabric.setup`` returned.
        optimizer: that ``fabric.setup`` returned; several make one joint step.
        sinks: where readings go, beside Fabric's loggers.
        log_every: optimizer steps between logs; 0 logs nothing.
        arguments: the others of ``redline.attach``, which says what they mean.

    Returns:
        A session, to be used as a context manager or closed by ``session.close()``.

    Raises:
        ConfigurationError: the arguments cannot work together, or the strategy steps an engine of its own.
    """
    strategy = fabric.strategy
    if "DeepSpeed" in type(strategy).__name__:
        refuse_engine("DeepSpeed")
    logs = [TrainerLogs(fabric.log_dict, log_every)] if fabric.loggers and log_every else []
    return attach_as(
        model,
        optimizer,
        sinks=[*sinks, *logs],
        precision=str(strategy.precision.precision),
        strategy=type(strategy).__name__,
        **arguments,
    )


class RedlineFabricCallback:
    """``attach`` for trainers built on ``fabric.call``: ``Fabric(callbacks=[RedlineFabricCallback()])``.

    The trainer calls, in this order::

        fabric.call("on_train_start", fabric, model, optimizer)
        fabric.call("on_before_backward", loss)            # at each step, ahead of fabric.backward(loss)
        fabric.call("on_train_end")

    and may put the callback into what it saves and loads: ``fabric.save(path, {"model": model, "redline": callback})``.

    Attributes:
        session: of the training in progress, or of the last one, closed; None before the first.
    """

    def __init__(self, *, log_every: int = 50, **arguments: Any) -> None:
        """Set up what ``attach`` is to be called with; it says what the arguments mean.

        Raises:
            ConfigurationError: an argument that ``attach`` does not take, or a budget that is no share.
        """
        refuse_unknown(arguments)
        checked_share(arguments.get("overhead_budget"))
        self._arguments = {**arguments, "log_every": log_every}
        self._resumed: Mapping[str, Any] | None = None
        self.session: Session | None = None

    def on_train_start(
        self,
        fabric: Fabric,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        schedulers: Sequence[Any] = (),
    ) -> None:
        """Attach: model and optimizer are set up."""
        self.on_train_end()
        self.session = attach(fabric, model, optimizer, schedulers=schedulers, **self._arguments)
        if self._resumed is not None:
            self.session.load_state_dict(self._resumed)
            self._resumed = None

    def on_before_backward(self, loss: Tensor) -> None:
        """Read the loss."""
        if self.session is not None:
            self.session.observe(loss=loss)

    def on_train_end(self) -> None:
        """Detach."""
        if self.session is not None:
            self.session.close()

    def state_dict(self) -> dict[str, Any]:
        """The session's state."""
        return self.session.state_dict() if self.session else {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from there, now or as soon as the session is there."""
        if self.session is not None and state_dict:
            self.session.load_state_dict(state_dict)
        else:
            self._resumed = state_dict or None
