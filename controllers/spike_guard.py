"""The guard against loss spikes: back to the last good state, and on with other data."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from redline.controller import Controller, Keep, RollBack, RunOutline, Stop, Withhold
from redline.errors import ConfigurationError
from redline.monitor import Need
from redline.step import Step

_LEAST_LOSSES = 16  # before a finite loss can be called a jump
_NORMAL = 1.4826  # median absolute deviations in the standard deviation of a normal distribution


class SpikeGuard(Controller):
    """Rolls the run back to a snapshot when the loss jumps.

    A loss is a jump if it is not finite, or above the median of the last good ones by more than ``threshold`` robust
    standard deviations (1.4826 median absolute deviations) and by more than ``min_jump``. The first ``patience`` jumps
    in a row are withheld: it may be the batch, and then nothing was lost. If the next batches agree, it is the
    parameters: they, the buffers, the optimizers' and schedulers' state go back to the last snapshot. The data goes on:
    no bad batch is seen again. If ``max_roll_backs`` in a row do not help, the new level is taken for what it is (new
    data, a harder task); where it is not even finite the run stops.

    Jumps never enter the window, so that none of them raises the bar for the next. A snapshot is as large as the
    parameters and the optimizers' state together; there is one, renewed every ``every`` steps while the loss is good.
    The stability report says how large it is, and where.
    """

    needs: ClassVar[Need] = Need.NOTHING

    def __init__(
        self,
        *,
        threshold: float = 8.0,
        min_jump: float = 0.5,
        window: int = 128,
        patience: int = 1,
        max_roll_backs: int = 3,
        every: int = 20,
        memory: Literal["device", "host"] = "device",
        in_checkpoints: bool = True,
    ) -> None:
        """Set the limits; the defaults are Redline's choice.

        Args:
            threshold: robust standard deviations above the median.
            min_jump: least height of a jump, in units of the loss; near a loss of 0 deviations say little.
            window: how many of the last good losses are remembered.
            patience: jumps in a row that are withheld before the run is rolled back; 0 rolls back at once.
            max_roll_backs: roll-backs in a row before the new level is accepted.
            every: steps between snapshots: as many are lost in a roll-back at most.
            memory: where the snapshot is kept: "device", beside the parameters, or "host", pinned.
            in_checkpoints: whether the session's state carries the snapshot, so that a resumed run equals one that was
                not cut; it makes checkpoints as much larger. Without it a resumed run takes a new one at its first
                step.

        Raises:
            ConfigurationError: a limit that cannot work.
        """
        for name, value, least in (
            ("threshold", threshold, 0), ("min_jump", min_jump, 0), ("window", window, _LEAST_LOSSES),
            ("patience", patience, 0), ("max_roll_backs", max_roll_backs, 1), ("every", every, 1),
        ):  # fmt: skip
            if not least <= value < math.inf:
                raise ConfigurationError(f"got {name}={value}; expected at least {least}.")
            if name not in ("threshold", "min_jump") and not isinstance(value, int):
                raise ConfigurationError(f"got {name}={value}; expected a whole number.")
        if memory not in ("device", "host"):
            raise ConfigurationError(f"got memory={memory!r}; expected 'device' or 'host'.")
        self.threshold, self.min_jump, self.patience = threshold, min_jump, patience
        self.max_roll_backs, self.every = max_roll_backs, every
        self.memory, self.in_checkpoints = memory, in_checkpoints
        self._travels = in_checkpoints  # of the session's run: whether snapshots go with checkpoints
        self._losses: deque[float] = deque(maxlen=window)
        self._forget()

    def begin(self, run: RunOutline) -> None:
        """Watch anew."""
        self._forget()
        self._travels = self.in_checkpoints and not run.sharded
        if self.in_checkpoints and run.sharded:
            run.note(
                "snapshots of sharded parameters stay out of checkpoints: a resumed run takes one at its first step."
            )

    def _forget(self) -> None:
        self._losses.clear()
        self._jumps = 0  # in a row
        self._kept_at: int | None = None
        self._has_seen_losses = False

    def before_update(self, step: Step) -> Withhold | RollBack | Stop | Keep | None:
        """Hold the loss against the last good ones."""
        loss = step.start.loss
        if loss is None:
            if not self._has_seen_losses:
                raise ConfigurationError(
                    "got no loss to watch; expected session.observe(loss=loss) before each optimizer.step()."
                )
            return None
        self._has_seen_losses = True
        saw = {"loss": loss, **self._deviation(loss)}
        if not self._is_jump(saw):
            self._losses.append(loss)
            self._jumps = 0
            if self._kept_at is not None and step.index < self._kept_at + self.every:
                return None
            self._kept_at = step.index
            return Keep(self.memory, self._travels)

        self._jumps += 1
        seen = "the loss jumped to {loss:.4g}" + (" from {median:.4g}" if "median" in saw else "")
        if self._jumps > self.patience + self.max_roll_backs:
            self._jumps = 0
            if not math.isfinite(loss):
                helpless = "there was no good step to go back to"
                tried = helpless if self._kept_at is None else f"{self.max_roll_backs} roll-backs did not help"
                return Stop(f"{seen}, and {tried}.", saw)
            self._losses.clear()
            self._losses.append(loss)
            return Withhold(
                f"{seen} and stays there: it is taken for the new level, and this last step was withheld.", saw
            )
        if self._jumps <= self.patience or self._kept_at is None:
            return Withhold(f"{seen}: the step was withheld.", saw)
        return RollBack(f"{seen} and stayed: the run was rolled back to step {self._kept_at}.", saw)

    def _deviation(self, loss: float) -> dict[str, float]:
        """Median of the window, and the loss's distance from it in robust standard deviations."""
        if len(self._losses) < _LEAST_LOSSES:
            return {}
        median = statistics.median(self._losses)
        deviation = _NORMAL * statistics.median(abs(one - median) for one in self._losses)
        return {
            "median": median,
            "z": (loss - median) / deviation if deviation else math.copysign(math.inf, loss - median),
        }

    def _is_jump(self, saw: Mapping[str, float]) -> bool:
        if not math.isfinite(saw["loss"]):
            return True
        return "median" in saw and saw["z"] > self.threshold and saw["loss"] - saw["median"] > self.min_jump

    def state_dict(self) -> dict[str, Any]:
        """The window, and where it stands; the snapshot is the session's to carry."""
        return {
            "losses": list(self._losses),
            "jumps": self._jumps,
            "kept_at": self._kept_at if self._travels else None,
            "has_seen_losses": self._has_seen_losses,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as before."""
        self._losses = deque(state["losses"], maxlen=self._losses.maxlen)
        self._jumps, self._kept_at = state["jumps"], state["kept_at"]
        self._has_seen_losses = bool(state["has_seen_losses"])
