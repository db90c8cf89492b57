"""Calibrate each class's probabilities, and find the threshold with the highest expected F1.

Beta calibration (Kull, Silva Filho and Flach 2017): logit q = a + b log p - c log(1 - p), fitted per class. All classes
share a normal prior whose mean and covariance are estimated from them (empirical Bayes). So a class with few positives
leans on the others, and one with many on itself. Where the labels of many samples disagree with this form, q follows
them (local likelihood, Loader 1996). Expected F1 is highest if exactly the samples with q >= F* / 2 are predicted,
where F* is that highest F1 (Lipton, Elkan and Narayanaswamy 2014).
"""

import numpy as np
from scipy.special import expit, logit

N_BINS, LIMIT = 1024, 16  # of the logit: all that follows works on counts per bin, whatever the number of samples
EDGES = np.linspace(-LIMIT, LIMIT, N_BINS, endpoint=False)
CENTRES = EDGES + LIMIT / N_BINS
# 1, log p, -log(1 - p): (3, n_bins)
FEATURES = np.stack([np.ones(N_BINS), -np.logaddexp(0, -CENTRES), np.logaddexp(0, CENTRES)])
IDENTITY = np.array([0.0, 1.0, 1.0])  # a, b, c for probabilities that are already calibrated
ROUNDS = 10  # of estimating the prior; the scores are the same after 5 or 30
WIDTH, PRECISION, LARGEST = 1.0, 5.0, 3.0  # of the local offsets, in the logit


def logit_counts(targets: np.ndarray, probs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Count each class's positive samples, and all samples, per bin of the logit: two arrays (n_classes, n_bins)."""
    counts = []
    for target, prob in zip(targets.T, probs.T, strict=True):
        logits = np.clip(logit(prob.astype(np.float64)), -LIMIT, EDGES[-1])  # 0 and 1 are infinite
        bins = ((logits + LIMIT) * (N_BINS / (2 * LIMIT))).astype(np.int64)
        counts.append([np.bincount(bins[target], minlength=N_BINS), np.bincount(bins, minlength=N_BINS)])
    return tuple(np.moveaxis(np.array(counts, dtype=np.float64), 1, 0))


def log_posterior(
    coefs: np.ndarray, positives: np.ndarray, everything: np.ndarray, mean: np.ndarray, precision: np.ndarray
) -> np.ndarray:
    """Return the log likelihood of each class's coefficients plus their log prior, (n_classes,)."""
    logits, off = coefs @ FEATURES, coefs - mean
    return (positives * logits - everything * np.logaddexp(0, logits)).sum(axis=1) - ((off @ precision) * off).sum(
        axis=1
    ) / 2


def newton_step(
    coefs: np.ndarray, positives: np.ndarray, everything: np.ndarray, mean: np.ndarray, precision: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return better coefficients (n_classes, 3) and their covariances (n_classes, 3, 3); halve steps that overshoot."""
    q = expit(coefs @ FEATURES)
    gradient = (positives - everything * q) @ FEATURES.T - (coefs - mean) @ precision
    products = np.einsum("ib,jb->bij", FEATURES, FEATURES).reshape(N_BINS, -1)
    hessian = ((everything * q * (1 - q)) @ products).reshape(-1, 3, 3) + precision
    step = np.linalg.solve(hessian, gradient[:, :, None])[:, :, 0]
    before = log_posterior(coefs, positives, everything, mean, precision)
    for halvings in range(30):
        worse = log_posterior(coefs + step, positives, everything, mean, precision) < before
        if not worse.any():
            break
        step[worse] *= 0.5 if halvings < 29 else 0
    return coefs + step, np.linalg.inv(hessian)


def fit_calibration(positives: np.ndarray, everything: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the coefficients of each class, (n_classes, 3), and their mean over classes, (3,).

    positives, everything : what `logit_counts` returns
    The prior starts at the fit of all classes pooled, with covariance 1. Each Newton step re-estimates it (EM).
    """
    mean, spread = IDENTITY, np.eye(3)
    pooled = IDENTITY[None]
    for _ in range(2 * ROUNDS):
        pooled, _ = newton_step(
            pooled, positives.sum(axis=0)[None], everything.sum(axis=0)[None], IDENTITY, 0.01 * spread
        )
    mean, coefs = pooled[0], np.tile(pooled, (len(positives), 1))
    for _ in range(ROUNDS):
        coefs, covariances = newton_step(coefs, positives, everything, mean, np.linalg.inv(spread))
        mean = coefs.mean(axis=0)
        off = coefs - mean
        spread = (off[:, :, None] * off[:, None] + covariances).mean(axis=0)
    return coefs, mean


def class_calibration(targets: np.ndarray, probs: np.ndarray) -> np.ndarray:
    """Return each class's coefficients for `calibrated`, (n_classes, 3); a class without positives has their mean."""
    coefs, mean = fit_calibration(*logit_counts(targets, probs))
    return np.where(targets.any(axis=0, keepdims=True).T, coefs, mean)


def calibrated(probs: np.ndarray, coefs: np.ndarray) -> np.ndarray:
    """Return calibrated probabilities, (n, n_classes) float32: shares of samples like these that have the class.

    coefs : (n_classes, 3) of `class_calibration`
    """
    logits = np.clip(logit(probs.astype(np.float64)), -LIMIT, LIMIT)
    a, b, c = coefs.T
    return expit(a - b * np.logaddexp(0, -logits) + c * np.logaddexp(0, logits)).astype(np.float32)


def local_offsets(logits: np.ndarray, positives: np.ndarray, everything: np.ndarray) -> np.ndarray:
    """Return what to add to calibrated logits so that they follow the labels nearby, (n_classes, n_bins).

    logits : (n_classes, n_bins) calibrated logits of the bins
    positives, everything : what `logit_counts` returns
    An offset is one Newton step of the likelihood of the samples nearby, weighted by a Gaussian of WIDTH, with a normal
    prior around 0 of the given PRECISION. So it stays near 0 where samples are few.
    """
    nearby = np.exp(-(((CENTRES[:, None] - CENTRES) / WIDTH) ** 2) / 2)
    q = expit(logits)
    observed, expected, variance = (counts @ nearby for counts in (positives, everything * q, everything * q * (1 - q)))
    return np.clip((observed - expected) / (variance + PRECISION), -LARGEST, LARGEST)


def expected_f1_curves(everything: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Return the expected F1 if all samples from a bin upwards are predicted, (n_classes, n_bins)."""
    predicted, right = (counts[:, ::-1].cumsum(axis=1)[:, ::-1] for counts in (everything, everything * q))
    return 2 * right / np.maximum(predicted + right[:, :1], 1e-12)


def calibrated_thresholds(targets: np.ndarray, probs: np.ndarray) -> np.ndarray:
    """Return the thresholds with the highest expected F1 after calibration, (n_classes,).

    A class without positives takes the mean calibration and the mean F* of the others.
    """
    positives, everything = logit_counts(targets, probs)
    coefs, mean = fit_calibration(positives, everything)
    logits = coefs @ FEATURES
    q = expit(logits + local_offsets(logits, positives, everything))
    curves = expected_f1_curves(everything, q)
    best = curves.max(axis=1)
    last = N_BINS - 1 - curves[:, ::-1].argmax(axis=1)  # the highest bin with that F1: those below it are empty
    absent = ~targets.any(axis=0)
    if absent.any() and not absent.all():
        q[absent], best[absent], last[absent] = expit(mean @ FEATURES), best[~absent].mean(), N_BINS - 1
    # The threshold is the upper edge of the highest bin up to `last` whose samples are not worth predicting.
    outside = (q < best[:, None] / 2) & (np.arange(N_BINS) <= last[:, None])
    first = np.where(outside.any(axis=1), N_BINS - outside[:, ::-1].argmax(axis=1), 0)
    return expit(np.append(EDGES, LIMIT)[first])
