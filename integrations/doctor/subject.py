"""The model to look at, with example inputs, as named on the command line."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from redline.errors import ConfigurationError

_SEED = 0x5EED


@dataclass(frozen=True)
class Subject:
    """A model and one batch for it.

    Attributes:
        name: as given, ``package.module:factory``.
        model: as the factory made it.
        args: positional inputs of its forward.
        kwargs: keyword inputs.
        logits: callable that reads the logits out of its output, or None for the usual places.
        logits_name: its name, or None.
    """

    name: str
    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    logits: Callable[[Any], Any] | None = None
    logits_name: str | None = None


def load(
    name: str,
    *,
    inputs: str | None = None,
    shape: tuple[int, ...] | None = None,
    dtype: str = "float32",
    high: int = 2,
    logits: str | None = None,
) -> Subject:
    """Make the model and its inputs.

    Args:
        name: ``package.module:factory``, a callable without arguments that gives a ``nn.Module`` or
            ``(model, inputs)``; the working directory is searched, too.
        inputs: ``package.module:callable`` that gives a tensor, a tuple of positional or a dict of keyword inputs.
        shape: of a single random input, the batch first: normal numbers, or integers below ``high``.
        dtype: of it, a torch dtype by name.
        high: integers are drawn from 0 to it, exclusive.
        logits: ``package.module:callable`` from the model's output to its logits.

    Raises:
        ConfigurationError: one of them cannot be imported, raises, or gives something else.
    """
    made = _called(name, "MODEL", "a callable without arguments that gives a torch.nn.Module")
    given: Any = None
    if isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module):
        made, given = made
    if not isinstance(made, nn.Module):
        raise ConfigurationError(
            f"got a {type(made).__name__} from {name}; expected a torch.nn.Module, or (model, example inputs)."
        )
    if inputs is not None:
        given = _called(inputs, "--input", "a callable without arguments that gives inputs")
    elif shape is not None:
        given = _random(shape, dtype, high)
    elif given is None:
        raise ConfigurationError(
            f"got no inputs for {name}; expected example inputs, since tangents are taken of a real forward pass: let "
            "it return (model, inputs), or pass --input package.module:callable or --shape 8,64."
        )
    args, kwargs = _arguments(given)
    read = None if logits is None else _imported(logits, "--logits")
    device = next((parameter.device for parameter in made.parameters()), torch.device("cpu"))
    moved = [value.to(device) if isinstance(value, Tensor) else value for value in args]
    named = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in kwargs.items()}
    return Subject(name, made, tuple(moved), named, read, logits)


def _imported(name: str, option: str) -> Callable[..., Any]:
    module_name, _, path = name.partition(":")
    if not module_name or not path:
        raise ConfigurationError(f"got {name!r} as {option}; expected package.module:name, such as mine.models:build.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:
        raise ConfigurationError(
            f"importing {module_name} for {option} failed with {described(error)}; expected a module that can be "
            f"imported from here ({os.getcwd()}) or that is installed."
        ) from error
    for part in path.split("."):
        if not hasattr(found, part):
            names = [one for one, value in vars(found).items() if callable(value) and not one.startswith("_")]
            raise ConfigurationError(
                f"got {name!r} as {option}, but {module_name} has no {path!r}; expected one of its callables, such as "
                f"{', '.join(names[:8]) or 'none: it has none'}."
            )
        found = getattr(found, part)
    if not callable(found):
        raise ConfigurationError(f"got a {type(found).__name__} at {name}; expected a callable for {option}.")
    return found


def _called(name: str, option: str, expected: str) -> Any:
    found = _imported(name, option)
    if isinstance(found, nn.Module):
        return found
    try:
        return found()
    except Exception as error:
        raise ConfigurationError(f"calling {name} raised {described(error)}; expected {expected}.") from error


def _random(shape: tuple[int, ...], dtype: str, high: int) -> Tensor:
    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype):
        raise ConfigurationError(f"got dtype {dtype!r}; expected the name of a torch dtype, such as float32 or int64.")
    generator = torch.Generator().manual_seed(_SEED)
    if kind.is_floating_point:
        return torch.randn(shape, generator=generator).to(kind)
    if high < 1:
        raise ConfigurationError(f"got high={high}; expected at least 1: integers are drawn from 0 to it, exclusive.")
    return torch.randint(high, shape, generator=generator).to(kind)


def _arguments(given: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(given, Mapping):
        return (), dict(given)
    return (tuple(given), {}) if isinstance(given, (tuple, list)) else ((given,), {})


def described(error: BaseException) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
