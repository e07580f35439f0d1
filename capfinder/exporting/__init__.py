"""Trained models as files that others open: the only importers of Keras and jax2tf.

One module per kind of file (`keras`: .keras and .weights.h5, `saved_model`). Each has a function
that writes and one that reloads what was written and runs it, which is how
`capfinder/stages/export.py` checks a file before it gives it its name. A new format is one more
such module and one more line there; whatever changes the model's input for a reader (a crop, a
padding) belongs in `keras.build_twin`. `compat` says what Keras 3.4 understands.
"""
