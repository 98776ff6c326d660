"""Finite-sample control of the mean of a loss in [0, 1], such as the loss of a photo that leaves early.

The p-values here test H0: E[loss] > epsilon. If p <= delta, the mean loss is at most epsilon with confidence 1 - delta,
for every distribution of the losses and every number of photos. The photos must be independent draws of one source, and
the routing must not be fitted on them.

Losses are [n] in [0, 1], one per photo. epsilon, the largest acceptable mean loss, and delta are in (0, 1). Without
photos, p-values and bounds are 1.
"""

import bisect
import math
from collections.abc import Callable

import numpy as np

PValue = Callable[[np.ndarray, float], float]

BET_CAP = 0.75  # as a share of the largest bet without bankruptcy; Waudby-Smith & Ramdas suggest 1/2 or 3/4
ROUNDING = 1e-9  # a sum of losses that exceeds a whole number by at most this is rounded down to it
TOLERANCE = 1e-6  # largest error of upper_bound
MAX_PHOTOS = 10**6  # largest result of photos_needed


def hoeffding_bentkus_p_value(losses: np.ndarray, epsilon: float) -> float:
    """Return the Hoeffding-Bentkus p-value of H0: E[loss] > epsilon, in [0, 1]. It decreases in ``epsilon``.

    For the mean m of n losses it is the minimum of exp(-n h(min(m, epsilon), epsilon)), where h(a, b) =
    a log(a / b) + (1 - a) log((1 - a) / (1 - b)), and e P(Binomial(n, epsilon) <= ceil(n m)). Source: Bates et al.
    2021, "Distribution-free, risk-controlling prediction sets", section 3.1.
    """
    from scipy import stats  # not installed on a device that only runs exported files

    count = len(losses)
    if count == 0:
        return 1.0
    total = math.fsum(losses)  # exact: ten losses of 0.1 sum to 1
    mean = min(total / count, epsilon)
    divergence = mean * math.log(mean / epsilon) if mean else 0.0
    divergence += (1 - mean) * (math.log1p(-mean) - math.log1p(-epsilon))
    bentkus = math.e * float(stats.binom.cdf(math.ceil(total - ROUNDING), count, epsilon))
    return min(1.0, math.exp(-count * divergence), bentkus)


def betting_p_value(losses: np.ndarray, epsilon: float, *, delta: float = 0.1) -> float:
    """Return the betting p-value of H0: E[loss] > epsilon, in [0, 1]. It decreases in ``epsilon``.

    A gambler bets against H0, photo by photo. The capital is K_t = prod_{i <= t} (1 - nu_i (L_i - epsilon)), and the
    p-value is min(1, 1 / max_t K_t) (Ville's inequality). A bet depends on past losses only:

        nu_i = min(BET_CAP / (1 - epsilon), sqrt(2 log(1 / delta) / (n s_{i-1}))),
        m_i = (1/2 + sum_{j <= i} L_j) / (i + 1),    s_i = (1/4 + sum_{j <= i} (L_j - m_j)^2) / (i + 1).

    Source: Waudby-Smith & Ramdas 2024, "Estimating means of bounded random variables by betting", in the form of
    Bates et al. 2021, section 3.1, where the cap is 1. With BET_CAP, 1 - BET_CAP of the capital is left after a loss
    of 1. ``losses`` are in the order of the bets. Shuffle them with a seed first, because photos sorted by data set or
    by hour are not exchangeable. The bets are tuned for the level ``delta``, and the p-value is valid at every level.
    """
    count = len(losses)
    if count == 0:
        return 1.0
    divisor = np.arange(1, count + 1) + 1
    mean = (0.5 + np.cumsum(losses)) / divisor
    variance = (0.25 + np.cumsum((losses - mean) ** 2)) / divisor
    past_variance = np.concatenate([[0.25], variance[:-1]])
    bet = np.minimum(BET_CAP / (1 - epsilon), np.sqrt(2 * math.log(1 / delta) / (count * past_variance)))
    log_capital = np.cumsum(np.log1p(-bet * (losses - epsilon)))
    return math.exp(-max(0.0, float(log_capital.max())))


BOUNDS: dict[str, PValue] = {"hoeffding_bentkus": hoeffding_bentkus_p_value, "betting": betting_p_value}


def upper_bound(losses: np.ndarray, delta: float, p_value: PValue = hoeffding_bentkus_p_value) -> float:
    """Return the upper confidence bound of the expected loss at level ``delta``, in (0, 1].

    It is the smallest epsilon with ``p_value(losses, epsilon) <= delta``, rounded up by at most 1e-6. ``p_value`` is
    one of :data:`BOUNDS`, or another function that decreases in epsilon.
    """
    low, high = 0.0, 1.0  # no mean exceeds 1
    while high - low > TOLERANCE:
        middle = (low + high) / 2
        if p_value(losses, middle) <= delta:
            high = middle
        else:
            low = middle
    return high


def photos_needed(
    losses: np.ndarray, epsilon: float, delta: float, p_value: PValue = hoeffding_bentkus_p_value
) -> int | None:
    """Estimate the number of photos that certify ``epsilon``, as if further photos repeated the given losses in turn.

    Return None if the mean loss is not below ``epsilon``, or if more than 10^6 photos are needed.
    """

    def enough(count: int) -> bool:
        return p_value(np.resize(losses, count), epsilon) <= delta

    if not losses.size or losses.mean() >= epsilon or not enough(MAX_PHOTOS):
        return None
    high = 1
    while not enough(high):
        high *= 2
    return bisect.bisect_left(range(high + 1), True, lo=high // 2 + 1, key=enough)
