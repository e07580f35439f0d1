"""What share of the reads has each cap: as counted, and corrected for misclassification."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from capfinder.evaluation.metrics import wilson_interval

REPLICATES = 1000
SEED = 20240311  # of the replicates: the same input gives the same intervals
LEVEL = (2.5, 97.5)  # percentiles
_EM_STEPS, _EM_TOLERANCE = 2000, 1e-8
_DECIMALS = 6
_LEAST_DETERMINANT = 1e-9
_LONGEST_STEP = 1e6  # where the path is straight, its bend is 0 but for rounding

ASSUMES = (
    "Corrected shares assume that reads of each cap are of the same kind, and are mistaken for "
    "others as often, as those of the model's test set. Their intervals hold the uncertainty of "
    "the counts and of the test set's confusion matrix, and nothing else: not what another run, "
    "another chemistry or a cap that the model doesn't know would do."
)
NOT_CORRECTED = "The shares aren't corrected for misclassification"
UNKNOWN = f"{NOT_CORRECTED}: how the model's test set fared isn't known."


def counted(counts: Sequence[int]) -> list[dict[str, Any]]:
    """share and its 95 % interval (Wilson's) of each class; counts (C,) of predicted reads."""
    total = sum(counts)
    return [
        {
            "share": round(count / total, _DECIMALS),
            "interval": [round(bound, _DECIMALS) for bound in wilson_interval(count, total)],
        }
        for count in counts
    ]


def why_not(
    counts: Sequence[int], confusion: Sequence[Sequence[int]] | None, class_names: Sequence[str]
) -> str:
    """Why `corrected` can't be said of these; "": it can."""
    if confusion is None:
        return UNKNOWN
    matrix = np.asarray(confusion)
    untested = np.flatnonzero(matrix.sum(axis=1) == 0)
    if len(untested):
        return f"{NOT_CORRECTED}: the test set has no reads of {class_names[untested[0]]}."
    unseen = np.flatnonzero((matrix.sum(axis=0) == 0) & (np.asarray(counts) > 0))
    if len(unseen):
        name = class_names[unseen[0]]
        return f"{NOT_CORRECTED}: no read of the test set was taken for {name}, as reads here are."
    return ""


def corrected(counts: Sequence[int], confusion: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    """corrected and corrected_interval (95 %) of each class.

    counts: (C,) reads by predicted class, one at least. confusion: (C, C) reads of the test set,
    true class in rows. `why_not` must have nothing to say (else ValueError).
    The interval is that of replicates, each of which draws the shares of the predicted classes and
    the rows of the confusion matrix from their posterior distributions, a Dirichlet with a prior of
    one read, spread evenly over the classes.

    Source: Rubin 1981, Ann. Statist. 9, 130 (the Bayesian bootstrap); for the uncertainty of both
    samples in the corrected share, Rogan and Gladen 1978, Am. J. Epidemiol. 107, 71."""
    if problem := why_not(counts, confusion, list(map(str, range(len(counts))))):
        raise ValueError(problem)
    seen, matrix = np.asarray(counts, float), np.asarray(confusion, float)
    rows = matrix / matrix.sum(axis=1, keepdims=True)
    best = shares((seen / seen.sum())[None], rows[None])[0]
    rng = np.random.default_rng(SEED)
    prior = 1 / len(seen)
    drawn = rng.dirichlet(seen + prior, REPLICATES)
    drawn_rows = np.stack([rng.dirichlet(row + prior, REPLICATES) for row in matrix], axis=1)
    low, high = np.percentile(shares(drawn, drawn_rows), LEVEL, axis=0)
    return [
        {
            "corrected": round(float(share), _DECIMALS),
            "corrected_interval": [
                round(float(min(below, share)), _DECIMALS),
                round(float(max(above, share)), _DECIMALS),
            ],
        }
        for share, below, above in zip(best, low, high, strict=True)
    ]


def shares(seen: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """(R, C) maximum-likelihood shares of the true classes, for each of R problems.

    seen: (R, C) shares of the predicted classes; rows: (R, C, C) P(predicted | true), true class
    in rows. Where the linear equations seen = shares @ rows have a solution without negative
    shares, that is the maximum; elsewhere EM finds it.

    Source: the linear solution: Rogan and Gladen 1978, Am. J. Epidemiol. 107, 71; Forman 2008,
    Data Min. Knowl. Disc. 17, 164, section 2 (for several classes)."""
    found = np.full_like(seen, -1.0)
    is_regular = np.abs(np.linalg.det(rows)) > _LEAST_DETERMINANT
    transposed = np.swapaxes(rows[is_regular], 1, 2)
    found[is_regular] = np.linalg.solve(transposed, seen[is_regular][..., None])[..., 0]
    is_outside = (found < 0).any(axis=1)
    found[is_outside] = _by_em(seen[is_outside], rows[is_outside])
    return np.asarray(found / found.sum(axis=1, keepdims=True))


def _by_em(seen: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Mixing proportions (R, C) of known distributions `rows`, from equal ones on; two steps at a
    time, extrapolated, and taken back where the likelihood would fall.

    Source: Dempster, Laird and Rubin 1977, J. R. Stat. Soc. B 39, 1, section 4.3 (finite mixtures);
    Varadhan and Roland 2008, Scand. J. Statist. 35, 335, scheme S3 (the extrapolation)."""
    now = np.full_like(seen, 1 / seen.shape[1])
    active = np.arange(len(seen))
    for _ in range(_EM_STEPS):
        if not len(active):
            break
        before, data, table = now[active], seen[active], rows[active]
        first = _em_step(before, data, table)
        second = _em_step(first, data, table)
        change, bend = first - before, second - 2 * first + before
        length = np.linalg.norm(bend, axis=1, keepdims=True)
        step = np.linalg.norm(change, axis=1, keepdims=True) / np.maximum(length, 1e-300)
        step = np.clip(step, 1.0, _LONGEST_STEP)
        jump = before + 2 * step * change + step**2 * bend
        jump = np.where((jump < 0).any(axis=1, keepdims=True), second, jump)
        jump = _em_step(jump, data, table)
        is_worse = _likelihood(jump, data, table) < _likelihood(second, data, table)
        after = np.where(is_worse[:, None], second, jump)
        now[active] = after
        active = active[np.abs(after - before).max(axis=1) > _EM_TOLERANCE]
    return now


def _em_step(now: np.ndarray, seen: np.ndarray, rows: np.ndarray) -> np.ndarray:
    expected = np.einsum("ri,rij->rj", now, rows)
    ratio = np.divide(seen, expected, out=np.zeros_like(seen), where=expected > 0)
    after = now * np.einsum("rij,rj->ri", rows, ratio)
    return np.asarray(after / after.sum(axis=1, keepdims=True))


def _likelihood(now: np.ndarray, seen: np.ndarray, rows: np.ndarray) -> np.ndarray:
    expected = np.einsum("ri,rij->rj", now, rows)
    return np.asarray((seen * np.log(np.maximum(expected, 1e-300))).sum(axis=1))
