"""The figures that rules go by, each with its origin."""

NEAR = 0.5
"""r from which a step is called near the redline. Redline's choice: half of what the bound allows."""

OVER = 1.0
"""r from which a step is over the redline. Theory's: beyond the radius cross-entropy's Taylor series along the step
need not converge (arXiv 2603.13552, theorem 4.3)."""

ENOUGH_MEASUREMENTS = 10
"""Measurements of r below which no pattern is read into them. Redline's choice."""

START = 0.1
"""Share of the run that counts as its start. Redline's choice: warm-ups are a few percent of a run to a tenth of it."""

LATE = 0.5
"""Share of the run after which its late part begins. Redline's choice."""

SPIKES = 0.05
"""Share of measurements up to which steps over the redline are single spikes. Redline's choice."""

THROUGHOUT = 0.2
"""Share of measurements from which, spread over the run, the rate itself is too high. Redline's choice."""

FEW_SAMPLES = 0.125
"""Share of the batch below which r is a rough estimate from below. Redline's choice: on a quarter of the batch it was
0.84 of the whole batch's in the median, and 0.48 at worst."""

ROUGH_NEAR = 0.25
"""Highest r from which a rough estimate matters. Redline's choice: at worst the estimate was half of the real r, and r
is near the redline from 0.5 on."""

GROWTH = 3.0
"""Times that a layer's sigma_1 grew over the run before it is looked at. Redline's choice."""

GROWTH_AMONG_LAYERS = 4.0
"""Times the median layer's growth, and the median layer's spectral condition, that such a layer has to exceed to stand
out. Redline's choice: a layer that started small and comes up to the others is healthy, and so was a language model's
head that had grown 3 times as much as the median."""

TABLES = ("embed", "position", "pos_emb", "token", "wte", "wpe")
"""Parts of names by which tables of tokens and positions are known: these start small, and their rows come to share a
mean, in healthy runs too. Redline's choice."""

ENOUGH_LAYERS = 3
"""Layers below which none is said to stand out. Redline's choice."""

HARD_PUSH = 1.0
"""sigma_1 of an update over sigma_1 of its matrix from which it is too hard. UpdateClamp's limit: no healthy step
pushes a matrix harder than it is strong, but for those that start at or near zero; so the start is left out."""

COLLAPSED_RANK = 1.5
"""Stable rank below which one direction has taken over a matrix. Redline's choice; 1 is a matrix of rank one."""

COLLAPSE = 2.0
"""Times that the stable rank has to have fallen. Redline's choice: matrices that started low have not collapsed."""

LOSS_RISE = 1.2
"""Median loss of the run's last tenth over that of its best tenth from which it is going up. Redline's choice."""

LOSS_RISE_OF_FALL = 0.1
"""Share of the loss's fall that such a rise has to have undone. Redline's choice: near zero a loss doubles easily."""

CARRIED = 0.25
"""Share of steps from which a clamp carries the run. Redline's choice."""

ENOUGH_INTERVENTIONS = 10
"""Interventions below which a clamp is not said to carry a run. Redline's choice."""

REPEATED = 3
"""Times from which batches withheld or steps rejected are no accident. Redline's choice."""

OFTEN_REJECTED = 0.01
"""Share of steps from which, repeated, that is bad. Redline's choice."""

OVERHEAD = 0.05
"""Share of training time that monitoring may take where no budget is given. Redline's choice."""

OVER_BUDGET = 1.25
"""Times its budget that monitoring may have taken: it is kept to the cost of one step. Redline's choice."""

SETTLED_STEPS = 100
"""Steps below which neither overhead nor the loss's course is judged: the first measurements cost most, and a tenth of
so few losses is noise. Redline's choice."""
