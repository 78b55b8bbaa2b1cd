"""``redline doctor``: what will be measured of a model, how, and what it will cost, ahead of a run."""
