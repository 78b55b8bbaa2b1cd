"""``redline demo``: two small real trainings with Redline attached; its data and models also serve the examples."""
