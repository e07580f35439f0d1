"""`capfinder inspect`: what a dataset version holds, where it came from, whether it is whole."""
