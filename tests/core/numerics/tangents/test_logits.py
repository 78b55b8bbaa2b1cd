"""Where the logits are in a model's output, and which of them count."""

import pytest
import torch
from tangent_cases import build, jacobian_times, random_direction, relative_error
from torch import nn

from redline.numerics import logit_tangent


class TestReadingLogits:
    @pytest.mark.parametrize("method", ["forward_mode", "finite_difference"])
    def test_a_callable_finds_them_in_the_output(self, method):
        class TwoHeads(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b = nn.Linear(12, 3), nn.Linear(12, 5)

            def forward(self, x):
                return {"a": self.a(x), "b": self.b(x)}

        torch.manual_seed(0)
        model, x = TwoHeads(), torch.randn(4, 12)
        direction = random_direction(model)
        taken = logit_tangent(model, (x,), {}, direction, logits=lambda output: output["b"], method=method)
        expected = jacobian_times(model, (x,), direction, lambda output: output["b"])[1]
        assert relative_error(taken.tangent, expected) < 1e-3

    @pytest.mark.parametrize("method", ["forward_mode", "finite_difference"])
    @pytest.mark.parametrize("kind", ["attribute", "key", "output"])
    def test_without_one_they_are_the_output_or_its_logits(self, kind, method):
        class Output:
            def __init__(self, logits):
                self.logits = logits

        class Wrapped(nn.Module):
            def __init__(self):
                super().__init__()
                self.head = nn.Linear(12, 5)

            def forward(self, x):
                z = self.head(x)
                return {"attribute": Output(z), "key": {"logits": z, "other": x}, "output": z}[kind]

        torch.manual_seed(0)
        model, x = Wrapped(), torch.randn(4, 12)
        direction = random_direction(model)
        expected = jacobian_times(model.head, (x,), {n.removeprefix("head."): t for n, t in direction.items()})[1]
        assert relative_error(logit_tangent(model, (x,), {}, direction, method=method).tangent, expected) < 1e-3

    @pytest.mark.parametrize("method", ["forward_mode", "finite_difference"])
    def test_a_mask_beside_them_is_handed_on(self, method):
        model, x = build("tied language model")
        mask = x > 4
        taken = logit_tangent(model, (x,), {}, random_direction(model), logits=lambda z: (z, mask), method=method)
        assert taken.tangent.shape == (4, 5, 20)
        assert torch.equal(taken.mask, mask)

    def test_no_mask_beside_them_means_that_all_count(self):
        model, x = build("mlp")
        assert logit_tangent(model, (x,), {}, random_direction(model), logits=lambda z: (z, None)).mask is None

    @pytest.mark.parametrize("method", ["forward_mode", "finite_difference"])
    def test_a_flat_output_is_one_logit_a_sample(self, method):
        torch.manual_seed(0)
        model, x = nn.Sequential(nn.Linear(12, 1), nn.Flatten(0)), torch.randn(4, 12)
        direction = random_direction(model)
        taken = logit_tangent(model, (x,), {}, direction, method=method)
        assert taken.logits.shape == taken.tangent.shape == (4, 1)
        assert relative_error(taken.tangent.squeeze(-1), jacobian_times(model, (x,), direction)[1]) < 1e-3
