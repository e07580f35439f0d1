"""What model_card.md says of a model's worth: how its test went, on what it was trained."""

from collections.abc import Mapping, Sequence
from typing import Any

from capfinder.allowed import is_count, is_count_matrix, is_number
from capfinder.exporting.card import untrusted
from capfinder.exporting.card.markdown import cell, prose, table

MOST_IN_MATRIX = 20  # classes: of more no confusion matrix is shown
SPLITS = ("train", "validation", "test")
BASELINES = {
    "nearest_centroid_accuracy": "naming the cap whose mean signal is nearest",
    "majority_accuracy": "always naming the commonest cap",
}
SIGNAL_FIGURES = {
    "mean": "mean",
    "spread": "spread",
    "length": "length",
    "between_reads": "between reads",
}
KNOWS_NO_OTHERS = (
    "It knows no caps but these: a read with another cap, or with none, is called one of them all "
    "the same, and may be given a high probability."
)
OF_THE_SAME_KIND = (
    "What is said above holds for reads like those that it was trained on. Another pore, "
    "chemistry, sampling rate, basecaller or adapter changes the signal: try it on reads whose cap "
    "you know first."
)
PREPARED_OTHERWISE = (
    "It can't tell that a signal was prepared in another way. Picoamperes, or z-scores of the cap "
    "region alone, give wrong caps and no error."
)
RARE_CAPS = (
    "Precision depends on how common each cap is. Where one is rarer than in the test set, more of "
    "the reads that are called so are mistakes."
)
SAME_RUNS = (
    "Its test reads are of the same sequencing runs as its training reads; on a new run it may do "
    "worse."
)
MAYBE_SIMULATED = "Whether its reads were real or simulated isn't noted here."


def accuracy(facts: Mapping[str, Any]) -> str:
    """'93.1% of 2,000 test reads, which it had never seen (95% interval: 92.0% to 94.1%)'; "" when
    it isn't known."""
    test = untrusted.part(facts, "test")
    share, count = test.get("accuracy"), test.get("num_examples")
    if not untrusted.is_share(share):
        return ""
    reads = f"{count:,} test reads" if is_count(count) else "the test reads"
    said = f"{share:.1%} of {reads}, which it had never seen"
    interval = untrusted.shares(test, "accuracy_interval")
    if len(interval) == 2:
        said += f" (95% interval: {interval[0]:.1%} to {interval[1]:.1%})"
    return said


def figures(facts: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    test, baselines = untrusted.part(facts, "test"), untrusted.part(facts, "baselines")
    known = accuracy(facts)
    if not known:
        return ["That isn't known. Try it on reads whose cap you know before you rely on it."]
    shares = [
        ("this model", test.get("accuracy")),
        ("it, every cap counted alike", test.get("balanced_accuracy")),
        *((said, baselines.get(key)) for key, said in BASELINES.items()),
    ]
    rows = [(said, f"{share:.1%}") for said, share in shares if untrusted.is_share(share)]
    matrix = test.get("confusion_matrix")
    confusion = _confusion(matrix, names) if names and is_count_matrix(matrix, len(names)) else []
    return [f"It is right on {known}.", table(("who answers", "right"), rows), *confusion]


def _confusion(matrix: Sequence[Sequence[int]], names: Sequence[str]) -> list[str]:
    called = [sum(column) for column in zip(*matrix, strict=True)]
    per_class = [
        (
            cell(name),
            _share(row[index], sum(row)),
            _share(row[index], called[index]),
            f"{sum(row):,}",
        )
        for index, (name, row) in enumerate(zip(names, matrix, strict=True))
    ]
    blocks = [
        "Recall: of the test reads with this cap, how many are called so. Precision: of those "
        "called so, how many have it.",
        table(("cap", "recall", "precision", "test reads"), per_class),
    ]
    if len(names) > MOST_IN_MATRIX:
        return blocks
    rows = [
        (cell(name), *(f"{count:,}" for count in row))
        for name, row in zip(names, matrix, strict=True)
    ]
    columns = ("true cap", *(f"called {cell(name)}" for name in names))
    return [*blocks, "How many test reads of each cap are called what:", table(columns, rows)]


def limits(facts: Mapping[str, Any]) -> list[str]:
    dataset = untrusted.part(facts, "dataset")
    said = [KNOWS_NO_OTHERS, OF_THE_SAME_KIND, PREPARED_OTHERWISE]
    if accuracy(facts):
        said.append(RARE_CAPS)
    if untrusted.text(dataset, "group_by") in ("read", "parent_read"):
        said.append(SAME_RUNS)
    if "warnings" not in dataset:
        said.append(MAYBE_SIMULATED)
    return said + [f"{prose(warning)}." for warning in untrusted.texts(dataset, "warnings")]


def is_simulated(facts: Mapping[str, Any]) -> bool:
    warnings = untrusted.texts(untrusted.part(facts, "dataset"), "warnings")
    return any("SIMULATED" in warning for warning in warnings)


def data(facts: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    dataset = untrusted.part(facts, "dataset")
    counts = [untrusted.part(untrusted.part(dataset, "counts"), split) for split in SPLITS]
    reads = [
        (cell(name), *(_count(of_split.get(str(index))) for of_split in counts))
        for index, name in enumerate(names)
        if any(counts)
    ]
    sources = [
        (
            cell(untrusted.text(source, "file")),
            _cap(source.get("dataset_class"), names),
            _count(source.get("chosen")),
        )
        for source in untrusted.parts(dataset, "sources")
    ]
    return [
        rows(dataset, "dataset", ("version", "fingerprint", "group_by")),
        table(("reads of", *SPLITS), reads),
        table(("file", "cap", "reads used"), sources),
        *_signals(untrusted.part(facts, "signals"), names),
    ]


def _signals(profile: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """profile: as `evaluation.likeness.profile`."""
    rows = [
        (
            _cap(row.get("cap_class"), names),
            *(_count(row.get(figure)) for figure in ("runs", "reads")),
            *(_figure(row.get(figure)) for figure in SIGNAL_FIGURES),
        )
        for row in untrusted.parts(profile, "classes")
    ]
    if not rows:
        return []
    between = untrusted.part(profile, "between_runs_sd")
    if between:
        differ = (_figure(between.get(figure)) for figure in SIGNAL_FIGURES)
        rows.append(("between runs", "", "", *differ))
    return [
        "Its training signals, in z-scores: mean; spread within a read; length before it is "
        "fitted, in samples; standard deviation of the reads' means. Signals of another kind show "
        "by other figures.",
        table(("signals of", "runs", "reads", *SIGNAL_FIGURES.values()), rows),
    ]


def rows(values: Mapping[str, Any], title: str, names: Sequence[str]) -> str:
    """A table of the texts that there are."""
    rows = [
        (name.replace("_", " "), cell(untrusted.text(values, name)))
        for name in names
        if untrusted.text(values, name)
    ]
    return table((title, ""), rows)


def _cap(number: object, names: Sequence[str]) -> str:
    if is_count(number) and number < len(names):
        return cell(names[number])
    return "-"


def _count(value: object) -> str:
    return f"{value:,}" if is_count(value) else "-"


def _figure(value: object) -> str:
    return untrusted.plain(value) if is_number(value) else "-"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"
