"""Hugging Face's Trainer: a watched training goes as one that is not, and is measured where its steps happen."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from trainer_runs import Counting, Keep, R, every_step, in_bits, parameters_of, reference_r, seed

import redline

pytest.importorskip("transformers")
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType
from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from redline.integrations.huggingface import STATE_FILE, RedlineTrainerCallback
from redline.integrations.huggingface_calls import counted, loss_of, shifts_labels

WORDS, LENGTH = 23, 9
METHODS = "redline_tangent_fallbacks_total"


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """accelerate keeps precision and devices for the whole process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


# What is trained -----------------------------------------------------------------------------------------------------


def language_model(dropout: float = 0.1) -> GPT2LMHeadModel:
    seed()
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=WORDS, n_positions=LENGTH, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0,
            resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout,
        )
    )  # fmt: skip


def sentences(count: int = 40) -> list[dict[str, Tensor]]:
    """Sequences with a pattern to learn; the loss counts but a few positions of each, here or there."""
    generator = torch.Generator().manual_seed(2)
    rows = []
    for index in range(count):
        words = (torch.randint(0, WORDS, (1,), generator=generator) + 3 * torch.arange(LENGTH)) % WORDS
        labels = words.clone()
        labels[: index % 5] = -100
        labels[index % 5 + 2 + index % 3 :] = -100
        rows.append({"input_ids": words, "labels": labels})
    return rows


class Recorder(TrainerCallback):
    """All there is to know of a training, after each step."""

    def __init__(self) -> None:
        self.trace: list[Any] = []
        self.steps: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **of: Any) -> None:
        self._before = parameters_of(of["model"])

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **of: Any) -> None:
        self.steps.append((self._before, parameters_of(of["model"])))

    def on_step_end(self, args: Any, state: Any, control: Any, **of: Any) -> None:
        self.trace.append(in_bits(of["model"], of["optimizer"].optimizer))


class Training:
    """A Trainer in a folder of its own, and what was seen of it."""

    def __init__(
        self,
        folder: Path,
        *callbacks: TrainerCallback,
        model: nn.Module | None = None,
        data: Any = None,
        size: int = 4,
        trainer: type[Trainer] = Trainer,
        **arguments: Any,
    ) -> None:
        self.recorder, self.size = Recorder(), size
        self.batches: list[dict[str, Tensor]] = []  # of training
        self.model = language_model() if model is None else model
        rows = sentences() if data is None else data
        settings = {
            "output_dir": str(folder), "max_steps": 6, "per_device_train_batch_size": size, "learning_rate": 1e-2,
            "lr_scheduler_type": "constant", "report_to": "none", "use_cpu": True, "disable_tqdm": True,
            "save_strategy": "no", "logging_steps": 2, "seed": 3,
        }  # fmt: skip
        self.trainer = trainer(
            self.model,
            TrainingArguments(**{**settings, **arguments}),
            train_dataset=rows,
            eval_dataset=rows[:8],
            data_collator=self._collate,
            callbacks=[self.recorder, *callbacks],
        )

    def _collate(self, rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
        if len(rows) == self.size:  # evaluation's are larger
            self.batches.append({key: value.clone() for key, value in batch.items()})
        return batch

    def run(self, **arguments: Any) -> Training:
        self.trainer.train(**arguments)
        return self

    @property
    def losses(self) -> list[float]:
        return [entry["loss"] for entry in self.trainer.state.log_history if "loss" in entry]


def session_of(callback: RedlineTrainerCallback) -> redline.Session:
    assert callback.session is not None
    return callback.session


# What is observed ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"bf16": True},
        {"gradient_accumulation_steps": 2},
        {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True},
        {"activation_checkpointing": True},
    ],
    ids=["plain", "bf16", "accumulation", "evaluation", "checkpointing"],
)
def test_a_watched_training_is_bit_identical_to_one_that_is_not(arguments: Any, tmp_path: Path) -> None:
    callback = RedlineTrainerCallback(monitors=every_step(), sinks=[Keep()])
    watched = Training(tmp_path, callback, **arguments).run()
    AcceleratorState._reset_state(reset_partial_state=True)
    alone = Training(tmp_path, **arguments).run()

    assert len(watched.recorder.trace) == 6
    assert watched.recorder.trace == alone.recorder.trace
    assert watched.losses == alone.losses
    session = session_of(callback)
    assert session.notes == ()
    assert session.latest.value("redline_steps_total") == 6
    assert math.isfinite(session.latest.value(R))
    assert session.latest.value(METHODS, method="finite_difference") == 0
    assert "transformer.h.1.mlp.c_fc.weight" in session.latest.layers("redline_weight_spectral_norm")


def positions(labels: Tensor) -> Tensor:
    """Positions whose logits a language model's loss is of: those before a label that is not ignored."""
    counts = torch.zeros(labels.shape, dtype=torch.bool)
    for row in range(labels.shape[0]):
        for place in range(labels.shape[1] - 1):
            counts[row, place] = labels[row, place + 1] != -100
    return counts


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("bf16", [False, True])
def test_r_is_that_of_the_applied_step_at_the_positions_that_count(accumulate: int, bf16: bool, tmp_path: Path) -> None:
    keep = Keep()
    callback = RedlineTrainerCallback([redline.GhostRadius(every=1, max_samples=None)], sinks=[keep])
    training = Training(
        tmp_path, callback, model=language_model(dropout=0.0), gradient_accumulation_steps=accumulate, bf16=bf16,
        eval_strategy="steps", eval_steps=1,
    ).run()  # fmt: skip
    last = training.batches[accumulate - 1 :: accumulate]
    expected, everywhere = [], []
    for (before, after), batch in zip(training.recorder.steps, last, strict=False):

        def logits(wide: nn.Module, batch: Any = batch) -> Tensor:
            return wide(input_ids=batch["input_ids"]).logits

        expected.append(reference_r(language_model(0.0), before, after, logits, counts=positions(batch["labels"])))
        everywhere.append(reference_r(language_model(0.0), before, after, logits))
    assert keep.values(R) == pytest.approx(expected, rel=1e-3)
    assert expected != pytest.approx(everywhere, rel=0.05), "what is left out makes no difference"


def test_a_sub_sample_goes_by_its_own_labels(tmp_path: Path) -> None:
    callback = RedlineTrainerCallback([redline.GhostRadius(every=1, max_samples=2)])
    training = Training(tmp_path, callback, model=language_model(dropout=0.0), max_steps=1).run()
    ((before, after),), batch = training.recorder.steps, training.batches[0]
    chosen = torch.tensor([0, 2])  # spread over the batch

    def logits(wide: nn.Module) -> Tensor:
        return wide(input_ids=batch["input_ids"][chosen]).logits

    assert session_of(callback).latest.value("redline_tangent_samples") == 2
    assert session_of(callback).latest.value(R) == pytest.approx(
        reference_r(language_model(0.0), before, after, logits, positions(batch["labels"][chosen])), rel=1e-3
    )


def cross_entropy_sum(model: nn.Module, batch: dict[str, Tensor]) -> float:
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"]).logits[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits, batch["labels"][:, 1:].flatten(), reduction="sum").item()


def labelled(batch: dict[str, Tensor], start: int) -> int:
    return int((batch["labels"][:, start:] != -100).sum())


class PlainLoss(nn.Module):
    """A model whose loss is the mean over its own micro-batch: it takes no ``num_items_in_batch``."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.config = language_model(dropout=0.0), SimpleNamespace(to_dict=dict)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> tuple[Tensor, ...]:
        logits = self.net(input_ids=input_ids).logits
        if labels is None:
            return (logits,)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()), logits


@pytest.mark.parametrize("accepts_count", [True, False])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_loss_is_that_of_the_whole_step(accepts_count: bool, accumulate: int, tmp_path: Path) -> None:
    keep = Keep()
    callback = RedlineTrainerCallback([redline.StepHealth()], sinks=[keep], logits=lambda output: output[1])
    model = language_model(dropout=0.0) if accepts_count else PlainLoss()
    training = Training(
        tmp_path, callback, model=model, gradient_accumulation_steps=accumulate, max_steps=3, logging_steps=1
    ).run()
    expected, reference = [], copy.deepcopy(model if accepts_count else model.net)
    for index, (before, _) in enumerate(training.recorder.steps):
        reference.load_state_dict({name.removeprefix("net."): value for name, value in before.items()}, strict=False)
        reference.tie_weights()
        parts = training.batches[index * accumulate : (index + 1) * accumulate]
        totals = [cross_entropy_sum(reference, part) for part in parts]
        if accepts_count:  # the mean over the step's labels; of GPT-2 the Trainer counts the first ones too
            expected.append(sum(totals) / sum(labelled(part, 0) for part in parts))
        else:  # the mean of the micro-batches' means
            means = [total / labelled(part, 1) for total, part in zip(totals, parts, strict=True)]
            expected.append(sum(means) / len(means))
    assert keep.values("redline_loss") == pytest.approx(expected, rel=1e-5)
    assert keep.values("redline_loss") == pytest.approx(training.losses, rel=1e-5), "as the Trainer itself logs it"


def test_the_run_is_described(tmp_path: Path) -> None:
    callback = RedlineTrainerCallback([], run="mine")
    Training(tmp_path, callback, max_steps=1, bf16=True).run()
    run = session_of(callback).latest.run
    assert (run.run, run.precision, run.strategy, run.world_size) == ("mine", "bf16-mixed", "single", 1)
    callback = RedlineTrainerCallback([])
    AcceleratorState._reset_state(reset_partial_state=True)
    Training(tmp_path, callback, max_steps=1, run_name="theirs").run()
    run = session_of(callback).latest.run
    assert (run.run, run.precision) == ("theirs", "float32")


def test_a_submodule_or_logits_of_ones_own(tmp_path: Path) -> None:
    named, given = (
        RedlineTrainerCallback([redline.GhostRadius(1)], module="transformer", logits=lambda output: output[0]),
        RedlineTrainerCallback([redline.GhostRadius(1)], logits=lambda output: output.logits[:, :4]),
    )
    data = sentences()
    for callback in (named, given):
        Training(tmp_path, callback, max_steps=1, data=data).run()
        assert session_of(callback).latest.value(R) > 0
        assert session_of(callback).notes == ()


def test_a_classifier(tmp_path: Path) -> None:
    seed()
    settings = {"vocab_size": WORDS, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertForSequenceClassification(BertConfig(**settings, intermediate_size=16, num_labels=3))
    data = [{"input_ids": row["input_ids"], "labels": row["input_ids"][0] % 3} for row in sentences()]
    callback = RedlineTrainerCallback(every_step())
    Training(tmp_path, callback, model=model, data=data).run()
    assert session_of(callback).notes == ()
    assert session_of(callback).latest.value(R) > 0


def test_a_compiled_model(tmp_path: Path) -> None:
    values = []
    for arguments in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        keep = Keep()
        callback = RedlineTrainerCallback(
            [redline.GhostRadius(1, max_samples=None), redline.StepHealth()],
            sinks=[keep],
            logits=lambda output: output[1],
        )
        Training(tmp_path, callback, model=Embedded(), max_steps=3, **arguments).run()
        AcceleratorState._reset_state(reset_partial_state=True)
        assert session_of(callback).notes == ()
        values.append(keep.values(R) + keep.values("redline_loss"))
    assert values[0] == pytest.approx(values[1], rel=1e-3)


class Embedded(nn.Module):
    """A model that is quickly compiled."""

    def __init__(self) -> None:
        seed()
        super().__init__()
        self.inputs, self.outputs, self.config = nn.Embedding(WORDS, 8), nn.Linear(8, WORDS), None

    def forward(self, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.outputs(torch.tanh(self.inputs(input_ids)))
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits


# What is handed on ---------------------------------------------------------------------------------------------------


class Later(TrainerCallback):
    """What a reporting callback behind Redline's is handed."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs))


def test_readings_of_the_step_go_into_the_trainers_logs(tmp_path: Path) -> None:
    keep, later = Keep(), Later()
    callback = RedlineTrainerCallback(every_step(), sinks=[keep])
    training = Training(tmp_path, callback, later, eval_strategy="steps", eval_steps=2).run()
    history = [entry for entry in training.trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in history] == [2, 4, 6]
    assert [entry[R] for entry in history] == keep.values(R)[1::2]
    assert [entry[R] for entry in later.logs if "loss" in entry] == keep.values(R)[1::2]
    assert not any(R in entry for entry in later.logs if "loss" not in entry), "evaluations are none of ours"
    assert all("redline_loss" not in entry and "redline_gradient_norm" not in entry for entry in history)
    assert not any("/" in name for name in history[-1]), "layers would flood it"


def test_a_reporting_callback_is_put_behind(tmp_path: Path) -> None:
    later = Later()
    training = Training(tmp_path, later, RedlineTrainerCallback(every_step()), max_steps=2)
    training.run()
    assert not any(R in entry for entry in later.logs), "it is handed the logs first"
    training.trainer.add_callback(training.trainer.pop_callback(Later))
    training.run()
    assert R in later.logs[-2], "the last is the summary"


# State ---------------------------------------------------------------------------------------------------------------


def counting() -> RedlineTrainerCallback:
    return RedlineTrainerCallback([redline.GhostRadius(1)], controllers=[Counting(), redline.NonFiniteGuard()])


SAVING = {"save_strategy": "steps", "save_steps": 3}


def test_training_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    whole = Training(tmp_path / "run", counting(), **SAVING).run()
    kept = torch.load(tmp_path / "run" / "checkpoint-3" / STATE_FILE, weights_only=True)
    assert kept["global_step"] == 3

    callback = counting()
    resumed = Training(tmp_path / "run", callback, **SAVING)
    resumed.run(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    session = session_of(callback)
    assert session.latest.value("redline_steps_total") == 6
    assert session.latest.value("redline_measurements_total", monitor="GhostRadius") == 6
    assert [one.step for one in session.interventions] == [1, 2, 3, 4, 5]
    assert [step[:3] for step in resumed.recorder.trace] == [step[:3] for step in whole.recorder.trace[3:]]


def test_a_checkpoint_that_lies_elsewhere_is_named_in_the_arguments(tmp_path: Path) -> None:
    Training(tmp_path / "run", counting(), **SAVING, max_steps=3).run()
    elsewhere = str((tmp_path / "run" / "checkpoint-3").rename(tmp_path / "moved"))
    callback = counting()
    Training(tmp_path / "other", callback, resume_from_checkpoint=elsewhere).run(resume_from_checkpoint=elsewhere)
    assert session_of(callback).latest.value("redline_steps_total") == 6

    callback = counting()
    with pytest.warns(redline.errors.RedlineWarning, match=r"from step 3, but Redline starts afresh: .*checkpoint-3"):
        Training(tmp_path / "other", callback).run(resume_from_checkpoint=elsewhere)
    assert session_of(callback).latest.value("redline_steps_total") == 3


def test_the_state_of_another_step_is_not_taken(tmp_path: Path) -> None:
    Training(tmp_path / "run", counting(), **SAVING, max_steps=3).run()
    file = tmp_path / "run" / "checkpoint-3" / STATE_FILE
    torch.save({**torch.load(file), "global_step": 2}, file)
    callback = counting()
    with pytest.warns(redline.errors.RedlineWarning, match="starts afresh"):
        Training(tmp_path / "run", callback, **SAVING).run(resume_from_checkpoint=True)
    assert session_of(callback).latest.value("redline_steps_total") == 3


def test_a_checkpoint_of_the_model_alone_has_no_state(tmp_path: Path) -> None:
    Training(tmp_path, counting(), **SAVING, save_only_model=True).run()
    assert (tmp_path / "checkpoint-3").is_dir()
    assert not (tmp_path / "checkpoint-3" / STATE_FILE).exists()


def test_nothing_stays_behind(tmp_path: Path) -> None:
    callback = RedlineTrainerCallback(every_step())
    training = Training(tmp_path, callback).run()
    first = session_of(callback)
    raw = training.trainer.optimizer.optimizer
    for hooks in (
        training.model._forward_hooks, training.model._forward_pre_hooks,
        raw._optimizer_step_pre_hooks, raw._optimizer_step_post_hooks,
    ):  # fmt: skip
        assert not hooks
    assert pickle.loads(pickle.dumps(callback)).session is None

    training.run()  # trains again: another session
    assert session_of(callback) is not first
    assert session_of(callback).latest.value("redline_steps_total") == 6


class Copying(TrainerCallback):
    """Keeps a copy of the model, as for an average of its weights, and calls it."""

    def on_step_end(self, args: Any, state: Any, control: Any, **of: Any) -> None:
        self.copy = copy.deepcopy(of["model"])
        self.copy(input_ids=torch.zeros(1, LENGTH, dtype=torch.long), labels=torch.ones(1, LENGTH, dtype=torch.long))


def test_a_copy_of_the_model_reports_to_nobody(tmp_path: Path) -> None:
    keep = Keep()
    callback = RedlineTrainerCallback([redline.StepHealth()], sinks=[keep])
    training = Training(tmp_path, Copying(), callback, logging_steps=1).run()
    assert keep.values("redline_loss") == pytest.approx(training.losses, rel=1e-6)


class Peeking(TrainerCallback):
    """Calls the model between backward and the step, as nobody trains."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **of: Any) -> None:
        words = torch.zeros(1, LENGTH, dtype=torch.long)
        with torch.no_grad():
            of["model"](input_ids=words, labels=words)
        of["model"].eval()
        of["model"](input_ids=words, labels=words)
        of["model"].train()


def test_calls_that_are_no_training_do_not_count(tmp_path: Path) -> None:
    values = []
    for peeking in ([], [Peeking()]):
        keep = Keep()
        callback = RedlineTrainerCallback([redline.GhostRadius(1), redline.StepHealth()], sinks=[keep])
        Training(tmp_path, callback, *peeking, model=language_model(0.0), max_steps=3).run()
        values.append(keep.values("redline_loss") + keep.values(R))
    assert values[0] == values[1]


# Controlling, and refusing -------------------------------------------------------------------------------------------


class Spike(TrainerCallback):
    """Multiplies the rate at one step."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **of: Any) -> None:
        for group in of["optimizer"].param_groups:
            group["lr"] = 1e-2 * (1000 if state.global_step == 10 else 1)


def test_the_clamp_saves_a_training_with_a_spike(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"max_steps": 30, "logging_steps": 1}
    alone = Training(tmp_path, Spike(), model=language_model(0.0), **arguments).run()
    callback = RedlineTrainerCallback([], controllers=[redline.StepClamp()])
    held = Training(tmp_path, Spike(), callback, model=language_model(0.0), **arguments).run()
    assert 10 in [one.step for one in session_of(callback).interventions]
    assert max(alone.losses[11:]) > 2 * max(held.losses[11:])
    assert held.losses[-1] < 2.5 < math.log(WORDS) < alone.losses[11]


def test_a_regression_is_refused_by_the_clamp(tmp_path: Path) -> None:
    settings = {"vocab_size": WORDS, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertForSequenceClassification(BertConfig(**settings, intermediate_size=16, num_labels=1))
    data = [{"input_ids": row["input_ids"], "labels": torch.tensor(0.5)} for row in sentences()]
    callback = RedlineTrainerCallback([], controllers=[redline.StepClamp()])
    with pytest.raises(redline.ConfigurationError, match="got a loss made by MseLoss"):
        Training(tmp_path, callback, model=model, data=data).run()


def begin(optimizer: Any, n_gpu: int = 0) -> None:
    args = SimpleNamespace(
        n_gpu=n_gpu, run_name=None, bf16=False, fp16=False, world_size=1, average_tokens_across_devices=True,
        distributed_state=SimpleNamespace(distributed_type=DistributedType.DEEPSPEED),
    )  # fmt: skip
    RedlineTrainerCallback().on_train_begin(
        args, SimpleNamespace(global_step=0), None, model=language_model(), optimizer=optimizer, lr_scheduler=None
    )  # type: ignore[arg-type]


def test_what_cannot_be_watched_is_refused_by_name() -> None:
    with pytest.raises(redline.ConfigurationError, match=r"trains on 2 GPUs \(nn.DataParallel\); .*torchrun"):
        begin(torch.optim.SGD(language_model().parameters(), 0.1), n_gpu=2)
    with pytest.raises(redline.ConfigurationError, match="DeepSpeed trains; expected"):
        begin(DeepSpeedOptimizerWrapper.__new__(DeepSpeedOptimizerWrapper))
    with pytest.raises(redline.ConfigurationError, match="overhead_budget"):
        RedlineTrainerCallback(overhead_budget=3)


# Losses and labels ---------------------------------------------------------------------------------------------------


def test_which_positions_a_loss_counts() -> None:
    logits = torch.zeros(2, 4, 5)
    labels = torch.tensor([[1, -100, 2, 3], [-100, -100, 0, -100]])
    assert counted(logits, labels).tolist() == [[True, False, True, True], [False, False, True, False]]
    assert counted(logits, labels, shifted=True).tolist() == [[False, True, True, False], [False, True, False, False]]
    assert counted(logits[:, 0], torch.tensor([1, -100])).tolist() == [True, False]
    assert counted(logits, None) is None
    assert counted(logits[:, 0, 0], torch.tensor([0.5, 1.0])) is None, "a regression"
    assert counted(logits[:, 0], torch.ones(2, 5)) is None, "several labels a sample"
    assert counted(logits, labels[:, 1:]) is None, "not one a position"


def test_whose_labels_are_shifted() -> None:
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=WORDS, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    assert shifts_labels(language_model())
    assert shifts_labels(SimpleNamespace(get_base_model=language_model))  # type: ignore[arg-type]
    assert shifts_labels(SimpleNamespace(loss_type="ForCausalLM"))  # type: ignore[arg-type]
    assert not shifts_labels(SimpleNamespace(loss_type="ForMaskedLM"))  # type: ignore[arg-type]
    assert not shifts_labels(t5)
    assert not shifts_labels(nn.Linear(2, 2))


def test_labels_that_come_shifted_are_taken_as_they_are(tmp_path: Path) -> None:
    """As of collators that pack sequences: the loss goes by these, whatever the others say."""
    data = [
        {
            "input_ids": row["input_ids"],
            "labels": row["input_ids"],
            "shift_labels": F.pad(row["labels"][1:], (0, 1), value=-100),
        }
        for row in sentences()
    ]
    keep = Keep()
    callback = RedlineTrainerCallback([redline.GhostRadius(1, max_samples=None)], sinks=[keep])
    training = Training(tmp_path, callback, model=language_model(0.0), data=data, remove_unused_columns=False).run()
    expected = [
        reference_r(
            language_model(0.0),
            before,
            after,
            lambda wide, batch=batch: wide(input_ids=batch["input_ids"]).logits,
            counts=batch["shift_labels"] != -100,
        )
        for (before, after), batch in zip(training.recorder.steps, training.batches, strict=False)
    ]
    assert keep.values(R) == pytest.approx(expected, rel=1e-3)


def test_where_a_loss_is_found() -> None:
    loss, logits = torch.tensor(1.0), torch.zeros(2, 3)
    assert loss_of({"loss": loss, "logits": logits}) is loss
    assert loss_of((loss, logits)) is loss
    assert loss_of((logits,)) is None
    assert loss_of({"logits": logits}) is None
    assert loss_of(logits) is None
