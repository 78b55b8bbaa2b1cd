"""StepClamp: arguments, outputs and losses that are refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from bits import frozen
from step_clamp_runs import Answering, Run, batch
from step_lengths import CLASSES, plain
from torch import Tensor
from torch.utils.data import DataLoader
from torch_optimizers import sgd

from redline import ConfigurationError, NonFiniteGuard, RedlineWarning, SpikeGuard, StepClamp
from redline.integrations.lightning import RedlineCallback


@pytest.mark.parametrize("max_r", [0, 0.0, -1.0, math.nan, math.inf, -math.inf])
def test_a_limit_that_is_not_positive_is_refused(max_r: float) -> None:
    with pytest.raises(ConfigurationError, match=f"got max_r={max_r}; expected a positive number of radii"):
        StepClamp(max_r)


@pytest.mark.parametrize("reduction", [0, 0.0, -0.1, 1.0001, 2, math.nan, "min", "0.5", None])
def test_a_quantile_outside_0_to_1_is_refused(reduction: Any) -> None:
    with pytest.raises(
        ConfigurationError, match=rf"got reduction={reduction!r}; expected 'max' or a quantile in \(0, 1\]"
    ):
        StepClamp(reduction=reduction)


@pytest.mark.parametrize("samples", [0, -1])
def test_fewer_than_one_sample_is_refused(samples: int) -> None:
    with pytest.raises(ConfigurationError, match=f"got max_samples={samples}; expected at least 1, or None"):
        StepClamp(max_samples=samples)


@pytest.mark.parametrize(
    ("answer", "logits", "message"),
    [
        (lambda z: {"scores": z}, lambda output: output["scores"], "got a dict as logits; .* Pass `logits=`"),
        (lambda z: (z, z.sum()), lambda output: output[0], "got a tuple as logits|got a mask"),
        (lambda z: z.logsumexp(-1).mean(), None, r"got a torch.float32 tensor of shape \(\) as logits; .*`logits=`"),
    ],
    ids=["a dict", "a tuple", "a loss"],
)
def test_an_output_without_logits_is_refused_at_the_first_step_and_nothing_is_scaled(
    answer: Callable[[Tensor], Any], logits: Callable[[Any], Tensor] | None, message: str
) -> None:
    def step(run: Run) -> None:
        x, y = batch(1)
        output = run.model(x)
        (output if logits is None else F.cross_entropy(logits(output), y)).backward()
        run.update()

    alone, run = Run(sgd, lambda: Answering(answer)), Run(sgd, lambda: Answering(answer))
    step(alone)
    with run.attach(StepClamp(1e-6)) as session, pytest.raises(ConfigurationError, match=message):
        step(run)
    assert run.everything == alone.everything, "the step is the optimizer's own"
    assert session.interventions == ()
    if logits is not None:  # the remedy works
        again = Run(sgd, lambda: Answering(answer))
        with again.attach(StepClamp(1e-6), logits=logits) as session:
            step(again)
        assert len(session.interventions) == 1


@pytest.mark.parametrize("others", [[], [NonFiniteGuard()]], ids=["alone", "with a guard"])
def test_a_model_never_called_in_training_mode_is_refused_at_the_first_step(others: list[Any]) -> None:
    alone, run = Run(), Run()
    alone.model.eval()
    run.model.eval()
    alone.step(1)
    with (
        run.attach(*others, StepClamp(1e-6)) as session,
        pytest.warns(RedlineWarning, match="was not called in training mode"),
        pytest.raises(
            ConfigurationError, match=r"got no logits to measure the first step by .*Pass module= and logits="
        ),
    ):
        run.step(1)
    assert run.everything == alone.everything, "the step is the optimizer's own"
    assert session.interventions == ()


REGRESSIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": F.mse_loss,
    "smooth l1": F.smooth_l1_loss,
    "huber": F.huber_loss,
    "mse, weighted": lambda z, y: 0.5 * F.mse_loss(z, y, reduction="none").sum(-1).mean() / 4,
}


@pytest.mark.parametrize("kind", REGRESSIONS)
def test_a_loss_that_is_no_cross_entropy_is_refused_when_it_is_observed(kind: str) -> None:
    run = Run()
    untouched = run.everything
    x, y = batch(1)
    with run.attach(StepClamp(1e-6)) as session:
        loss = REGRESSIONS[kind](run.model(x), F.one_hot(y, CLASSES).float())
        with pytest.raises(
            ConfigurationError, match=r"got a loss made by \w+Loss; expected a cross-entropy .*Leave the"
        ):
            session.observe(loss=loss)
    assert run.everything == untouched
    with run.attach(NonFiniteGuard(), SpikeGuard()) as session:  # which work with any loss
        session.observe(loss=loss)


CROSS_ENTROPIES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross-entropy": F.cross_entropy,
    "smoothed": lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1),
    "nll": lambda z, y: F.nll_loss(z.log_softmax(-1), y),
    "soft targets": lambda z, y: F.cross_entropy(z, F.one_hot(y, CLASSES).float()),
    "binary": lambda z, y: F.binary_cross_entropy_with_logits(z, F.one_hot(y, CLASSES).float()),
    "distillation": lambda z, y: F.kl_div(z.log_softmax(-1), torch.full_like(z, 1 / CLASSES), reduction="batchmean"),
    "by hand": lambda z, y: (z.logsumexp(-1) - z.gather(-1, y[:, None])[:, 0]).mean(),
    "and an auxiliary regression": lambda z, y: F.cross_entropy(z, y) + 0.1 * F.mse_loss(z, torch.zeros_like(z)),
    "by hand, from probabilities": lambda z, y: -z.softmax(-1).gather(-1, y[:, None]).log().mean(),
}


@pytest.mark.parametrize("kind", CROSS_ENTROPIES)
def test_a_cross_entropy_is_not_refused(kind: str) -> None:
    run = Run()
    x, y = batch(1)
    with run.attach(StepClamp(1e-6)) as session:
        loss = CROSS_ENTROPIES[kind](run.model(x), y) / 4
        session.observe(loss=loss)
        loss.backward()
        run.update()
    assert len(session.interventions) == 1


class Regression(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = plain()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, data: tuple[Tensor, Tensor], index: int) -> Tensor:
        return F.mse_loss(self(data[0]), F.one_hot(data[1], CLASSES).float())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning", "ignore::FutureWarning")
def test_a_fit_of_a_regression_is_refused_at_its_first_step() -> None:
    """Lightning hands over the loss by itself, so that it can be told."""
    torch.manual_seed(0)
    module = Regression()
    untouched = frozen(module.state_dict())
    callback = RedlineCallback(monitors=[], controllers=[StepClamp(1e-6)])
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with pytest.raises(ConfigurationError, match="got a loss made by MseLoss; expected a cross-entropy"):
        trainer.fit(module, DataLoader([batch(1), batch(2)], batch_size=None))  # type: ignore[arg-type]
    assert frozen(module.state_dict()) == untouched
