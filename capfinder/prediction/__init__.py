"""`capfinder predict`: a directory of cap-signal CSV files through a trained model."""
