"""What a controller is: it decides on a step; the session carries the decision out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

from torch import Tensor
from torch.optim import Optimizer

from redline.errors import ConfigurationError
from redline.monitor import Need

if TYPE_CHECKING:
    from redline.parameters import MatrixLayer
    from redline.readings import Readings
    from redline.step import Step
    from redline.weight_decay import Rates

Number: TypeAlias = "float | Tensor"
"""A float, or a 0-d tensor: on an accelerator nobody waits for it."""


@dataclass(frozen=True)
class Scale:
    """Commit ``theta_before + factor * p``.

    Attributes:
        factor: 0 or more, finite; a clamp gives at most 1. 1 leaves the step alone, and no trace. A tensor on an
            accelerator is carried out there; the trace follows once its value is on the host.
        reason: what was seen and done, in words; it may name the numbers of ``saw``, as in ``"r = {r:.3g}"``.
        parameter: qualified name of the one parameter to scale; None for the whole step.
        saw: the numbers behind it.
    """

    action: ClassVar[str] = "scale"

    factor: Number
    reason: str
    parameter: str | None = None
    saw: Mapping[str, Number] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.factor, Tensor) and not 0 <= self.factor < float("inf"):
            raise ConfigurationError(f"got a scale of {self.factor}; expected a finite factor of at least 0.")

    @property
    def acts(self) -> Number:
        """Whether it changes anything; 0-d bool if a tensor."""
        return self.factor != 1


@dataclass(frozen=True)
class ScaleMatrices:
    """Commit a share of each matrix's update, net of decoupled weight decay, of its own; the decay stays whole.

    Where the decay is not decoupled (``step.rates[...].coupled`` says why) the whole update is scaled.

    Attributes:
        layers: the matrices, each ``(d_out, d_in)``: parameters, or matrices of a stack.
        factors: ``(n,)``, floating, each finite and 0 or more. On an accelerator nobody waits for them.
        reason: what was seen and done, in words; it may name the numbers of ``saw``, and with ``{layer}`` the matrix
            whose place in ``layers`` ``saw["worst"]`` is.
        saw: the numbers behind it.
    """

    action: ClassVar[str] = "scale"

    layers: Sequence[MatrixLayer]
    factors: Tensor
    reason: str
    saw: Mapping[str, Number] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _refuse_other_length(self.layers, self.factors, "factors")

    @property
    def acts(self) -> Number:
        """Whether it changes anything."""
        return (self.factors != 1).any()


@dataclass(frozen=True)
class Decay:
    """Decay each matrix by a weight decay of its own, in place of its group's, at this step.

    It moves a matrix by ``-lr * weight_decay * theta_before``, ``lr`` being its group's.

    Attributes:
        layers: the matrices.
        weight_decays: ``(n,)``, floating.
        reason: as for ``ScaleMatrices``; None where it only goes on with what an earlier decision told of.
        saw: the numbers behind it.
    """

    action: ClassVar[str] = "decay"

    layers: Sequence[MatrixLayer]
    weight_decays: Tensor
    reason: str | None
    saw: Mapping[str, Number] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _refuse_other_length(self.layers, self.weight_decays, "weight decays")

    @property
    def acts(self) -> Number:
        """Whether there is something to tell of."""
        return self.reason is not None


def _refuse_other_length(layers: Sequence[MatrixLayer], numbers: Tensor, what: str) -> None:
    if numbers.shape != (len(layers),):
        raise ConfigurationError(
            f"got {what} of shape {tuple(numbers.shape)} for {len(layers)} matrices; expected one each."
        )


@dataclass(frozen=True)
class Reject:
    """Take the update back.

    The optimizer's state comes back too where a controller keeps a snapshot of it (``snapshots_state``); otherwise the
    run is stopped, because it would train on with moments that saw the rejected gradients.

    Attributes:
        reason: what was seen, in words, as for a scale.
        saw: the numbers behind it.
        when: whether to, 0-d bool if a tensor. On an accelerator the parameters are taken back there, and the run stops
            ahead of an update once the value is on the host.
    """

    action: ClassVar[str] = "reject"

    reason: str
    saw: Mapping[str, Number] = field(default_factory=dict)
    when: bool | Tensor = True

    @property
    def acts(self) -> Number:
        """Whether it changes anything."""
        return self.when


@dataclass(frozen=True)
class Withhold:
    """Set the gradients aside before the update: parameters, moments, step counters and decay stay as they are."""

    action: ClassVar[str] = "withhold"

    reason: str
    saw: Mapping[str, Number] = field(default_factory=dict)


@dataclass(frozen=True)
class RollBack:
    """Put the run back to where this controller last said ``Keep``, and withhold this step's gradients."""

    action: ClassVar[str] = "rollback"

    reason: str
    saw: Mapping[str, Number] = field(default_factory=dict)


@dataclass(frozen=True)
class Stop:
    """Stop the run before the update, with the reason."""

    action: ClassVar[str] = "stop"

    reason: str
    saw: Mapping[str, Number] = field(default_factory=dict)


@dataclass(frozen=True)
class Keep:
    """Keep a snapshot of the run as it stands, in place of this controller's last one; it changes nothing.

    It holds parameters, buffers, optimizer state and what the session was given as ``schedulers``.

    Attributes:
        memory: "device", beside the parameters, or "host", pinned where there is an accelerator.
        in_checkpoints: whether the session's ``state_dict`` carries it.
    """

    memory: Literal["device", "host"] = "device"
    in_checkpoints: bool = True


AfterUpdate: TypeAlias = Scale | ScaleMatrices | Decay | Reject
"""What a controller may answer to ``inspect``."""
Decision: TypeAlias = AfterUpdate | Withhold | RollBack | Stop


@dataclass(frozen=True)
class RunOutline:
    """What is known of a run when a session begins.

    Attributes:
        layers: the model's matrices.
        optimizers: of the joint step.
        rates: by parameter name, of all parameters that the optimizers hold, where a controller decides on single ones.
        note: says something once, as a warning and in the report.
        sharded: whether parameters lie in parts on several ranks.
    """

    layers: Sequence[MatrixLayer]
    optimizers: Sequence[Optimizer]
    rates: Mapping[str, Rates]
    note: Callable[[str], None]
    sharded: bool = False


class Controller:
    """Base of all controllers. Laws:

    - It changes nothing itself: it returns decisions.
    - With nothing to object to it returns none, and the step stays the optimizer's own, bit for bit.
    - What it has to know on the host it reads from ``step.start``, one wait for all who ask, before the update; after
      the update it decides in tensors.
    - It can be pickled, and what lasts between steps is in ``state_dict``.
    - On several ranks each has one of its own, and all must come to the same decisions: it goes by what the step gives,
      which is the same on every rank, and of tensors that lie in parts by ``step.layout``.
    """

    needs: ClassVar[Need] = Need.UPDATE
    per_parameter: ClassVar[bool] = False
    """Whether it decides on single parameters: ahead of those that decide on the whole of what is left."""
    lengthens: ClassVar[bool] = False
    """Whether it may lengthen the step: then it decides first, so that the clamps have the last word."""
    snapshots_state: bool = False
    """Whether the optimizer's state is copied ahead of each step, so that a rejection can bring it back."""

    @property
    def sub_sample(self) -> tuple[int | None, int] | None:
        """``max_samples`` and ``remember`` of the tangents it decides by, if it takes any."""
        return None

    def begin(self, run: RunOutline) -> None:
        """A session begins: forget what lasted from another, and refuse what cannot work."""

    def before_update(self, step: Step) -> Withhold | RollBack | Stop | Keep | None:
        """After backward, before the update: whether there is to be one."""
        return None

    def inspect(self, step: Step) -> Iterable[AfterUpdate]:
        """After the update: what to do with it."""
        return ()

    def read_out(self, step: Step, readings: Readings) -> None:
        """When all have decided, ahead of the commit: readings of its own, if it has any."""

    def state_dict(self) -> dict[str, Any]:
        """What lasts between steps; empty by default."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what ``state_dict`` gave."""
