"""An independent float64 reference in NumPy, and how results are compared with it.

The mathematics is written as in a textbook. Derivatives are taken by the complex step
(f(x + ih) ~ f(x) + ih f'(x), exact to rounding), so that no derivation is shared with the product.
"""

import numpy as np

STEP = 1e-30


def one_hot(index, classes):
    """[...] class indices to [..., C]. An index that is no class gives zeros; one class is a
    mask."""
    first = 1 if classes == 1 else 0
    return (np.asarray(index, np.int64)[..., None] == np.arange(first, first + classes)).astype(
        float
    )


def flat(x):
    """[N, spatial..., C] to [N, V, C]."""
    return np.reshape(x, (len(x), -1, np.shape(x)[-1]))


def log_softmax(x):
    shifted = x - x.real.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def softmax(x):
    return np.exp(log_softmax(x))


def _softplus(x):
    size = x * np.where(x.real < 0, -1, 1)
    return np.where(x.real < 0, 0, x) + np.log1p(np.exp(-size))


def _least(p, t):
    """min(p, t). Where they are equal, the derivative is one half."""
    return np.where(p.real < t, p, np.where(p.real > t, t, (p + t) / 2))


def voxel_terms(
    x,
    t,
    activation,
    squared=False,
    soft=False,
    gamma=0.0,
    smoothing=0.0,
    threshold=0.0,
    unknown=None,
    dist_matrix=None,
):
    """What each voxel adds to each of the sums, by its name: [..., C] each.

    Args:
      gamma: one focal exponent, or one for each class.
      unknown: [..., C], 1 for the classes that a voxel may belong to. Its t is then 0.
      dist_matrix: [C, C], the distance of the label's class (the row) from each class.
    """
    both = _least if soft else np.multiply
    power = 2 if squared else 1
    classes = x.shape[-1]
    gamma = np.broadcast_to(gamma, [classes])
    known = 1 if unknown is None else 1 - unknown
    smooth_t = (1 - smoothing) * t + smoothing / (2 if activation == "sigmoid" else classes)
    negative = None
    if activation in ("argmax", "threshold"):
        largest = np.arange(classes) == x.argmax(-1)[..., None]
        p = (largest if activation == "argmax" else x > threshold).astype(float)
        cross_entropy = 0 * p
    elif activation == "sigmoid":
        log_p = -_softplus(-x)
        p = np.exp(log_p)
        present = np.where(smooth_t != 0, -smooth_t * (1 - p) ** gamma * log_p, 0)
        cross_entropy = known * present
        negative = known * (1 - smooth_t) * p**gamma * _softplus(x)
    elif activation == "softmax":
        log_p = log_softmax(x)
        p = np.exp(log_p)
        cross_entropy = np.where(smooth_t != 0, -smooth_t * (1 - p) ** gamma * log_p, 0)
    else:
        p = x + 0
        # The cross-entropy of a smaller probability is that of this one.
        cut = np.where(p.real < 1e-7, 1e-7, p)
        cross_entropy = -smooth_t * (1 - cut) ** gamma * np.log(cut)
    terms = {
        "intersection": known * both(p, t),
        "pred_sum": known * p**power,
        "label_sum": known * t**power + 0 * p,
        "cross_entropy": cross_entropy,
    }
    if negative is not None:
        terms["negative_cross_entropy"] = negative
    if unknown is not None:
        if activation in ("softmax", "none"):
            q = (unknown * p).sum(-1)
            q = np.where(q.real < 1e-7, 1e-7, q) if activation == "none" else q
            q = np.where(unknown.any(-1), q, 1)
            q, rest = q[..., None], ((1 - unknown) * p).sum(-1, keepdims=True)
            rest = 1 - q if activation == "none" else rest
            rest = np.where(rest.real < 0, 0, rest)
            lowest = np.arange(classes) == unknown.argmax(-1)[..., None]
            share = unknown * ((1 - smoothing) * lowest + smoothing / classes)
            marginal = share * -(rest**gamma) * np.log(q)
            terms["cross_entropy"] = np.where(unknown == 1, marginal, cross_entropy)
        terms["unknown_sum"] = unknown + 0 * p
    if dist_matrix is not None:
        terms["distance_sum"] = t * np.einsum("...l,lc,...c->...", t, dist_matrix, p)[..., None]
    return terms


def sums(x, t, weight=None, **options):
    """The sums of x and t, [N, V, C], by their names: [N, C] each, but not that of the weights."""
    x, t = np.asarray(x, np.float64), np.asarray(t, np.float64)
    m = np.ones(x.shape[:2]) if weight is None else np.asarray(weight, np.float64)
    x = np.where(m[..., None] == 0, 0, x)
    terms = voxel_terms(x, t, **options)
    return {name: (m[..., None] * term).sum(1) for name, term in terms.items()}


def gradient(x, t, coefficients, weight=None, **options):
    """The gradient with respect to x of a weighted total of the sums.

    Args:
      coefficients: the weights of intersection, pred_sum, cross_entropy, negative_cross_entropy
        and distance_sum, [N, C] each. Of three, the last is for both cross-entropies.
    """
    x, t = np.asarray(x, np.float64), np.asarray(t, np.float64)
    m = np.ones(x.shape[:2]) if weight is None else np.asarray(weight, np.float64)
    x = np.where(m[..., None] == 0, 0, x)
    a, b, e, *others = (np.asarray(k, np.float64)[:, None, :] for k in coefficients)
    factors = {"intersection": a, "pred_sum": b, "cross_entropy": e}
    factors["negative_cross_entropy"] = others[0] if others else e
    factors["distance_sum"] = others[1] if len(others) > 1 else 0
    result = np.empty_like(x)
    for c in range(x.shape[-1]):  # Voxels do not interact, so that one step serves them all.
        stepped = x.astype(complex)
        stepped[..., c] += 1j * STEP
        terms = voxel_terms(stepped, t, **options)
        total = sum(factors[name] * terms[name] for name in factors if name in terms)
        result[..., c] = m * total.sum(-1).imag / STEP
    return result


def dice_losses(i, p, t, smooth_nr=1e-5, smooth_dr=1e-5):
    """1 - (2 I + smooth_nr) / (P + T + smooth_dr), for each sample and class."""
    return 1 - (2 * i + smooth_nr) / (p + t + smooth_dr)


def mean_dice(i, p, t):
    """The mean of `dice_losses` over samples and classes."""
    return np.mean(dice_losses(i, p, t))


def loss_and_gradient(x, t, of_sums, weight=None, with_cross_entropy=False, **options):
    """A loss and its gradient with respect to x.

    Args:
      of_sums: makes the loss of intersection, pred_sum and label_sum, [N, C] each.
      with_cross_entropy: whether of_sums gets the cross-entropies as well, of which there are two
        for "sigmoid".
    """
    with_gradient = ["intersection", "pred_sum", "cross_entropy", "negative_cross_entropy"]
    given = sums(x, t, weight, **options)
    names = ["intersection", "pred_sum", "label_sum"]
    names += [name for name in with_gradient[2:] if name in given] if with_cross_entropy else []
    values = [given[name] for name in names]
    coefficients = {name: np.zeros_like(values[0]) for name in with_gradient}
    for which, name in enumerate(names):
        for at in np.ndindex(values[0].shape) if name in with_gradient else ():
            stepped = [v.astype(complex) for v in values]
            stepped[which][at] += 1j * STEP
            coefficients[name][at] = np.imag(of_sums(*stepped)) / STEP
    return of_sums(*values), gradient(x, t, coefficients.values(), weight, **options)


def relative_error(actual, expected):
    """The largest error, divided by the largest expected value. Between two zeros it is 0."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    scale = np.abs(expected).max(initial=0)
    error = np.abs(actual - expected).max(initial=0)
    return error / scale if scale else error


def gradient_error(actual, expected):
    """The relative L2 distance. A gradient of zeros has error 1, whatever the size of the
    volume."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    norm = np.linalg.norm(expected)
    assert norm > 0, "a gradient of zeros proves nothing"
    return np.linalg.norm(actual - expected) / norm


def assert_gradient(actual, expected, tolerance=1e-5):
    """Compares by relative L2, which catches a wrong scale, and by cosine: a wrong direction."""
    assert gradient_error(actual, expected) <= tolerance
    a, b = np.ravel(actual).astype(np.float64), np.ravel(expected).astype(np.float64)
    assert 1 - a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) <= tolerance
