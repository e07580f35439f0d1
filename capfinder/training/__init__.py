"""Training: one pure step, the epochs around it, learning rates, precision and checkpoints.

Knows no model by name and no path but its checkpoints'; a stage hands in `apply_fn` and batches."""
