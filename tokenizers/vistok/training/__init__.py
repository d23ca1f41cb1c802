"""Training: the Lightning module, its callbacks and a run from config to bundle."""
