"""`capfinder predict` and `evaluate`: directories of cap-signal CSV files through a model."""
