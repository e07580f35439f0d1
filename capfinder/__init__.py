"""Train a classifier of RNA caps from nanopore current."""
