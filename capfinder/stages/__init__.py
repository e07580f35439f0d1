"""The five stages: each a function of a config and of what lies on disk."""
