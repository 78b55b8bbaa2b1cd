"""What a logit tangent is refused for, and what comes through as the model raised it."""

import pytest
import torch
from tangent_cases import CLASSES, build, random_direction
from torch import nn

from redline import ConfigurationError
from redline.numerics import logit_tangent


class TestErrors:
    def test_a_name_that_is_no_parameter(self):
        model, x = build("mlp")
        with pytest.raises(
            ConfigurationError, match=r"direction for 'body\.weight', which is no parameter .*'0\.weight'"
        ):
            logit_tangent(model, (x,), {}, {"body.weight": torch.ones(3)})
        with pytest.raises(ConfigurationError, match=r"value for 'body\.weight', which is no parameter"):
            logit_tangent(model, (x,), {}, random_direction(model), parameters={"body.weight": torch.ones(3)})

    def test_an_unknown_method(self):
        model, x = build("mlp")
        with pytest.raises(
            ConfigurationError, match=r"got method='reverse_mode'; expected 'auto' or one of forward_mode"
        ):
            logit_tangent(model, (x,), {}, random_direction(model), method="reverse_mode")

    @pytest.mark.parametrize("method", ["auto", "forward_mode", "finite_difference"])
    @pytest.mark.parametrize(
        ("read", "got"),
        [
            (lambda z: z.argmax(-1), r"got a torch\.int64 tensor of shape \(8,\) as logits"),
            (lambda z: z.sum(), r"got a torch\.float32 tensor of shape \(\) as logits"),
            (lambda z: [z], "got a list as logits"),
            (lambda z: None, "got a NoneType as logits"),
        ],
    )
    def test_logits_that_are_none(self, read, got, method):
        model, x = build("mlp")
        with pytest.raises(ConfigurationError, match=got + r"; expected a floating tensor .* Pass `logits=`"):
            logit_tangent(model, (x,), {}, random_direction(model), logits=read, method=method)

    @pytest.mark.parametrize("method", ["auto", "forward_mode", "finite_difference"])
    @pytest.mark.parametrize(
        "mask",
        [
            torch.ones(8),  # not bool
            torch.ones(7, dtype=torch.bool),
            torch.ones(8, CLASSES, dtype=torch.bool),
        ],
    )
    def test_a_mask_of_another_kind_or_shape(self, mask, method):
        model, x = build("mlp")
        with pytest.raises(ConfigurationError, match=r"got a mask of shape .*expected a bool tensor of shape \(8,\)"):
            logit_tangent(model, (x,), {}, random_direction(model), logits=lambda z: (z, mask), method=method)

    def test_a_second_output_that_is_no_mask(self):
        class WithState(nn.Module):
            def __init__(self):
                super().__init__()
                self.cells = nn.RNN(12, CLASSES, batch_first=True)

            def forward(self, x):
                return self.cells(x, None)[0], [x]

        torch.manual_seed(0)
        model, x = WithState(), torch.randn(4, 3, 12)
        with pytest.raises(ConfigurationError, match="got a"):
            logit_tangent(model, (x,), {}, random_direction(model))

    def test_a_direction_of_another_shape(self):
        model, x = build("mlp")
        with pytest.raises((ConfigurationError, RuntimeError)):
            logit_tangent(model, (x,), {}, {"5.bias": torch.ones(1)})

    def test_what_the_model_itself_raises(self):
        model, x = build("mlp")
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            logit_tangent(model, (x[:, :5],), {}, random_direction(model))

    @pytest.mark.parametrize("method", ["forward_mode", "math_attention"])
    def test_a_method_asked_for_by_name_is_not_replaced(self, method):
        model, x = build("custom kernel")
        with pytest.raises((RuntimeError, NotImplementedError)):
            logit_tangent(model, (x,), {}, random_direction(model), method=method)
