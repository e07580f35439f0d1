"""What a run ends with: of every stage what came of it, what was reused and why; the paths."""

from collections.abc import Mapping, Sequence

from capfinder import interrupts, log
from capfinder.log import logger
from capfinder.run_record import STAGES, RunRecord, SetAside


def show(
    record: RunRecord,
    *,
    seconds: float,
    asked: Sequence[str],
    ran: Mapping[str, float],
    skipped: Mapping[str, str],
    interrupted: Mapping[str, Mapping[str, int]],
    set_aside: SetAside | None,
) -> None:
    """asked: stages; ran: seconds of those that this run ran; skipped: why it left one out;
    interrupted: as in run.json."""
    log.table(
        f"Finished in {log.format_seconds(seconds)}",
        ("stage", "time", "outcome", "why"),
        [row(record, stage, asked=asked, ran=ran, skipped=skipped) for stage in STAGES],
        left=(0, 2, 3),
    )
    if set_aside is not None:
        logger.info("%s", set_aside)
    for sentence in interrupts.sentences(interrupted):
        logger.warning("%s A rerun goes on with it.", sentence)
    _show_paths(record)


def row(
    record: RunRecord,
    stage: str,
    *,
    asked: Sequence[str],
    ran: Mapping[str, float],
    skipped: Mapping[str, str],
) -> tuple[str, str, str, str]:
    """stage, time, outcome, why."""
    noted = record.stage(stage)
    outcome, done = noted.get("summary", ""), f"done {noted.get('finished')}" if noted else ""
    if stage in ran:
        return stage, log.format_seconds(ran[stage]), outcome, noted["why"]
    if stage not in asked:
        return stage, "-", outcome, ", ".join(filter(None, ("not asked for", done)))
    if stage in skipped:
        return stage, "-", "", skipped[stage]
    return stage, "earlier", outcome, f"reused: {done or 'it was there'}"


def _show_paths(record: RunRecord) -> None:
    output_dir = record.output_dir
    paths = {
        "model": next(iter(sorted(output_dir.glob("best_model/classifier/*.keras"))), None),
        "weights": output_dir / "best_model" / "best_model_weights.weights.h5",
        "report": output_dir / "report.html",
        "metrics": output_dir / "evaluation" / "metrics.json",
        "dataset": output_dir / record.values["dataset"]["directory"],
        "log": log.file_path(),
    }
    for name, path in paths.items():
        if path is not None and path.exists():
            logger.info("%-8s %s", name, path)
