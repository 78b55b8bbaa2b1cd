"""``redline doctor``: look at a model ahead of a run."""

from __future__ import annotations

import argparse


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Describe the command."""
    parser = commands.add_parser(
        "doctor",
        help="say ahead of a run what will be measured of a model, how, and at what cost",
        description="Makes the model, tries on one batch what a run will measure, and says what works, what it costs "
        "and how to attach it. The exit status is 1 if something cannot be measured. Everything is tried on a copy.",
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="package.module:factory, a callable without arguments that gives a torch.nn.Module or (model, inputs); "
        "modules are also looked for here",
    )
    parser.add_argument("--input", metavar="MODULE:CALLABLE", help="gives example inputs: a tensor, a tuple or a dict")
    parser.add_argument("--shape", type=_shape, metavar="8,64", help="of a random example input, the batch first")
    parser.add_argument("--dtype", default="float32", help="of that input (%(default)s)")
    parser.add_argument("--high", type=int, default=2, help="integer inputs are drawn below this (%(default)s)")
    parser.add_argument("--logits", metavar="MODULE:CALLABLE", help="reads the logits out of the model's output")
    return parser


def run(options: argparse.Namespace) -> int:
    """Examine, and show what was found."""
    import rich

    from redline.integrations.doctor.diagnosis import examine
    from redline.integrations.doctor.subject import load
    from redline.integrations.doctor.view import diagnosis_view

    subject = load(
        options.model,
        inputs=options.input,
        shape=options.shape,
        dtype=options.dtype,
        high=options.high,
        logits=options.logits,
    )
    diagnosis = examine(subject)
    rich.print(diagnosis_view(diagnosis))
    return 1 if diagnosis.gaps else 0


def _shape(text: str) -> tuple[int, ...]:
    shape = tuple(int(size) for size in text.split(","))
    if min(shape) < 1:
        raise ValueError(text)
    return shape
