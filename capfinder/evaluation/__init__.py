"""How good a classifier is: figures from its logits (metrics) and a page of them (report)."""
