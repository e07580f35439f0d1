"""From CSV files to the dataset, and from the dataset to batches."""
