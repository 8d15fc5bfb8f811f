"""Training without Ray: the recipe, one training step, a whole trial."""
