"""What a transformers model's own calls tell: the loss of a step, and the positions that count in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from redline.hooks import OutputHook, ReplayHook
from redline.numerics.tangents import default_logits

IGNORED = -100  # the label that transformers' losses leave out


class StepLoss:
    """The loss that a step's gradient is of, put together from the micro-batches that the model is called on.

    Where the ``Trainer`` gives the model ``num_items_in_batch``, the loss of each call is its share of the step's, and
    they add up; where it does not, the step's is their mean.
    """

    def __init__(self, model: nn.Module, observe: Callable[[Tensor], None], ranks: int = 1) -> None:
        """Watch the model's calls in training.

        Args:
            model: returns its loss.
            observe: is told the loss so far, after each call.
            ranks: over how many the items are counted: a share is of the mean over these.
        """
        self._observe, self._ranks = observe, ranks
        self.begin()
        self.handle: RemovableHandle = model.register_forward_hook(OutputHook(self._add), with_kwargs=True)

    def begin(self) -> None:
        """A step begins."""
        self._total: Tensor | None = None
        self._calls = 0

    def _add(self, module: nn.Module, kwargs: Mapping[str, Any], output: Any) -> None:
        loss = loss_of(output)
        if loss is None or not (module.training and torch.is_grad_enabled()):
            return
        shares = kwargs.get("num_items_in_batch") is not None
        loss = loss * self._ranks if shares and self._ranks > 1 else loss
        loss = loss if self._total is None else self._total + loss
        # A copy: the Trainer goes on to scale the loss in place.
        self._total, self._calls = loss.detach().clone(), self._calls + 1
        self._observe(loss if shares else loss / self._calls)


def loss_of(output: Any) -> Tensor | None:
    """The loss among a model's outputs as the ``Trainer`` finds it: named, or the first of a tuple."""
    loss = output.get("loss") if isinstance(output, Mapping) else output[0] if isinstance(output, tuple) else None
    return loss if isinstance(loss, Tensor) and loss.numel() == 1 else None


class LabelledLogits:
    """Logits beside a mask of the positions whose labels the loss does not ignore.

    Called with the model's output, right after the call whose labels it goes by; those of calls that Redline itself
    makes, of a sub-sample it may be.
    """

    def __init__(self, model: nn.Module) -> None:
        """Watch Redline's own calls of the model."""
        self._shifted = shifts_labels(model)
        self._labels: Any = None
        self._whole: Any = None  # labels that are shifted already
        self.handle: RemovableHandle = model.register_forward_pre_hook(ReplayHook(self._keep), with_kwargs=True)

    def __call__(self, output: Any) -> tuple[Any, Tensor | None]:
        """Logits ``(..., classes)`` and mask ``(...)``, or None where labels are not one a position."""
        logits, mask = default_logits(output), None
        if isinstance(logits, Tensor):
            if self._whole is not None:
                mask = counted(logits, self._whole)
            else:
                mask = counted(logits, self._labels, shifted=self._shifted)
        self._labels = self._whole = None
        return logits, mask

    def _keep(self, kwargs: Mapping[str, Any]) -> None:
        self._labels, self._whole = kwargs.get("labels"), kwargs.get("shift_labels")


def counted(logits: Tensor, labels: Any, *, shifted: bool = False) -> Tensor | None:
    """Which positions of ``logits (..., classes)`` a loss over ``labels (...)`` counts; None where that is not said.

    Args:
        logits: the model's.
        labels: whole numbers, one a position.
        shifted: whether the logits at a position are held against the next one's label.
    """
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.shape != logits.shape[:-1]:
        return None
    counts = labels != IGNORED
    return torch.cat([counts[..., 1:], torch.zeros_like(counts[..., :1])], -1) if shifted else counts


def shifts_labels(model: nn.Module) -> bool:
    """Whether the model's loss holds logits against the next position's label, as language models' do."""
    model = getattr(model, "get_base_model", lambda: model)()  # of an adapter of PEFT's
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False  # the decoder's inputs are shifted instead
    loss = LOSS_MAPPING.get(getattr(model, "loss_type", None) or "")
    if loss is None:  # models that are not called ...ForCausalLM, GPT-2 among them
        return type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    return loss is ForCausalLMLoss
