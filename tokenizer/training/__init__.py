"""Training without Ray: one update, the recipe, a whole trial."""
