"""The text of model_card.md: what a model takes and gives, what it is worth, how it is used.

What is told comes from a `.keras` file's metadata, which anybody may have written: a part that
isn't as it should be is left out, as one that isn't known is."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from capfinder import models
from capfinder.allowed import is_count
from capfinder.exporting.card import known, snippets, untrusted
from capfinder.exporting.card.markdown import (
    cell,
    listed,
    numbered,
    prose,
    python,
    section,
    table,
    verbatim,
)
from capfinder.exporting.keras import PROBABILITIES, SIGNAL

MOST_NAMED = 20  # classes: of more the first sentence names none
FILES = {
    "keras": "the model for Keras 3.4 or newer, on JAX, TensorFlow or PyTorch",
    "h5": "its weights alone",
    "saved_model": "the model for TensorFlow",
    "onnx": "the model for ONNX Runtime and others that read ONNX",
}
STARTED_FROM = {
    ("new_head", True): "Its last layer is new, as it tells other classes apart.",
    ("new_head", False): "Its last layer was kept.",
    ("freeze", "trunk"): "Only the dense layers at its end were trained on.",
    ("freeze", "nothing"): "All of it was trained on.",
}


def text(about: Mapping[str, Any], exports: Sequence[Mapping[str, Any]]) -> str:
    """The card, in Markdown; the same for equal arguments.

    about: as in the `.keras` file: capfinder_version, model_type, hyperparameters, class_names,
    preprocessing {signal, fitting, target_length, input_length}, weights_sha256; besides, where
    they are known, num_parameters, dtype of the weights, and facts as `evaluation.facts.Facts`,
    whose dataset may also have the manifest's counts, sources, warnings and settings' group_by.
    exports: of each file: name, as in export_params.formats; file, its path from where the card
    lies; max_abs_difference; opset of ONNX."""
    facts, names = untrusted.part(about, "facts"), untrusted.texts(about, "class_names")
    sections = (
        "\n\n".join(_summary(facts, names)),
        section("Which output is which cap", [_outputs(names)]),
        section("What it takes", _input(about, names)),
        section("How to use it", _use(exports)),
        section("How good it is", known.figures(facts, names)),
        section("What to be wary of", [listed(known.limits(facts))]),
        section("What it was trained on", known.data(facts, names)),
        section("How it came about", _origin(about, facts)),
        section("What it is", _architecture(about)),
        section("Files", _files(exports)),
    )
    return "\n\n".join(each for each in sections if each) + "\n"


def _summary(facts: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    which = f": {', '.join(map(verbatim, names))}" if 0 < len(names) <= MOST_NAMED else ""
    blocks = [
        "# A classifier of RNA caps",
        "From the current of a nanopore while the 5' end of an RNA molecule passes, it says how "
        f"probable each cap is{which}.",
    ]
    if accuracy := known.accuracy(facts):
        blocks.append(f"It is right on {accuracy}.")
    if known.is_simulated(facts):
        blocks.append("**It was trained on SIMULATED reads and isn't fit for real ones.**")
    return blocks


def _outputs(names: Sequence[str]) -> str:
    return table(("output", "cap"), [(index, cell(name)) for index, name in enumerate(names)])


def _input(about: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    given = untrusted.part(about, "preprocessing")
    target = given.get("target_length")
    length = given.get("input_length") or target
    if not is_count(length) or not is_count(target):
        return []
    dtype = "float64" if about.get("dtype") == "float64" else "float32"
    signal, fitting = (prose(untrusted.text(given, name)) for name in ("signal", "fitting"))
    steps = [f"One signal for each read: {signal}."] if signal else []
    steps += [
        "Its samples stay in the order in which they were measured.",
        f"It is brought to {length:,} samples{f' ({fitting})' if fitting else ''}.",
    ]
    if length != target:
        steps.append(f"The model then brings it to {target:,} samples in the same way, by itself.")
    return [
        numbered(steps),
        f"The model takes `(reads, {length}, 1)` numbers of type {dtype}, named `{SIGNAL}`, and "
        f"gives `(reads, {len(names) or 'caps'})` probabilities, named `{PROBABILITIES}`; those of "
        "a read add up to 1.",
        "The signals that Capfinder's signal extraction writes to CSV files (`timeseries`) are "
        "scaled and cut out already: for them `fit` alone is needed.",
        python(snippets.prepare(length=length, dtype=dtype, names=names)),
    ]


def _use(exports: Sequence[Mapping[str, Any]]) -> list[str]:
    paths = {row["name"]: row["file"] for row in exports}
    used = [
        block
        for name, (title, source) in snippets.USE.items()
        if name in paths
        for block in (f"### {title}", python(source(paths[name])))
    ]
    if used:
        used.insert(0, "Go on from the code above, in the directory of this card.")
    if "keras" in paths and "h5" in paths:
        used += [
            "### The weights alone",
            "They go into a model with the same layers, such as this one.",
            python(snippets.load_weights(paths["keras"], paths["h5"])),
        ]
    return used


def _origin(about: Mapping[str, Any], facts: Mapping[str, Any]) -> list[str]:
    start = untrusted.part(facts, "init_from")
    written = known.rows(about, "written by", ("capfinder_version", "weights_sha256"))
    if not start:
        from_scratch = "It was trained from scratch, from random weights."
        return [from_scratch if untrusted.part(facts, "dataset") else "", written]
    details = [said for (key, value), said in STARTED_FROM.items() if start.get(key) == value]
    caps = ", ".join(map(verbatim, untrusted.texts(start, "class_names")))
    return [
        " ".join(["It was fine-tuned: training started from another model's weights.", *details]),
        known.rows(start, "started from", ("path", "weights_sha256")),
        f"That model tells apart {caps}." if caps else "",
        written,
    ]


def _architecture(about: Mapping[str, Any]) -> list[str]:
    model_type, parameters = untrusted.text(about, "model_type"), about.get("num_parameters")
    blocks, meanings = [], {}
    if model_type in models.ARCHITECTURES:
        module = models.architecture(model_type)
        fields = dataclasses.fields(module.Hyperparameters)
        meanings = {field.name: field.metadata["meaning"] for field in fields}
        blocks.append((module.__doc__ or "").split("\n")[0])
    rows = [
        (cell(name), cell(untrusted.plain(value)), meanings.get(name, ""))
        for name, value in untrusted.part(about, "hyperparameters").items()
        if untrusted.plain(value)
    ]
    facts = [("architecture", cell(model_type))] if model_type else []
    if is_count(parameters):
        facts.append(("parameters", f"{parameters:,}"))
    columns = ("hyperparameter", "value", "meaning")
    return [*blocks, table(("model", ""), facts), table(columns, rows)]


def _files(exports: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = [
        (
            cell(row["file"]),
            FILES[row["name"]] + (f" (opset {row['opset']})" if "opset" in row else ""),
            f"{row['max_abs_difference']:.1e}",
        )
        for row in exports
    ]
    labels = (cell("labels.json"), "which output is which cap", "-")
    return [
        "Each model was loaded again and run on test signals before its file got its name. The "
        "last column is the largest difference of a probability from the trained model's.",
        table(("file", "what it is", "difference"), [*rows, labels]),
    ]
