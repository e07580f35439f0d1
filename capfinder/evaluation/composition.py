"""What share of the reads has each cap: as counted, and corrected for misclassification."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from capfinder.evaluation.metrics import wilson_interval

REPLICATES = 1000
# An interval takes 0.2 s of 10 classes, 0.7 of 20, 80 the same, 4 of 200, 17 of 300 (one core), as
# many classes get fewer replicates: with all of them it would be 3, 40 and 170 s of the last three.
_REPLICATED_CLASSES, _LEAST_REPLICATES = 20_000, 100
MOST_CLASSES = 300  # that are corrected
_ALWAYS_CORRECTED = 10  # classes, whatever the number of files
_MOST_WORK = 50_000_000  # replicates * classes**2 of all files: one to two minutes
SEED = 20240311  # of the replicates: the same input gives the same intervals
LEVEL = (2.5, 97.5)  # percentiles
_DECIMALS = 6
# Of the search for shares: most take 15 steps.
_MOST_STEPS, _PRECISION = 100, 1e-10  # of the logarithm of the likelihood, a read's
_SHRINK, _NEAR_THE_EDGE = 0.1, 0.99
_TINY = 1e-300

ASSUMES = (
    "Corrected shares assume that reads of each cap are of the same kind, and are mistaken for "
    "others as often, as those of the model's test set. Their intervals hold the uncertainty of "
    "the counts and of the test set's confusion matrix, and nothing else: not what another run, "
    "another chemistry or a cap that the model doesn't know would do."
)
NOT_CORRECTED = "The shares aren't corrected for misclassification"
LEFT_OUT = f"{NOT_CORRECTED}: of so many files and classes that would take too long."
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


def replicates(num_classes: int) -> int:
    return min(REPLICATES, max(_LEAST_REPLICATES, _REPLICATED_CLASSES // num_classes))


def most_files(num_classes: int) -> int | None:
    """How many files are corrected one by one, in an acceptable time; None: all."""
    if num_classes <= _ALWAYS_CORRECTED:
        return None
    return _MOST_WORK // (replicates(num_classes) * num_classes**2)


def why_not(
    counts: Sequence[int], confusion: Sequence[Sequence[int]] | None, class_names: Sequence[str]
) -> str:
    """Why `corrected` can't be said of these; "": it can."""
    if confusion is None:
        return UNKNOWN
    if len(class_names) > MOST_CLASSES:
        return f"{NOT_CORRECTED}: of more than {MOST_CLASSES} classes that would take too long."
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
    count = replicates(len(seen))
    drawn = rng.dirichlet(seen + prior, count)
    drawn_rows = np.stack([rng.dirichlet(row + prior, count) for row in matrix], axis=1)
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
    shares, that is the maximum (Rogan and Gladen's estimate, for several classes). Where several
    are as likely, it is one in their middle.

    What is found are the x >= 0 with the least sum(x) - sum(seen * log(x @ rows)), which add up to
    1 of themselves: by Newton steps on x * z = mu, z the gradient, with ever smaller mu.

    Source: the form without a constraint: Kim, Carbonetto, Stephens and Anitescu 2020, J. Comput.
    Graph. Stat. 29, 261; the steps: Wright 1997, Primal-Dual Interior-Point Methods, chapter 1."""
    classes = seen.shape[1]
    x, z = np.full_like(seen, 1 / classes), np.ones_like(seen)
    diagonal = np.arange(classes)
    for _ in range(_MOST_STEPS):
        expected = np.maximum(np.einsum("ri,rij->rj", x, rows), _TINY)
        ratio = seen / expected
        gradient = 1 - np.einsum("rij,rj->ri", rows, ratio)
        gap = (x * z).sum(axis=1)
        if max(gap.max(initial=0), np.abs(gradient - z).max(initial=0)) < _PRECISION:
            break
        target = _SHRINK * gap[:, None] / classes / x
        scaled = rows * np.sqrt(ratio / expected)[:, None]
        curvature = scaled @ scaled.transpose(0, 2, 1)
        curvature[:, diagonal, diagonal] += z / x
        step = np.linalg.solve(curvature, (target - gradient)[..., None])[..., 0]
        other = target - z - z / x * step
        x = x + _share_of_step(x, step) * step
        z = z + _share_of_step(z, other) * other
    return np.asarray(x / x.sum(axis=1, keepdims=True))


def _share_of_step(values: np.ndarray, step: np.ndarray) -> np.ndarray:
    """(R, 1): as much of each row's step as leaves its values above 0, at most all of it."""
    limits = np.divide(-values, step, out=np.full_like(step, np.inf), where=step < 0)
    return np.minimum(1, _NEAR_THE_EDGE * limits.min(axis=1, keepdims=True))
