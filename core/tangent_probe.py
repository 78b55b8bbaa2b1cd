"""Taking the logit tangent of a step: captured inputs, a sub-sample of them, a method that works for this model."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from redline.capture import CapturedCall, ForwardCapture
from redline.errors import ConfigurationError
from redline.hooks import hooks_silenced
from redline.margins import by_sample
from redline.notes import Notes
from redline.numerics.agreement import ElsewhereError, in_step
from redline.numerics.layer_recorder import LayerSteps
from redline.numerics.sharded import device_type, is_sharded
from redline.numerics.tangents import (
    FINITE_DIFFERENCE,
    METHODS,
    SHARDED_DIFFERENCE,
    LogitTangent,
    logit_tangent,
)
from redline.ranks import Ranks
from redline.sample_memory import SampleMemory, spread_over
from redline.sharding import Layout
from redline.step_tangent import StepTangent

# The finite difference is good to about 1 %, half precision to a few; a method that drops a term is off by far more.
AGREEMENT = 0.1

_ELSEWHERE = "The ghost radius was not measured at some steps: it could not be on another rank, whose notes say why."


class TangentProbe:
    """Measures tangents of one model, and remembers which method works for it."""

    def __init__(
        self,
        capture: ForwardCapture,
        logits: Callable[[Any], Any] | None,
        batch_dim: int,
        notes: Notes,
        around_replay: Callable[[], AbstractContextManager[Any]],
        decided_by: Collection[tuple[int | None, int]] = (),
        layout: Layout | None = None,
    ) -> None:
        """What to measure, and how.

        Args:
            capture: of the model's calls.
            logits: gives logits of its output; None for the output itself.
            batch_dim: of its tensors.
            notes: takes what could not be measured.
            around_replay: what has to be open around each further call of the model; it may yield the autocast dtype
                that the model's forward was in, where that cannot be seen from outside.
            decided_by: the sub-samples that decisions go by, as ``max_samples`` and ``remember``.
            layout: how the parameters lie over the ranks of the run.
        """
        self._capture, self._logits, self._batch_dim, self._notes = capture, logits, batch_dim, notes
        self._around_replay, self._layout = around_replay, layout or Layout()
        self._ranks = self._layout.ranks
        self._method = "auto"
        self._checked = False
        self._memories: dict[tuple[int, int], SampleMemory] = {}  # by max_samples and remember
        self._decided_by = set(decided_by)  # of these, those that decisions go by

    def measure(
        self,
        parameters: Mapping[str, Tensor],
        before: Mapping[str, Tensor],
        update: Mapping[str, Tensor],
        max_samples: int | None,
        remember: int,
        *,
        layers: bool = False,
    ) -> StepTangent | None:
        """The tangent along ``update`` at ``before`` on the captured inputs, or None where it cannot be taken.

        On several ranks each takes its own; where one cannot, none has any.

        Args:
            parameters: the live parameters, by name: they say which of the module's own each name means.
            before: their values before the step; of a DTensor the part on this rank.
            update: the step, likewise.
            max_samples: the most samples of the batch to use; None for all.
            remember: samples that bound lately to measure besides a sub-sample.
            layers: also gather how long the step is for attention and activations.

        Raises:
            ConfigurationError: the logits cannot be told, or are no floating tensor.
        """
        try:
            found = self._called(parameters)
        except ConfigurationError:
            self._ranks.any(True)  # the others wait for it
            raise
        if self._ranks.any(found is None):
            if found is not None:
                self._notes.add(_ELSEWHERE)
            return None
        assert found is not None
        call, names = found
        point = {inner: self._whole(name, before[name]) for inner, name in names.items()}
        direction = {inner: self._whole(name, update[name]) for inner, name in names.items()}
        batch = _batch_size(call, self._batch_dim)
        whole = max_samples is None or batch <= max_samples or couples_samples(call.module)
        samples = batch if whole or max_samples is None else max_samples
        tangent, error = self._try(call, point, direction, samples, batch, remember, layers)
        # What they do next they do together. Not remembered: what fails for one who asks must not change what others
        # measure.
        failed = self._ranks.any(error is not None)
        if failed and not self._ranks.any(error is not None and (whole or _is_final(error))):
            if error is not None:
                self._notes.add(
                    f"The ghost radius is measured on the whole batch: a sub-sample of it failed with "
                    f"{type(error).__name__}: {_first_line(error)}"
                )
            tangent, error = self._try(call, point, direction, batch, batch, 0, layers)
            failed = self._ranks.any(error is not None)
        if isinstance(error, ConfigurationError):
            raise error
        if failed:
            self._notes.add(_reason(error, call.module))
        return None if failed else tangent

    def _called(self, parameters: Mapping[str, Tensor]) -> tuple[CapturedCall, dict[str, str]] | None:
        """The call to be made again, and the names of the parameters in it; a note says why there is none."""
        call = self._capture.call()
        if call is None:
            self._notes.add(
                "The ghost radius is not measured: the model was not called in training mode with gradients enabled "
                "since the last step, so there are no inputs. If the logits come from a submodule, pass module=."
            )
            return None
        names = _names_within(call, parameters)
        if not names:
            self._notes.add(
                f"The ghost radius is not measured: no parameter of {type(call.module).__name__}, whose output gives "
                "the logits, is in the optimizer."
            )
            return None
        return call, names

    def _try(
        self,
        call: CapturedCall,
        point: Mapping[str, Tensor],
        direction: Mapping[str, Tensor],
        samples: int,
        batch: int,
        remember: int,
        layers: bool,
    ) -> tuple[StepTangent | None, Exception | None]:
        """The tangent on so many samples of the batch, or why there is none."""
        with hooks_silenced(), self._around_replay() as autocast:
            call = call if autocast is None else replace(call, autocast=autocast)
            try:
                with in_step(self._agree):  # what comes next the ranks do together
                    memory, joined = self._memories.setdefault((samples, remember), SampleMemory()), 0
                    if samples < batch:
                        call, joined = memory.join(call, samples, batch, self._batch_dim, remember)
                index = torch.cat([spread_over(batch, samples), torch.full((joined,), -1)])
                taken = self._take(call, point, direction, layers)
                seen = self._layers(taken, call.name) if layers else None
                found = StepTangent(
                    taken.logits, taken.tangent, taken.mask, taken.method, index, batch, self._batch_dim, seen,
                    self._ranks,
                )  # fmt: skip
                if samples < batch and remember:
                    r = by_sample(found.spread, found.samples, self._batch_dim)
                    if r is not None:
                        memory.keep(call, r, self._batch_dim, remember)
            except Exception as error:  # noqa: BLE001 a model may fail in any way; the run goes on
                return None, error
            return found, None

    def _whole(self, name: str, part: Tensor) -> Tensor:
        """The tensor that a part is of: a DTensor again, if the parameter is one."""
        sharding = self._layout.shardings.get(name)
        return part if sharding is None else sharding.whole(part)

    def _take(
        self,
        call: CapturedCall,
        point: Mapping[str, Tensor],
        direction: Mapping[str, Tensor],
        layers: bool,
    ) -> LogitTangent:
        sharded = any(map(is_sharded, point.values()))

        def by(method: str) -> LogitTangent:
            kind = device_type(next(iter(point.values())))
            with torch.autocast(kind, dtype=call.autocast, enabled=call.autocast is not None):
                return logit_tangent(
                    call.module,
                    call.args,
                    call.kwargs,
                    direction,
                    logits=self._logits,
                    method=method,
                    parameters=point,
                    layers=layers,
                    total=self._ranks.total,
                    agree=self._agree,
                )

        # A run that goes on from a checkpoint may be laid out in another way than the one that wrote it.
        taken = by("auto" if self._method == SHARDED_DIFFERENCE and not sharded else self._method)
        self._method = taken.method
        if not self._checked:
            taken = self._check(taken, by, sharded)
        return taken

    def _agree(self, flag: bool) -> bool:
        return not self._ranks.any(not flag)

    def _layers(self, taken: LogitTangent, module: str) -> LayerSteps | None:
        """What was seen of the layers, by their names in the whole model; a note says what was not, and why."""
        if taken.layers is None:
            self._notes.add(
                "The radii of layers are not measured: tangents of this model are taken by finite difference, which "
                "sees nothing but logits."
            )
            return None
        seen = taken.layers.within(module)
        for layer, reason in seen.failures.items():
            self._notes.add(f"The radius of {layer} is not measured in full: {reason}")
        return seen

    def _check(self, taken: LogitTangent, by: Callable[[str], LogitTangent], sharded: bool) -> LogitTangent:
        """Hold the run's first tangent against a finite difference: some kernels drop tangents silently."""
        if taken.method in (FINITE_DIFFERENCE, SHARDED_DIFFERENCE):
            self._checked = True
            return taken
        reference = self._reference(by, sharded)
        error = disagreement(taken, reference, self._ranks)  # it waits, once a run
        if not math.isfinite(error):
            return taken  # a zero or non-finite step shows nothing; the next one is held against it
        self._checked = True
        if error <= AGREEMENT:
            return taken
        through = " through the model as it lies over the ranks" if reference.method == SHARDED_DIFFERENCE else ""
        self._notes.add(
            f"Tangents by {taken.method} are off by {error:.0%} from a finite difference{through} for this model: the "
            "ghost radius is measured by finite difference from here on."
        )
        self._method = reference.method
        return reference

    def _reference(self, by: Callable[[str], LogitTangent], sharded: bool) -> LogitTangent:
        """Where the model lies over several ranks, through all that runs there: a replay leaves it out."""
        if sharded:
            try:
                return by(SHARDED_DIFFERENCE)
            except Exception:  # noqa: BLE001 on all ranks alike: half precision, or too little memory
                pass
        return by(FINITE_DIFFERENCE)

    def end_step(self, decided_by: Collection[tuple[int | None, int]] = ()) -> None:
        """What bound at this step is for the next.

        Of a sub-sample that decisions go by, only at steps where they did: whatever else was measured, and when, must
        not change them.
        """
        self._decided_by |= set(decided_by)
        for asked, memory in self._memories.items():
            memory.end_step(keep=asked in decided_by or asked not in self._decided_by)

    def state_dict(self) -> dict[str, Any]:
        """The method found to work, and the samples kept."""
        return {
            "method": self._method,
            "checked": self._checked,
            "decided_by": sorted(self._decided_by, key=str),
            "memories": [(*asked, memory.state_dict()) for asked, memory in self._memories.items()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the method found before."""
        self._method = state["method"] if state["method"] in METHODS else "auto"
        self._checked = bool(state["checked"])
        self._decided_by |= {tuple(asked) for asked in state["decided_by"]}
        self._memories = {}
        for samples, remember, kept in state["memories"]:
            self._memories[samples, remember] = SampleMemory()
            self._memories[samples, remember].load_state_dict(kept)


def disagreement(taken: LogitTangent, reference: LogitTangent, ranks: Ranks | None = None) -> float:
    """Relative distance of two tangents, over all ranks, where both are finite; NaN if they are zero."""
    known = reference.tangent.isfinite() & taken.tangent.isfinite()
    slow, fast = (torch.where(known, one.tangent, 0.0) for one in (reference, taken))
    norms = torch.stack([(slow - fast).norm(), slow.norm(), fast.norm()])
    if ranks is not None and ranks.size > 1:
        norms = ranks.total(norms.double().square()).sqrt()
    return float(norms[0] / norms[1:].amax())


def _names_within(call: CapturedCall, parameters: Mapping[str, Tensor]) -> dict[str, str]:
    """Of the parameters given, those that the module called holds: its own name for each, and the name given."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    found: dict[str, str] = {}
    for inner, parameter in call.module.named_parameters():
        name = f"{call.name}.{inner}" if call.name else inner
        if id(parameter) in names:
            found[inner] = names[id(parameter)]
        elif name in parameters and is_sharded(parameters[name]):  # FSDP has its whole in its place just now
            found[inner] = name
    return found


def _batch_size(call: CapturedCall, batch_dim: int) -> int:
    sizes = [
        leaf.shape[batch_dim]
        for leaf in tree_leaves((call.args, call.kwargs))
        if isinstance(leaf, Tensor) and leaf.dim() > batch_dim
    ]
    return sizes[0] if sizes else 1


def couples_samples(module: nn.Module) -> bool:
    """Whether batch statistics make a sample's logits depend on the rest of the batch."""
    return any(
        isinstance(inner, nn.modules.batchnorm._BatchNorm) and (inner.training or inner.running_mean is None)
        for inner in module.modules()
    )


def _is_final(error: Exception) -> bool:
    """Whether a larger sample would do no better."""
    return isinstance(error, (ConfigurationError, torch.OutOfMemoryError))


def _reason(error: Exception | None, module: nn.Module) -> str:
    if error is None or isinstance(error, ElsewhereError):
        return _ELSEWHERE
    if isinstance(error, torch.OutOfMemoryError):
        return "The ghost radius was not measured at some steps: out of memory."
    return (
        f"The ghost radius is not measured: calling {type(module).__name__} again on its own inputs failed with "
        f"{type(error).__name__}: {_first_line(error)}"
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or "no message").splitlines()[0]
