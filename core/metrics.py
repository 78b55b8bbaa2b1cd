"""The metrics: one definition each. Console, Prometheus, loggers and docs all read it from here.

Names follow Prometheus: prefix ``redline_``, base units, ``_total`` for counters. ``layer`` is a parameter's qualified
name, ``name[e]`` for matrix ``e`` of a stack; of attention and activations, that of the module that calls them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from redline.numerics.tangents import METHODS


@dataclass(frozen=True)
class Metric:
    """A metric's name, meaning and labels.

    Attributes:
        name: full name, as exported.
        kind: gauge (the last value), counter (a running total) or info (labels alone).
        unit: base unit, "1" for a pure number.
        help: one line for people.
        labels: label names, in the order in which values are given.
        label_values: of a counter with one label, all values it can take; they exist at 0 from the start.
        tracked: the report keeps every measurement of it, not only the last.
    """

    name: str
    kind: Literal["gauge", "counter", "info"]
    unit: str
    help: str
    labels: tuple[str, ...] = ()
    label_values: tuple[str, ...] = ()
    tracked: bool = False


METRICS: dict[str, Metric] = {}


def _define(
    name: str,
    kind: Literal["gauge", "counter", "info"],
    unit: str,
    text: str,
    *labels: str,
    label_values: tuple[str, ...] = (),
    tracked: bool = False,
) -> Metric:
    metric = Metric(f"redline_{name}", kind, unit, text, labels, label_values, tracked)
    METRICS[metric.name] = metric
    return metric


WEIGHT_SPECTRAL_NORM = _define(
    "weight_spectral_norm", "gauge", "1", "Top singular value of the weight matrix, sigma_1(W).", "layer", tracked=True
)
WEIGHT_SPECTRAL_RESIDUAL = _define(
    "weight_spectral_residual", "gauge", "1", "Relative residual of the estimate of sigma_1(W).", "layer"
)
WEIGHT_STABLE_RANK = _define("weight_stable_rank", "gauge", "1", "||W||_F^2 / sigma_1(W)^2.", "layer", tracked=True)
WEIGHT_SPECTRAL_CONDITION = _define(
    "weight_spectral_condition", "gauge", "1", "sigma_1(W) / sqrt(d_out / d_in).", "layer"
)
WEIGHT_SPECTRAL_CEILING = _define(
    "weight_spectral_ceiling", "gauge", "1", "Ceiling on sigma_1(W), by UpdateClamp and decay.",
    "layer",
)  # fmt: skip
WEIGHT_DECAY_IN_FORCE = _define(
    "weight_decay_in_force", "gauge", "1", "Weight decay that a controller put in place.",
    "layer",
)  # fmt: skip
UPDATE_SPECTRAL_NORM = _define(
    "update_spectral_norm", "gauge", "1", "Top singular value of the matrix's update, sigma_1(dW).", "layer"
)
UPDATE_SPECTRAL_CONDITION = _define(
    "update_spectral_condition", "gauge", "1", "sigma_1(dW) / sqrt(d_out / d_in).", "layer"
)
UPDATE_TO_WEIGHT_RATIO = _define(
    "update_to_weight_ratio", "gauge", "1", "sigma_1(dW) / sigma_1(W).", "layer", tracked=True
)
UPDATE_NORM = _define("update_norm", "gauge", "1", "L2 norm of the step the optimizer proposed, tau.")
GHOST_RADIUS = _define(
    "ghost_radius", "gauge", "1", "Bound on the Taylor convergence radius along the proposed step, rho_a, as a length."
)
NORMALIZED_STEP_SIZE = _define(
    "normalized_step_size", "gauge", "1", "r = tau / rho_a of the proposed step; 1 is the redline.", tracked=True
)
BINDING_RANK = _define("binding_rank", "gauge", "1", "Rank whose samples bind, in a run of several.")
EXACT_GHOST_RADIUS = _define(
    "exact_ghost_radius", "gauge", "1", "Taylor convergence radius along the proposed step itself, rho*, as a length."
)
EXACT_STEP_SIZE = _define("exact_step_size", "gauge", "1", "tau / rho* of the proposed step, at most r.")
EXACT_TO_BOUND_RATIO = _define(
    "exact_to_bound_ratio", "gauge", "1", "rho* / rho_a: how many times the bound the radius is.", tracked=True
)
COMMITTED_STEP_SIZE = _define("committed_step_size", "gauge", "1", "r of the step as it was committed.")
ATTENTION_STEP_SIZE = _define(
    "attention_step_size", "gauge", "1", "Length of the proposed step over the radius of attention; 1 is the redline.",
    "layer",
)  # fmt: skip
ACTIVATION_STEP_SIZE = _define(
    "activation_step_size", "gauge", "1", "Length of the proposed step over the radius of the activation's inputs.",
    "layer",
)  # fmt: skip
BINDING_STEP_SIZE = _define(
    "binding_step_size", "gauge", "1", "The largest step size of a kind: r (output), attention or activation.",
    "radius", tracked=True,
)  # fmt: skip
STEP_SCALE = _define("step_scale", "gauge", "1", "Factor that the controllers put on the whole step; 1 is untouched.")
TANGENT_SAMPLES = _define("tangent_samples", "gauge", "1", "Samples over which r is the maximum, remembered ones too.")
BATCH_SAMPLES = _define("batch_samples", "gauge", "1", "Samples in the batch that r was measured on.")
LOSS = _define("loss", "gauge", "1", "Training loss of the last step.", tracked=True)
GRADIENT_NORM = _define("gradient_norm", "gauge", "1", "L2 norm of the gradients the optimizer was given.")
LEARNING_RATE = _define("learning_rate", "gauge", "1", "Learning rate of the parameter group.", "optimizer", "group")
WEIGHT_DECAY = _define("weight_decay", "gauge", "1", "Weight decay of the parameter group.", "optimizer", "group")
OVERHEAD_RATIO = _define("overhead_ratio", "gauge", "1", "Time spent in Redline / time of training.")
MONITORING_RATIO = _define(
    "monitoring_ratio", "gauge", "1", "Time spent in Redline, but for its controllers / time of training."
)
OVERHEAD_BUDGET_RATIO = _define(
    "overhead_budget_ratio", "gauge", "1", "Share of training time that monitoring may take; absent without a budget."
)
LAST_STEP_TIMESTAMP = _define(
    "last_step_timestamp_seconds", "gauge", "seconds", "Unix time at which the last optimizer step ended."
)
STEPS = _define("steps_total", "counter", "1", "Optimizer steps taken.")
INTERVENTIONS = _define(
    "interventions_total", "counter", "1", "Steps that a controller changed.", "controller", "action"
)
NONFINITE = _define(
    "nonfinite_total", "counter", "1", "Readings that were NaN or infinite.", "source",
    label_values=("loss", "gradient", "update", "weight"),
)  # fmt: skip
MEASUREMENTS = _define("measurements_total", "counter", "1", "Measurements made.", "monitor")
PUT_OFF = _define(
    "put_off_total", "counter", "1", "Times a measurement fell due and was put off, to keep to the overhead budget.",
    "monitor",
)  # fmt: skip
TANGENT_FALLBACKS = _define(
    "tangent_fallbacks_total", "counter", "1", "Logit tangents taken by a method below forward mode.", "method",
    label_values=METHODS[1:],
)  # fmt: skip
FOLDED_LAYERS = _define(
    "folded_layers", "gauge", "1", "Layers that are not served by name, so that the exporter keeps to its max_series."
)
FOLDED_MAX = _define(
    "folded_max", "gauge", "1", "Largest value of a per-layer metric among the folded layers of a kind.",
    "metric", "kind",
)  # fmt: skip
FOLDED_MEDIAN = _define(
    "folded_median", "gauge", "1", "Median of a per-layer metric over the folded layers of a kind.", "metric", "kind"
)
RUN_INFO = _define("run_info", "info", "1", "What is running.", "run", "version", "precision", "strategy", "world_size")
