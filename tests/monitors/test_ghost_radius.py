"""r, tau and rho_a of real steps, against a float64 Jacobian of a copy of the model at theta_before."""

import copy
import math
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import redline
from redline import ConfigurationError, GhostRadius, RedlineWarning
from redline.numerics import ghost_radius, logit_tangent
from redline.step_tangent import StepTangent

R, RHO, TAU = "redline_normalized_step_size", "redline_ghost_radius", "redline_update_norm"
SAMPLES, BATCH = "redline_tangent_samples", "redline_batch_samples"
FALLBACKS = "redline_tangent_fallbacks_total"
CLASSES = 7


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.head, self.dropout = nn.Linear(12, 36), nn.Linear(12, CLASSES), 0.3

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 6)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return self.head(mixed.transpose(1, 2).flatten(2).mean(1))


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(12, 2, 24, dropout=0.2, batch_first=True, activation="gelu")
        self.encoder, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(12, CLASSES)

    def forward(self, x):
        return self.head(self.encoder(x).mean(1))


class LanguageModel(nn.Module):
    """Tied embeddings, logits ``(batch, time, vocabulary)``; token 0 is padding."""

    def __init__(self):
        super().__init__()
        self.embedding, self.inner, self.norm = nn.Embedding(10, 12), nn.Linear(12, 12), nn.LayerNorm(12)
        self.head = nn.Linear(12, 10, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.norm(torch.tanh(self.inner(self.embedding(tokens)))))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cells, self.head = nn.LSTM(12, 10, 2, dropout=0.4, batch_first=True), nn.Linear(10, CLASSES)

    def forward(self, x):
        return self.head(self.cells(x)[0][:, -1])


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 32), nn.LayerNorm(32), nn.GELU(), nn.Dropout(0.3), nn.Linear(32, CLASSES))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout2d(0.2), nn.Conv2d(6, 8, 3, stride=2),
        nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(72, CLASSES),
    )  # fmt: skip


def vectors(batch: int = 12) -> Tensor:
    return torch.randn(batch, 12)


def images(batch: int = 12) -> Tensor:
    return torch.randn(batch, 1, 8, 8)


def sequences(batch: int = 12) -> Tensor:
    return torch.randn(batch, 6, 12)


def sentences(batch: int = 12) -> Tensor:
    return torch.randint(0, 10, (batch, 3))


# model, its inputs, and the method that works for it on the CPU
CASES = {
    "mlp": (mlp, vectors, "forward_mode"),
    "cnn": (cnn, images, "forward_mode"),
    "attention": (Attention, sequences, "math_attention"),
    "transformer": (Transformer, sequences, "math_attention"),
    "language model": (LanguageModel, sentences, "forward_mode"),
    "lstm": (Recurrent, sequences, "math_attention"),
}


@pytest.fixture(autouse=True)
def _seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def loss_of(z: Tensor) -> Tensor:
    z = z.flatten(0, -2)
    return F.cross_entropy(z.float(), torch.arange(len(z)) % z.shape[-1])


def spreads(
    model: nn.Module, x: Tensor, update: dict[str, Tensor], read: Callable[[Any], Tensor] = lambda z: z
) -> Tensor:
    """The spread of ``J_z(x) p`` of every sample, in float64: one backward pass a logit, dropout off."""
    reference = copy.deepcopy(model).double()
    for module in reference.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    z = read(reference(x.double() if x.is_floating_point() else x))
    moved = [(parameter, update[name]) for name, parameter in reference.named_parameters() if name in update]
    rows = []
    for logit in z.flatten():
        gradients = torch.autograd.grad(logit, [p for p, _ in moved], retain_graph=True, allow_unused=True)
        rows.append(sum((g * p).sum() for g, (_, p) in zip(gradients, moved, strict=True) if g is not None))
    tangent = torch.stack(rows).reshape(z.shape)
    return (tangent.unsqueeze(-1) - tangent.unsqueeze(-2)).flatten(-2).amax(-1)


def moved(before: nn.Module, after: nn.Module) -> dict[str, Tensor]:
    values = dict(before.named_parameters())
    return {name: p.detach().double() - values[name].detach().double() for name, p in after.named_parameters()}


def watched_step(
    session: redline.Session,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    loss: Callable[[Any], Tensor] = loss_of,
) -> tuple[nn.Module, dict[str, Tensor]]:
    """One training step; the model as it was before, and the update, recorded around ``optimizer.step()``."""
    optimizer.zero_grad()
    loss(model(x)).backward()
    before = copy.deepcopy(model)
    optimizer.step()
    return before, moved(before, model)


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@pytest.mark.parametrize("name", CASES)
def test_r_tau_and_rho_of_real_steps(name, optimizer):
    build, inputs, method = CASES[name]
    model = build().train()
    rate = {"SGD": 0.5, "AdamW": 1e-2}[optimizer]
    optimizer = getattr(torch.optim, optimizer)(model.parameters(), lr=rate, weight_decay=0.1)
    with redline.attach(model, optimizer, monitors=[GhostRadius(every=1)]) as session:
        for _ in range(3):
            x = inputs()
            before, update = watched_step(session, model, optimizer, x)
            expected = float(spreads(before, x, update).max()) / math.pi
            tau = math.sqrt(sum(float(p.square().sum()) for p in update.values()))
            latest = session.latest
            assert latest.value(R) == pytest.approx(expected, rel=1e-4)
            assert latest.value(TAU) == pytest.approx(tau, rel=1e-5)
            assert latest.value(RHO) == pytest.approx(tau / expected, rel=1e-4)
            assert latest.value(SAMPLES) == latest.value(BATCH) == 12
        counted = {labels[0]: count for labels, count in latest.series(FALLBACKS).items() if count}
        assert counted == ({} if method == "forward_mode" else {method: 3})
        assert session.notes == ()


@pytest.mark.parametrize("rate", [1e-7, 1e4])
def test_very_short_and_very_long_steps(rate):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    with redline.attach(model, optimizer, monitors=[GhostRadius(every=1)]) as session:
        x = vectors()
        before, update = watched_step(session, model, optimizer, x)
        assert session.latest.value(R) == pytest.approx(float(spreads(before, x, update).max()) / math.pi, rel=1e-4)


@pytest.mark.parametrize("rate", [0.1, 1e-3, 1e-5])
def test_a_model_of_which_only_zero_biases_are_trained(rate):
    model = nn.Sequential(nn.Linear(12, 32), nn.Tanh(), nn.Linear(32, CLASSES))
    nn.init.zeros_(model[2].bias)
    model.requires_grad_(False)
    model[2].bias.requires_grad_(True)
    optimizer = torch.optim.SGD([model[2].bias], lr=rate)
    with redline.attach(model, optimizer, monitors=[GhostRadius(every=1)]) as session:
        for _ in range(2):
            _, update = watched_step(session, model, optimizer, vectors())
            moved = update["2.bias"]
            expected = float(moved.max() - moved.min()) / math.pi  # each logit moves by its own bias
            assert session.latest.value(R) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rates", [[0.1, 0.1], [0.1, 1e-6], [1e-6, 0.1]], ids=str)
@pytest.mark.parametrize("name", ["mlp", "transformer", "language model"])
def test_under_autocast_however_short_the_step(name, rates, dtype):
    build, inputs, _ = CASES[name]
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    session = redline.attach(model, optimizer, monitors=[GhostRadius(every=1)])
    for rate in rates:
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        x = inputs()
        with torch.autocast("cpu", dtype=dtype):
            loss = loss_of(model(x))
        loss.backward()
        before = copy.deepcopy(model)
        optimizer.step()
        update = moved(before, model)
        assert session.latest.value(R) == pytest.approx(float(spreads(before, x, update).max()) / math.pi, rel=1e-2)
    session.close()


@pytest.mark.parametrize("name", ["mlp", "transformer"])
def test_bfloat16_parameters(name):
    build, inputs, _ = CASES[name]
    model = build().bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with redline.attach(model, optimizer, monitors=[GhostRadius(every=1)]) as session:
        x = inputs().bfloat16()
        before, update = watched_step(session, model, optimizer, x)
        assert session.latest.value(R) == pytest.approx(float(spreads(before, x, update).max()) / math.pi, rel=1e-2)


def test_two_optimizers_make_one_step():
    model = mlp()
    matrices = [p for p in model.parameters() if p.dim() == 2]
    optimizers = [
        torch.optim.Muon(matrices, lr=0.05),
        torch.optim.AdamW([p for p in model.parameters() if p.dim() < 2], lr=1e-2),
    ]
    with redline.attach(model, optimizers, monitors=[GhostRadius(every=1)]) as session:
        x = vectors()
        loss_of(model(x)).backward()
        before = copy.deepcopy(model)
        for optimizer in optimizers:
            optimizer.step()
        update = moved(before, model)
        assert session.latest.value(R) == pytest.approx(float(spreads(before, x, update).max()) / math.pi, rel=1e-4)


def test_parameters_outside_of_the_optimizer_stand_still():
    model = mlp()
    optimizer = torch.optim.SGD(model[4].parameters(), lr=0.5)
    with redline.attach(model, optimizer, monitors=[GhostRadius(every=1)]) as session:
        x = vectors()
        before, update = watched_step(session, model, optimizer, x)
        assert not update["0.weight"].any()
        assert session.latest.value(R) == pytest.approx(float(spreads(before, x, update).max()) / math.pi, rel=1e-4)


def test_one_logit_is_measured_against_zero():
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with redline.attach(model, optimizer, monitors=[GhostRadius(every=1)]) as session:
        x = vectors()
        before, update = watched_step(session, model, optimizer, x, lambda z: F.softplus(z).mean())
        two = spreads(before, x, update, lambda z: torch.cat([z, torch.zeros_like(z)], dim=-1))
        assert session.latest.value(R) == pytest.approx(float(two.max()) / math.pi, rel=1e-4)


class Counting(nn.Module):
    """Remembers how many samples each call without gradients was given: the replays."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner, self.seen = inner, deque()  # no list: what a replay adds to one is taken out again

    def forward(self, x):
        if not torch.is_grad_enabled():
            self.seen.append(len(x))
        return self.inner(x)


class TestSamples:
    @pytest.mark.parametrize("max_samples", [1, 5, 16, 63])
    def test_as_many_are_used_as_are_said(self, max_samples):
        model = Counting(mlp())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        with redline.attach(model, optimizer, monitors=[GhostRadius(every=1, max_samples=max_samples)]) as session:
            x = vectors(64)
            before, update = watched_step(session, model, optimizer, x)
            latest = session.latest
        every = spreads(before.inner, x, {n.removeprefix("inner."): p for n, p in update.items()}) / math.pi
        assert set(model.seen) == {max_samples}
        assert (latest.value(SAMPLES), latest.value(BATCH)) == (max_samples, 64)
        assert latest.value(R) <= float(every.max()) * (1 + 1e-5)
        assert float((every / latest.value(R) - 1).abs().min()) < 1e-4  # it is that of one of the samples
        rank = int((every > latest.value(R) * (1 + 1e-4)).sum())
        assert rank <= 64 - max_samples

    def test_more_of_them_never_give_less(self):
        readings = []
        for max_samples in (1, 2, 4, 8, 16, 32, None):
            torch.manual_seed(0)
            model = mlp()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
            with redline.attach(model, optimizer, monitors=[GhostRadius(every=1, max_samples=max_samples)]) as session:
                watched_step(session, model, optimizer, vectors(32))
                readings.append(session.latest.value(R))
        assert readings[-2] == readings[-1]
        assert max(readings) == readings[-1]

    @pytest.mark.parametrize("max_samples", [None, 12, 40])
    def test_the_whole_batch_is_used_where_it_is_no_larger(self, max_samples):
        model = Counting(mlp())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        with redline.attach(model, optimizer, monitors=[GhostRadius(every=1, max_samples=max_samples)]) as session:
            watched_step(session, model, optimizer, vectors(12))
            assert set(model.seen) == {12}
            assert session.latest.value(SAMPLES) == 12

    def test_batch_norm_in_train_mode_takes_the_whole_batch(self):
        model = Counting(cnn())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        with redline.attach(model, optimizer, monitors=[GhostRadius(every=1, max_samples=4)]) as session:
            x = images()
            before, update = watched_step(session, model, optimizer, x)
            expected = spreads(before.inner, x, {n.removeprefix("inner."): p for n, p in update.items()})
            assert set(model.seen) == {12}
            assert session.latest.value(SAMPLES) == 12
            assert session.latest.value(R) == pytest.approx(float(expected.max()) / math.pi, rel=1e-4)

    def test_batch_norm_that_is_frozen_does_not(self):
        model = cnn().train()
        for module in model:
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        with redline.attach(model, optimizer, monitors=[GhostRadius(every=1, max_samples=4)]) as session:
            watched_step(session, model, optimizer, images())
            assert session.latest.value(SAMPLES) == 4

    def test_batch_norm_without_running_statistics_uses_the_batch_in_any_mode(self):
        model = nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16, track_running_stats=False), nn.Linear(16, CLASSES))
        model[1].eval()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        with redline.attach(model, optimizer, monitors=[GhostRadius(every=1, max_samples=4)]) as session:
            x = vectors(32)
            before, update = watched_step(session, model, optimizer, x)
            expected = float(spreads(before, x, update).max()) / math.pi
            assert session.latest.value(R) == pytest.approx(expected, rel=1e-4)

    def test_another_batch_dimension(self):
        class TimeFirst(nn.Module):
            def __init__(self):
                super().__init__()
                self.cells, self.head = nn.LSTM(12, 10), nn.Linear(10, CLASSES)
                self.seen = deque()

            def forward(self, x):
                self.seen.append(tuple(x.shape[:2]))
                return self.head(self.cells(x)[0][-1])

        model = TimeFirst()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        monitors = [GhostRadius(every=1, max_samples=3)]
        with redline.attach(model, optimizer, monitors=monitors, batch_dim=1) as session:
            watched_step(session, model, optimizer, torch.randn(5, 9, 12))
            assert set(list(model.seen)[1:]) == {(5, 3)}
            assert (session.latest.value(SAMPLES), session.latest.value(BATCH)) == (3, 9)

    @pytest.mark.parametrize("max_samples", [0, -1])
    def test_less_than_one_is_refused(self, max_samples):
        with pytest.raises(ConfigurationError, match=rf"got max_samples={max_samples}; expected at least 1, or None"):
            GhostRadius(max_samples=max_samples)


class TestMask:
    def test_positions_that_do_not_count_are_left_out(self):
        class Padded(nn.Module):
            """Says by itself which positions are padding, so that a part of the batch can be replayed."""

            def __init__(self):
                super().__init__()
                self.inner = LanguageModel()

            def forward(self, tokens):
                return {"scores": self.inner(tokens), "padding": tokens < 4}

        readings = {
            "all": lambda output: output["scores"],
            "text": lambda output: (output["scores"], ~output["padding"]),
            "padding": lambda output: (output["scores"], output["padding"]),
        }
        model, x, r = Padded(), sentences(), {}
        for count, logits in readings.items():
            twin = copy.deepcopy(model)
            optimizer = torch.optim.SGD(twin.parameters(), lr=0.5)
            with redline.attach(twin, optimizer, monitors=[GhostRadius(every=1)], logits=logits) as session:
                before, update = watched_step(session, twin, optimizer, x, lambda output: loss_of(output["scores"]))
                r[count] = session.latest.value(R)
        every = spreads(before, x, update, lambda output: output["scores"]) / math.pi
        assert r["all"] == pytest.approx(float(every.max()), rel=1e-4)
        assert r["text"] == pytest.approx(float(every[x >= 4].max()), rel=1e-4)
        assert r["padding"] == pytest.approx(float(every[x < 4].max()), rel=1e-4)
        assert min(r.values()) < 0.95 * r["all"]  # the mask matters here

    def test_of_a_step_tangent(self):
        logits, tangent = torch.zeros(3, 2), torch.tensor([[0.0, 1.0], [0.0, 5.0], [0.0, math.nan]])
        mask = torch.tensor([True, False, False])
        masked = StepTangent(logits, tangent, mask, "forward_mode", torch.arange(3), 3, 0)
        assert float(masked.normalized_step_size) == pytest.approx(1 / math.pi)
        two = StepTangent(logits[:2], tangent[:2], None, "forward_mode", torch.arange(2), 2, 0)
        assert float(two.normalized_step_size) == pytest.approx(5 / math.pi)
        every = StepTangent(logits, tangent, None, "forward_mode", torch.arange(3), 3, 0)
        assert math.isnan(every.normalized_step_size)

    def test_where_nothing_counts_no_step_is_too_long(self):
        tangent = StepTangent(
            torch.zeros(2, 2), torch.ones(2, 2), torch.zeros(2, dtype=torch.bool), "forward_mode", torch.arange(2), 2, 0
        )
        assert float(tangent.normalized_step_size) == 0

    def test_one_of_another_shape_ends_the_run_with_what_to_do(self):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        wrong = torch.ones(3, dtype=torch.bool)
        monitors = [GhostRadius(every=1)]
        with redline.attach(model, optimizer, monitors=monitors, logits=lambda z: (z, wrong)) as session:  # noqa: SIM117
            with pytest.raises(
                ConfigurationError, match=r"got a mask of shape \(3,\).*expected a bool tensor of shape \(12,\)"
            ):
                watched_step(session, model, optimizer, vectors())


class TestWhatCannotBeMeasured:
    def test_without_a_forward_in_training_mode_r_is_absent_and_tau_is_there(self):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        with redline.attach(model, optimizer, monitors=[GhostRadius(every=1)]) as session:
            watched_step(session, model, optimizer, vectors())
            assert R in session.latest
            model.eval()
            with pytest.warns(RedlineWarning, match="not called in training mode with gradients enabled"):  # noqa: PT031
                for _ in range(2):  # said by the second at the latest
                    _, update = watched_step(session, model, optimizer, vectors())
                    for metric in (R, RHO):
                        assert metric not in session.latest  # the last one's would mislead
                    tau = math.sqrt(sum(float(p.square().sum()) for p in update.values()))
                    assert session.latest.value(TAU) == pytest.approx(tau, rel=1e-5)
            model.train()
            watched_step(session, model, optimizer, vectors())
            assert R in session.latest

    def test_a_model_that_cannot_be_called_again(self):
        class Once(nn.Module):
            def __init__(self):
                super().__init__()
                self.head = nn.Linear(12, CLASSES)

            def forward(self, x):
                if not torch.is_grad_enabled():
                    raise KeyError("only once")
                return self.head(x)

        model = Once()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        with redline.attach(model, optimizer, monitors=[GhostRadius(every=1)]) as session:
            with pytest.warns(RedlineWarning, match="calling Once again on its own inputs failed with KeyError"):
                watched_step(session, model, optimizer, vectors())
            assert R not in session.latest

    def test_logits_that_are_none_end_the_run_with_what_to_do(self):
        class Pair(nn.Module):
            def __init__(self):
                super().__init__()
                self.head = nn.Linear(12, CLASSES)

            def forward(self, x):
                return [self.head(x)]

        model = Pair()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        with redline.attach(model, optimizer, monitors=[GhostRadius(every=1)]) as session:  # noqa: SIM117
            with pytest.raises(ConfigurationError, match="got a list as logits; expected a floating tensor"):
                watched_step(session, model, optimizer, vectors(), lambda output: loss_of(output[0]))

    def test_a_kernel_that_drops_tangents_is_found_out(self):
        class Dropping(nn.Module):
            """Half of its derivative is lost in forward mode, as under a faulty compiled kernel."""

            def __init__(self):
                super().__init__()
                self.a, self.b = nn.Linear(12, CLASSES), nn.Linear(12, CLASSES)

            def forward(self, x):
                lost = self.b(x)
                if torch.autograd.forward_ad._current_level >= 0:
                    lost = torch.autograd.forward_ad.unpack_dual(lost).primal
                return self.a(x) + lost

        model = Dropping()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        with redline.attach(model, optimizer, monitors=[GhostRadius(every=1)]) as session:
            for step in range(2):
                x = vectors()
                if step == 0:
                    with pytest.warns(RedlineWarning, match="forward_mode are off by .* from a finite difference"):
                        before, update = watched_step(session, model, optimizer, x)
                else:
                    before, update = watched_step(session, model, optimizer, x)
                expected = float(spreads(before, x, update).max()) / math.pi
                assert session.latest.value(R) == pytest.approx(expected, rel=2e-2)
            assert session.latest.value(FALLBACKS, method="finite_difference") == 2


def test_a_step_of_length_0_has_r_0_and_no_ghost():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with redline.attach(model, optimizer, monitors=[GhostRadius(every=1)]) as session:
        watched_step(session, model, optimizer, vectors())
        assert session.latest.value(R) == session.latest.value(TAU) == 0
        assert session.latest.value(RHO) == math.inf


def test_a_step_that_is_not_finite_is_counted_and_shown_as_nan():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=math.nan)
    with redline.attach(model, optimizer, monitors=[GhostRadius(every=1)]) as session:
        watched_step(session, model, optimizer, vectors())
        for metric in (R, RHO, TAU):
            assert math.isnan(session.latest.value(metric))
        assert session.latest.value("redline_nonfinite_total", source="update") == 1


def test_the_schedule_is_kept():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    at = []
    with redline.attach(model, optimizer, monitors=[GhostRadius(every=3)]) as session:
        for _ in range(7):
            watched_step(session, model, optimizer, vectors())
            at.append(session.latest.measured_at[redline.Series(R)])
        assert at == [0, 0, 0, 3, 3, 3, 6]
        assert session.latest.value("redline_measurements_total", monitor="GhostRadius") == 3


@pytest.fixture(scope="module", params=range(3))
def trained(request):
    """A linear softmax model, trained in full batches; the first fifth of the shuffled digits is the test set."""
    pixels, digits = load_digits(return_X_y=True)
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(pixels / 16, dtype=torch.float32)[order], torch.tensor(digits)[order]
    held_out = len(y) // 5
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(request.param)
        model = nn.Linear(64, 10)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.015)
    for _ in range(200):
        optimizer.zero_grad()
        F.cross_entropy(model(x[held_out:]), y[held_out:]).backward()
        optimizer.step()
    optimizer.zero_grad()
    F.cross_entropy(model(x[held_out:]), y[held_out:]).backward()
    downhill = {name: -p.grad for name, p in model.named_parameters()}
    radius = float(ghost_radius(logit_tangent(model, (x[held_out:],), {}, downhill).tangent).min())

    def accuracy(r: float) -> float:
        """In percent, after one step along the negative gradient of normalized size ``r``."""
        moved = {name: p + r * radius * downhill[name] for name, p in model.named_parameters()}
        z = torch.func.functional_call(model, moved, (x[:held_out],))
        return 100 * float((z.argmax(-1) == y[:held_out]).double().mean())

    return accuracy


class TestDigits:
    """The paper's figure 1: below r = 1 no accuracy is lost, well above it is."""

    def test_it_is_trained(self, trained):
        assert trained(0.0) > 95

    @pytest.mark.parametrize("r", [0.1, 0.5, 0.9])
    def test_below_one_a_gradient_step_costs_less_than_half_a_point(self, trained, r):
        assert trained(r) > trained(0.0) - 0.5

    def test_at_ten_it_costs_at_least_four_points(self, trained):
        assert trained(10.0) <= trained(0.0) - 4
