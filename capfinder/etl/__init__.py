"""From CSV files to the shards of a dataset: read, check, choose, split, parse, write."""
