"""Loss, gradient norm, rates and counts, against sums made by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import redline
from redline import ConfigurationError, StepHealth

LOSS, GRADIENT = "redline_loss", "redline_gradient_norm"
RATE, DECAY, NONFINITE = "redline_learning_rate", "redline_weight_decay", "redline_nonfinite_total"


@pytest.fixture(autouse=True)
def _seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))


def norm_by_hand(*models: nn.Module) -> float:
    """Root of the sum of squares of all gradients, element by element, in float64."""
    gradients = [p.grad.to_dense() for model in models for p in model.parameters() if p.grad is not None]
    return math.sqrt(sum(value**2 for gradient in gradients for value in gradient.double().flatten().tolist()))


class TestLoss:
    @pytest.mark.parametrize("kind", ["tensor", "one element", "float", "bfloat16", "float64"])
    def test_it_is_what_was_observed(self, kind):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with redline.attach(model, optimizer, monitors=[StepHealth()]) as session:
            for _ in range(3):
                loss = F.cross_entropy(model(torch.randn(5, 8)), torch.arange(5) % 3)
                shown = {
                    "tensor": loss,
                    "one element": loss.reshape(1),
                    "float": loss.item(),
                    "bfloat16": loss.bfloat16(),
                    "float64": loss.double(),
                }[kind]
                session.observe(loss=shown)
                loss.backward()
                optimizer.step()
                assert session.latest.value(LOSS) == torch.as_tensor(shown).item()

    def test_without_it_there_is_none(self):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with redline.attach(model, optimizer, monitors=[StepHealth()]) as session:
            model(torch.randn(5, 8)).sum().backward()
            optimizer.step()
            assert LOSS not in session.latest
            assert GRADIENT in session.latest

    def test_it_belongs_to_one_step_only(self):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with redline.attach(model, optimizer, monitors=[StepHealth()]) as session:
            for step in range(2):
                loss = model(torch.randn(5, 8)).square().mean()
                if step == 0:
                    session.observe(loss=loss)
                loss.backward()
                optimizer.step()
            assert session.latest.measured_at[redline.Series(LOSS)] == 0

    def test_it_is_the_value_at_the_time_of_the_step(self):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with redline.attach(model, optimizer, monitors=[StepHealth()]) as session:
            loss = model(torch.randn(5, 8)).square().mean()
            session.observe(loss=loss)
            loss.backward()
            optimizer.step()
            observed = loss.item()
            with torch.no_grad():
                loss.zero_()  # a static buffer, written over by the next step
            assert session.latest.value(LOSS) == observed

    def test_more_than_one_number_is_refused(self):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with redline.attach(model, optimizer, monitors=[StepHealth()]) as session:  # noqa: SIM117
            with pytest.raises(ConfigurationError, match=r"got a loss of shape \(5,\); expected a single number"):
                session.observe(loss=torch.ones(5))


class TestGradientNorm:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    def test_it_is_that_of_all_gradients_together(self, dtype):
        model = mlp().to(dtype)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with redline.attach(model, optimizer, monitors=[StepHealth()]) as session:
            for _ in range(3):
                optimizer.zero_grad()
                model(torch.randn(5, 8, dtype=dtype)).square().sum().backward()
                expected = norm_by_hand(model)
                optimizer.step()
                assert session.latest.value(GRADIENT) == pytest.approx(expected, rel=1e-5)

    def test_of_float16_gradients_whose_squares_overflow(self):
        model = nn.Linear(8, 3).half()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 1000.0)
        with redline.attach(model, optimizer, monitors=[StepHealth()]) as session:
            optimizer.step()
        assert session.latest.value(GRADIENT) == pytest.approx(1000 * math.sqrt(27), rel=1e-3)
        assert session.latest.value(NONFINITE, source="gradient") == 0

    def test_it_is_what_clipping_left(self):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with redline.attach(model, optimizer, monitors=[StepHealth()]) as session:
            (100 * model(torch.randn(5, 8)).square().sum()).backward()
            assert norm_by_hand(model) > 10
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
        assert session.latest.value(GRADIENT) == pytest.approx(0.5, rel=1e-4)

    def test_accumulated_gradients_count_once(self):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with redline.attach(model, optimizer, monitors=[StepHealth()]) as session:
            for _ in range(4):
                (model(torch.randn(5, 8)).square().sum() / 4).backward()
            expected = norm_by_hand(model)
            optimizer.step()
        assert session.latest.value(GRADIENT) == pytest.approx(expected, rel=1e-5)
        assert session.latest.value("redline_steps_total") == 1

    def test_parameters_without_a_gradient_and_outside_of_the_optimizer_do_not_count(self):
        model = mlp()
        optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1)
        with redline.attach(model, optimizer, monitors=[StepHealth()]) as session:
            (model(torch.randn(5, 8)) - model[2].bias).square().sum().backward()
            model[2].bias.grad = None
            expected = norm_by_hand(model[2])
            assert norm_by_hand(model) > expected * 1.01
            optimizer.step()
        assert session.latest.value(GRADIENT) == pytest.approx(expected, rel=1e-5)

    def test_of_two_optimizers_it_is_that_of_both(self):
        model = mlp()
        optimizers = [torch.optim.SGD(model[0].parameters(), lr=0.1), torch.optim.Adam(model[2].parameters(), lr=0.1)]
        with redline.attach(model, optimizers, monitors=[StepHealth()]) as session:
            model(torch.randn(5, 8)).square().sum().backward()
            expected = norm_by_hand(model)
            for optimizer in optimizers:
                optimizer.step()
        assert session.latest.value(GRADIENT) == pytest.approx(expected, rel=1e-5)

    @pytest.mark.parametrize("optimizer", ["SGD", "SparseAdam"])
    def test_sparse_gradients_count_by_their_sums(self, optimizer):
        model = nn.Sequential(nn.Embedding(30, 6, sparse=True), nn.Flatten(), nn.Linear(18, 3))
        tokens = torch.tensor([[1, 1, 2], [1, 7, 7], [2, 29, 0]])  # a row that occurs twice has one gradient
        optimizers = [
            getattr(torch.optim, optimizer)(model[0].parameters(), lr=0.1),
            torch.optim.SGD(model[2].parameters(), lr=0.1),
        ]
        with redline.attach(model, optimizers, monitors=[StepHealth()]) as session:
            for _ in range(2):
                for each in optimizers:
                    each.zero_grad()
                F.cross_entropy(model(tokens), torch.arange(3)).backward()
                assert model[0].weight.grad.is_sparse
                expected = norm_by_hand(model)
                for each in optimizers:
                    each.step()
                assert session.latest.value(GRADIENT) == pytest.approx(expected, rel=1e-5)

    def test_the_gradients_are_left_as_they_were(self):
        model = nn.Sequential(nn.Embedding(30, 6, sparse=True), nn.Flatten(), nn.Linear(12, 3))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with redline.attach(model, optimizer, monitors=[StepHealth()]):
            model(torch.tensor([[1, 1], [2, 3]])).square().sum().backward()
            before = [p.grad for p in model.parameters()]
            values = [g.to_dense().clone() for g in before]
            coalesced = before[0].is_coalesced()
            optimizer.step()
        assert [p.grad is g for p, g in zip(model.parameters(), before, strict=True)] == [True] * 3
        assert all(torch.equal(g.to_dense(), v) for g, v in zip(before, values, strict=True))
        assert before[0].is_coalesced() == coalesced

    def test_where_there_is_no_gradient_there_is_no_norm(self):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with redline.attach(model, optimizer, monitors=[StepHealth()]) as session:
            optimizer.step()
            assert GRADIENT not in session.latest

    def test_with_a_closure_it_is_that_of_the_closures_gradients(self):
        model, expected = mlp(), []
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def closure():
            optimizer.zero_grad()
            loss = model(torch.randn(5, 8)).square().sum()
            loss.backward()
            expected.append(norm_by_hand(model))
            return loss

        with redline.attach(model, optimizer, monitors=[StepHealth()]) as session:
            for _ in range(3):
                optimizer.step(closure)
                assert session.latest.value(GRADIENT) == pytest.approx(expected[-1], rel=1e-5)


class TestRates:
    def test_each_group_of_each_optimizer_has_its_own(self):
        model = mlp()
        optimizers = [
            torch.optim.AdamW(
                [
                    {"params": [model[0].weight], "lr": 0.01, "weight_decay": 0.3},
                    {"params": [model[0].bias], "lr": 0.02, "weight_decay": 0.0, "name": "biases"},
                ]
            ),
            torch.optim.SGD(model[2].parameters(), lr=0.5, weight_decay=0.25),
        ]
        with redline.attach(model, optimizers, monitors=[StepHealth()]) as session:
            model(torch.randn(5, 8)).sum().backward()
            for optimizer in optimizers:
                optimizer.step()
        latest = session.latest
        assert latest.series(RATE) == {("AdamW", "0"): 0.01, ("AdamW", "biases"): 0.02, ("SGD", "0"): 0.5}
        assert latest.series(DECAY) == {("AdamW", "0"): 0.3, ("AdamW", "biases"): 0.0, ("SGD", "0"): 0.25}

    def test_two_optimizers_of_one_class_do_not_collide(self):
        model = mlp()
        optimizers = [torch.optim.SGD(model[0].parameters(), lr=0.1), torch.optim.SGD(model[2].parameters(), lr=0.2)]
        with redline.attach(model, optimizers, monitors=[StepHealth()]) as session:
            model(torch.randn(5, 8)).sum().backward()
            for optimizer in optimizers:
                optimizer.step()
        rates = session.latest.series(RATE)
        assert sorted(rates.values()) == [0.1, 0.2]
        assert len({optimizer for optimizer, _ in rates}) == 2

    @pytest.mark.parametrize("kind", ["float", "tensor"])
    def test_it_is_the_rate_that_the_step_was_made_with(self, kind):
        """Schedulers change it after the step: a number is replaced, a tensor is filled in place."""
        model = mlp()
        rate = 0.5 if kind == "float" else torch.tensor(0.5)
        optimizer = torch.optim.Adam(model.parameters(), lr=rate)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        with redline.attach(model, optimizer, monitors=[StepHealth()]) as session:
            for step in range(3):
                model(torch.randn(5, 8)).sum().backward()
                optimizer.step()
                scheduler.step()
                assert session.latest.value(RATE, optimizer="Adam", group="0") == pytest.approx(0.5 * 0.5**step)
        assert isinstance(optimizer.param_groups[0]["lr"], torch.Tensor) == (kind == "tensor")

    def test_an_optimizer_without_decay_shows_none(self):
        model = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Flatten())
        optimizer = torch.optim.SparseAdam(model.parameters(), lr=0.1)
        with redline.attach(model, optimizer, monitors=[StepHealth()]) as session:
            model(torch.tensor([[1, 2]])).sum().backward()
            optimizer.step()
        assert session.latest.series(RATE) == {("SparseAdam", "0"): 0.1}
        assert session.latest.series(DECAY) == {}


class TestNonFinite:
    def test_the_counters_are_there_at_0_from_the_start(self):
        model = mlp()
        with redline.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), monitors=[StepHealth()]) as session:
            counts = session.latest.series(NONFINITE)
        assert counts == {(source,): 0 for source in ("loss", "gradient", "update", "weight")}

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_a_loss_is_counted_and_exported_as_it_is(self, value):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with redline.attach(model, optimizer, monitors=[StepHealth()]) as session:
            for loss in (1.0, value, 2.0, value):
                session.observe(loss=loss)
                model(torch.randn(5, 8)).sum().backward()
                optimizer.step()
            assert session.latest.value(LOSS) == pytest.approx(value, nan_ok=True)
            assert session.latest.value(NONFINITE, source="loss") == 2
            assert session.latest.value(NONFINITE, source="gradient") == 0

            session.observe(loss=3.0)
            model(torch.randn(5, 8)).sum().backward()
            optimizer.step()
            assert session.latest.value(LOSS) == 3.0  # and it does not stay
            assert session.latest.value(NONFINITE, source="loss") == 2

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_a_gradient_is_counted_and_exported_as_it_is(self, value):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        with redline.attach(model, optimizer, monitors=[StepHealth()]) as session:
            for step in range(3):
                optimizer.zero_grad()
                model(torch.ones(5, 8)).sum().backward()
                if step == 1:
                    model[0].weight.grad[2, 3] = value
                kept = [p.detach().clone() for p in model.parameters()]
                optimizer.step()
                with torch.no_grad():
                    for parameter, before in zip(model.parameters(), kept, strict=True):
                        parameter.copy_(before)
                norm = session.latest.value(GRADIENT)
                assert norm == pytest.approx(value, nan_ok=True) if step == 1 else math.isfinite(norm)
                assert session.latest.value(NONFINITE, source="gradient") == min(step, 1)

    def test_steps_that_nobody_fetches_are_counted_too(self):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with redline.attach(model, optimizer, monitors=[StepHealth()]) as session:
            for step in range(9):
                session.observe(loss=math.nan if step % 3 == 0 else 1.0)
                model(torch.randn(5, 8)).sum().backward()
                optimizer.step()
        assert session.latest.value(NONFINITE, source="loss") == 3
        assert session.latest.value("redline_steps_total") == 9


def test_it_measures_each_step_unless_told_otherwise():
    for every, measured in ((None, 6), (1, 6), (4, 2), (lambda step: step > 3, 2)):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        monitor = StepHealth() if every is None else StepHealth(every=every)
        with redline.attach(model, optimizer, monitors=[monitor]) as session:
            for _ in range(6):
                model(torch.randn(5, 8)).sum().backward()
                optimizer.step()
        assert session.latest.value("redline_measurements_total", monitor="StepHealth") == measured
