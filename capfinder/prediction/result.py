"""composition.json and what is shown at the terminal: which shares the caps have, and what to be
wary of."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from capfinder import log
from capfinder.evaluation import composition, likeness
from capfinder.evaluation.facts import Facts
from capfinder.log import logger
from capfinder.prediction.tally import FileTally

ALL = "all files"
MOST_FILES = 40  # shown at the terminal
MOST_CLASSES = 8  # shown for each file
MOST_UNSURE = 0.5  # width of an interval beyond which it is shown instead of the share


def compose(
    names: Sequence[str], tallies: Sequence[FileTally], class_names: Sequence[str], facts: Facts
) -> dict[str, Any]:
    """The part of composition.json that tells of the reads. names: of the files, one a tally."""
    confusion = facts.test["confusion_matrix"] if facts.test else None
    most = composition.most_files(len(class_names))
    files = [
        {
            "file": name,
            **_part(
                tally.counts,
                tally.confidence,
                tally.rejects,
                class_names,
                confusion,
                is_left_out=most is not None and number >= most,
            ),
        }
        | {"signals": tally.signals()}
        for number, (name, tally) in enumerate(zip(names, tallies, strict=True))
    ]
    counts = np.sum([tally.counts for tally in tallies], axis=0)
    whole = _part(
        counts,
        np.sum([tally.confidence for tally in tallies], axis=0),
        sum((tally.rejects for tally in tallies), Counter()),
        class_names,
        confusion,
    )
    problem = composition.why_not(counts.tolist(), confusion, class_names)
    return {
        "class_names": list(class_names),
        "correction": problem or composition.ASSUMES,
        "all": whole,
        "files": files,
        "warnings": [*_given_twice(names, tallies), *_warnings(facts, files)],
    }


def _part(
    counts: np.ndarray,
    confidence: np.ndarray,
    rejects: Counter[str],
    class_names: Sequence[str],
    confusion: Sequence[Sequence[int]] | None,
    *,
    is_left_out: bool = False,
) -> dict[str, Any]:
    """Reads of a file or of all: how many, and of each cap the shares.

    is_left_out: correcting them would take too long."""
    found: dict[str, Any] = {}
    reads = int(counts.sum())
    caps: list[dict[str, Any]] = []
    if reads:
        caps = [
            {"cap_class": number, "cap": name, "reads": int(count), **share}
            for number, (name, count, share) in enumerate(
                zip(class_names, counts, composition.counted(counts.tolist()), strict=True)
            )
        ]
        for cap, certainty in zip(caps, confidence.tolist(), strict=True):
            cap["mean_confidence"] = round(certainty / cap["reads"], 6) if cap["reads"] else None
        if confusion and not composition.why_not(counts.tolist(), confusion, class_names):
            if is_left_out:
                shares = [dict.fromkeys(("corrected", "corrected_interval"))] * len(caps)
                found["correction"] = composition.LEFT_OUT
            else:
                shares = composition.corrected(counts.tolist(), confusion)
            for cap, more in zip(caps, shares, strict=True):
                cap |= more
    return {
        "reads": reads,
        "mean_confidence": round(float(confidence.sum()) / reads, 6) if reads else None,
        "rejects": dict(sorted(rejects.items())),
        **found,
        "caps": caps,
    }


def _given_twice(names: Sequence[str], tallies: Sequence[FileTally]) -> list[str]:
    """What to say of files with the very same read_ids, or with one name packed and not."""
    groups: dict[tuple[int, int], list[str]] = {}
    for name, tally in zip(names, tallies, strict=True):
        if tally.reads:
            groups.setdefault((tally.reads, tally.ids), []).append(name)
    copies = {key: group for key, group in groups.items() if len(group) > 1}
    said = {name for group in copies.values() for name in group}
    packed = [name for name in names if name.lower().endswith(".gz") and name not in said]
    return [
        *(
            f"{', '.join(group)}: hold the same {reads:,} read_ids. All are counted: these reads "
            f"weigh {len(group)} times as much in the shares, and intervals are too narrow. Leave "
            "one of the files."
            for (reads, _), group in copies.items()
        ),
        *(
            f"{name[:-3]}, {name}: may be one file, packed and not. Both are counted: reads that "
            "are in both weigh twice as much in the shares. Leave one if they are copies."
            for name in packed
            if name[:-3] in names
        ),
    ]


def _warnings(facts: Facts, files: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = [
        {**part["signals"], "file": part["file"], "reads": part["reads"]}
        | {"length": part["signals"]["length"]["mean"]}
        for part in files
        if part["signals"]
    ]
    if len(rows) > 1:
        rows.append(likeness.pooled(rows, name=ALL))
    return likeness.warnings(facts.signals, rows)


def show(found: Mapping[str, Any]) -> None:
    """The tables of composition.json, and its warnings."""
    whole = found["all"]
    is_corrected = "corrected" in whole["caps"][0]
    columns = ["predicted cap", "reads", "share", "95 % interval"]
    columns += ["corrected", "95 % interval"] if is_corrected else []
    rows = [
        [
            cap["cap"],
            f"{cap['reads']:,}",
            *_share(cap, "share", "interval"),
            *(_share(cap, "corrected", "corrected_interval") if is_corrected else ()),
            _percent(cap["mean_confidence"]),
        ]
        for cap in whole["caps"]
    ]
    blank = ["100.0%", "", *(["100.0%", ""] if is_corrected else [])]
    rows.append(["all", f"{whole['reads']:,}", *blank, _percent(whole["mean_confidence"])])
    log.table("Composition", [*columns, "mean confidence"], rows)
    _show_files(found)
    _show_rejects(whole)
    if not is_corrected:
        logger.info("%s", found["correction"])
    if left_out := sum("correction" in part for part in found["files"]):
        logger.info("%d of %d files: %s", left_out, len(found["files"]), composition.LEFT_OUT)
    for warning in found["warnings"]:
        logger.warning("Note: %s", warning)


def _show_files(found: Mapping[str, Any]) -> None:
    files, names = found["files"], found["class_names"]
    if len(files) == 1 or len(names) > MOST_CLASSES:
        return
    with_reads = [part for part in files if part["caps"]]
    is_corrected = all(part["caps"][0].get("corrected") is not None for part in with_reads)
    kind = "corrected" if is_corrected else "share"
    rows = [
        [
            part["file"],
            f"{part['reads']:,}",
            *([_share_of_file(cap, kind) for cap in part["caps"]] or ["-"] * len(names)),
            _percent(part["mean_confidence"]),
        ]
        for part in files[:MOST_FILES]
    ]
    title = f"Shares by file, {'corrected' if kind == 'corrected' else 'as counted'}"
    log.table(title, ["file", "reads", *names, "mean confidence"], rows)
    if any(" to " in cell for row in rows for cell in row[2:]):
        logger.info(
            "A range (26%% to 100%%) stands for a share that is hardly known: its 95 %% interval, "
            "wider than %.0f%%; the others' intervals are in composition.json",
            100 * MOST_UNSURE,
        )
    if len(files) > MOST_FILES:
        logger.info("The other %d files are in composition.json", len(files) - MOST_FILES)


def _share_of_file(cap: Mapping[str, Any], kind: str) -> str:
    """A share that is hardly known is no number to read on its own."""
    low, high = cap["corrected_interval" if kind == "corrected" else "interval"]
    if high - low > MOST_UNSURE:
        return f"{low:.0%} to {high:.0%}"
    return _percent(cap[kind])


def _show_rejects(whole: Mapping[str, Any]) -> None:
    rejects = Counter(whole["rejects"])
    if not rejects:
        return
    total = rejects.total() + whole["reads"]
    log.table(
        f"Rejects: {rejects.total():,} of {total:,} rows",
        ("reason", "rows", "share"),
        [
            (reason, f"{count:,}", _percent(count / total))
            for reason, count in rejects.most_common()
        ],
    )


def _share(cap: Mapping[str, Any], name: str, interval: str) -> tuple[str, str]:
    low, high = cap[interval]
    return _percent(cap[name]), f"{low:.1%} to {high:.1%}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
