"""Trained models as files that others open: the only importers of Keras, jax2tf and ONNX.

One module per kind of file (`keras`: .keras and .weights.h5, `saved_model`, `onnx`). Each has a
function that writes and one that loads what was written and runs it; `fresh_process` has a new
process (`reload`) do the latter, which is how `capfinder/stages/export.py` checks files before it
gives them their names. A new format is one more such module, its line in `reload.READERS`, and its
lines in the stage. `fitting` is how signals of another length than the model's are cut or padded
inside the files. `compat` says what Keras 3.4 understands, `record` what is noted of the files,
`describing` what they say of their model, `card` what the text beside them does.

The way back: `keras_archive` looks at a `.keras` file and loads it, `keras_graph` says what network
it is, `recognise` which architecture, `import_check` whether it predicts the same.
"""
