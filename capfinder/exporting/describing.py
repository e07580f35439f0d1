"""What an exported file says of its model: the metadata of `.keras` and ONNX files."""

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any


def about(
    twin: Mapping[str, Any],
    *,
    num_parameters: int,
    class_names: Sequence[str],
    class_map: Mapping[str, int],
    weights_sha256: str,
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """What a reader of the file must know, and what tells one model from another, as JSON gives it
    back.

    twin: arguments of `keras.build_twin`. class_names: by index in the output. class_map: class
    number in files -> the model's. facts: as `evaluation.facts.Facts` in JSON."""
    values = {
        "capfinder_version": version("capfinder"),
        "model_type": twin["model_type"],
        "hyperparameters": twin["hyperparameters"],
        "num_parameters": num_parameters,
        "dtype": twin["dtype"],
        "class_names": list(class_names),
        "class_map": dict(class_map),
        "preprocessing": {
            "signal": "current of the cap region, z-scored over the whole read, clipped to ±4",
            "target_length": twin["target_length"],
            "input_length": twin["input_length"],
            "fitting": "centred zero padding or truncation; an odd sample goes to, or comes off, "
            "the right",
        },
        "weights_sha256": weights_sha256,
        "facts": dict(facts),
    }
    as_read_back: dict[str, Any] = json.loads(json.dumps(values))
    return as_read_back
