"""Policies: functions from the output of an exit to one confidence per image.

A high confidence means that deeper exits would gain little. A policy without fitted parameters is a function of the
logits [N, A, C] of N images, A default boxes and C classes, background first. The router has already divided the logits
of an early exit by its temperature. A policy with fitted parameters is a class, see :class:`FittedPolicy`. It may also
read the pooled tap. docs/extending.md has examples.

In the formulas p(c) is the softmax probability of class c at a default box, and the *object probability* of a default
box is the largest p(c) over all classes except background.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.modeling.outputs import ExitSignals
from earlyexit_ssd.registry import Registry

Policy = Callable[[ExitSignals, int], Tensor]  # function from an exit's signals and index to confidences [N] in [0, 1]

AMBIGUOUS = (0.05, 0.6)  # a default box is ambiguous if its object probability is between these two
CANDIDATES, FEWER_CANDIDATES = 512, 128
"""Number of default boxes per image that a policy reads. The other default boxes are almost surely background."""


class RecordedPhotos(Protocol):
    """Recorded outputs of n photos, for fitting a policy. Rows are photos, in the same order in every method."""

    temperatures: Sequence[float]  # one per early exit
    seed: int  # of random draws in a fit

    def signals(self, exit_index: int, boxes: int | None = None) -> Iterator[ExitSignals]:
        """Yield the signals of an early exit in batches, as the policy gets them. The logits are divided by the
        temperature, and are those of the ``boxes`` likeliest default boxes of each photo (None: all boxes)."""

    def losses(self) -> Tensor:
        """Return the loss (docs/routing.md) of each photo at each exit, the full path last: [n, exits] in [0, 1]."""

    def largest_scores(self) -> Tensor:
        """Return the largest score of the full path's detections in each photo, [n]; 0 without a detection."""

    def object_counts(self) -> list[int]:
        """Return the number of labelled objects of each class, without crowds."""


class FittedPolicy(nn.Module):
    """Base class of policies with fitted parameters. Register a subclass by name; calibration then fits it.

    ``__init__(parameters)`` takes the value of ``fit`` after it was written to JSON and read. ``forward(signals,
    exit_index)`` returns confidences [N] in [0, 1], also for the full path, whose index is the number of early exits.
    """

    boxes: int | None = None  # set by ``register_policy``: number of default boxes per image; None: all boxes
    reads_taps = False  # whether the policy reads the tap, which it must at an exit without a branch
    needs_training_photos = True  # False: ``fit`` gets calibration photos, unless the target is a risk
    cross_fits = False  # whether the policy has ``cross_fit``
    expected = "the value of its fit()"  # description of the parameters, for messages

    @classmethod
    def fit(cls, photos: RecordedPhotos) -> Any:
        """Return the fitted parameters as plain JSON types. Raise an EarlyExitError if the photos do not suffice."""
        raise NotImplementedError  # abstract: every fitted policy defines it

    @classmethod
    def cross_fit(cls, train: RecordedPhotos, calib: RecordedPhotos, folds: Tensor) -> tuple[Any, list[Tensor]]:
        """Fit on training and calibration photos. ``folds`` [n] is the index of each calibration photo's fold, from 0.

        Return the parameters of the fit on all photos, and for each early exit the confidences of the calibration
        photos, [n]. The confidence of a photo comes from a fit without the photos of its fold.
        """
        raise NotImplementedError  # abstract: every policy with ``cross_fits`` defines it


@dataclass(frozen=True)
class RegisteredPolicy:
    """A policy that is a function of the logits. It is pickled by name, since a decorated function is not picklable."""

    name: str
    function: Callable[..., Tensor]
    boxes: int | None
    reads_taps = needs_training_photos = cross_fits = False  # see FittedPolicy

    def __call__(self, signals: ExitSignals, exit_index: int) -> Tensor:
        return self.function(signals.logits)

    def __reduce__(self) -> tuple:
        return get_policy, (self.name,)


POLICIES: Registry[RegisteredPolicy | type[FittedPolicy]] = Registry("routing policy")
Registered = TypeVar("Registered", bound=Callable)


def register_policy(name: str, boxes: int | None = None) -> Callable[[Registered], Registered]:
    """Register a function of the logits [N, A, C], or a `FittedPolicy`, under ``name`` for ``ROUTING.POLICY``.

    Args:
        boxes: number of default boxes per image that the policy gets, see :func:`at_likeliest_boxes`; None: all boxes.

    Raises:
        EarlyExitError: a name that is registered already or no string, ``boxes`` below 1, or a class that is no
            `FittedPolicy`.
    """
    if boxes is not None and (type(boxes) is not int or boxes < 1):
        raise EarlyExitError(f"routing policy '{name}': boxes is {boxes}, expected 1 or more, or None for all boxes")

    def register(policy: Registered) -> Registered:
        if not isinstance(policy, type):
            POLICIES.register(name, RegisteredPolicy(name, policy, boxes))
        elif issubclass(policy, FittedPolicy):
            POLICIES.register(name, policy)
            policy.boxes = boxes
        else:
            raise EarlyExitError(f"routing policy '{name}' is the class {policy.__name__}; derive it from FittedPolicy")
        return policy

    return register


def get_policy(name: str, parameters: Any = None) -> Policy:
    """Return the policy ``name``, with ``parameters`` if fitted. Raise an EarlyExitError if one of them is wrong."""
    policy = POLICIES.find(name)
    if not is_fitted(name):
        if parameters is not None:
            raise EarlyExitError(f"routing policy '{name}' takes no parameters; leave them out")
        return policy
    if parameters is None or parameters == []:
        fix = "tools/calibrate.py fits them and writes a certificate"
        raise EarlyExitError(f"routing policy '{name}' needs parameters; {fix}")
    try:
        return policy(parameters)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        expected = f"expected {policy.expected}; calibrate again (tools/calibrate.py)"
        problem = f"its parameters are {str(parameters)[:60]}, {expected}"
        raise EarlyExitError(f"routing policy '{name}': {problem}") from error


def is_fitted(name: str) -> bool:
    """Return whether the policy has fitted parameters."""
    return isinstance(POLICIES.get(name), type)


def reads_taps(name: str | None) -> bool:
    """Return `FittedPolicy.reads_taps`, or False for a policy that is not fitted."""
    return getattr(POLICIES.get(name), "reads_taps", False)


@register_policy("mean_foreground")
def mean_foreground(logits: Tensor) -> Tensor:
    """Mean of 1 - p(background) over all default boxes. Only for comparison, since it is close to 0 for all photos."""
    return 1 - logits.softmax(-1)[..., 0].mean(-1)


@register_policy("max_foreground", FEWER_CANDIDATES)
def max_foreground(logits: Tensor) -> Tensor:
    """Largest object probability of all default boxes. A photo leaves if at least one object is certain."""
    return object_probability(logits).amax(-1)


@register_policy("entropy", CANDIDATES)
def entropy(logits: Tensor) -> Tensor:
    """Mean over the default boxes of 1 - H / log C, where H = -sum_c p(c) log p(c) is the entropy of a default box.
    BranchyNet (Teerapittayanon et al. 2016, section III-B) has one entropy per image."""
    log_probability = logits.log_softmax(-1)
    negative_entropy = (log_probability.exp() * log_probability).sum(-1).mean(-1)
    return (1 + negative_entropy / math.log(logits.shape[-1])).clamp(0, 1)


@register_policy("margin", CANDIDATES)
def margin(logits: Tensor) -> Tensor:
    """sum_b f_b (p1_b - p2_b) / sum_b f_b over the default boxes b, where p1 and p2 are the two largest probabilities,
    background included, and f = 1 - p(background)."""
    probability = logits.softmax(-1)
    foreground = 1 - probability[..., 0]
    largest, second = probability.topk(2, -1).values.unbind(-1)
    return ((largest - second) * foreground).sum(-1) / foreground.sum(-1).clamp(min=1e-12)


@register_policy("ambiguous_mass", CANDIDATES)
def ambiguous_mass(logits: Tensor) -> Tensor:
    """1 / (1 + m), where m is the sum of the object probabilities of the ambiguous default boxes (`AMBIGUOUS`)."""
    return 1 / (1 + where_ambiguous(object_probability(logits)).sum(-1))


@register_policy("emptiness", FEWER_CANDIDATES)
def emptiness(logits: Tensor) -> Tensor:
    """1 - the largest object probability of all default boxes. A photo leaves if it probably shows nothing."""
    return 1 - max_foreground(logits)


def at_likeliest_boxes(signals: ExitSignals, boxes: int | None) -> ExitSignals:
    """Keep the ``boxes`` default boxes of each image with the largest difference between object and background logit.
    None keeps all boxes. The result does not depend on the temperature."""
    logits = signals.logits
    images, count, classes = logits.shape
    if boxes is None or boxes >= count:
        return signals
    difference = logits[..., 1:].amax(-1) - logits[..., 0]
    indices = difference.topk(boxes, dim=-1, sorted=False).indices
    # index_select on all boxes of all images is faster than gather
    indices = indices + torch.arange(0, images * count, count, device=indices.device)[:, None]
    chosen = logits.reshape(-1, classes).index_select(0, indices.flatten()).view(images, -1, classes)
    return ExitSignals(chosen, signals.tap, signals.empty)


def object_probability(logits: Tensor) -> Tensor:
    """Return the largest probability over the classes except background, [N, A] of logits [N, A, C]."""
    return logits.softmax(-1)[..., 1:].amax(-1)


def where_ambiguous(probability: Tensor) -> Tensor:
    """Return ``probability`` with 0 where it is not `AMBIGUOUS`."""
    low, high = AMBIGUOUS
    return probability * ((probability > low) & (probability < high))


@register_policy("balanced_ambiguity", FEWER_CANDIDATES)
class BalancedAmbiguity(FittedPolicy):
    """`ambiguous_mass` with each object probability times the weight of its class, since AP is a mean over classes.
    ``parameters`` has a positive weight for each class except background, large for rare classes."""

    needs_training_photos = False
    expected = "a positive weight for every class"

    def __init__(self, parameters: Sequence[float]) -> None:
        super().__init__()
        if type(parameters) not in (list, tuple) or not all(
            type(value) in (int, float) and 0 < value < math.inf for value in parameters
        ):
            raise ValueError
        self.register_buffer("weights", torch.tensor(parameters, dtype=torch.float32))

    @classmethod
    def fit(cls, photos: RecordedPhotos) -> list[float]:
        """Return the weights mean(n + 1) / (n + 1), where n is the number of objects of a class. Raise an
        EarlyExitError if no photo has a labelled object."""
        objects = photos.object_counts()
        if not any(objects):
            problem = "policy 'balanced_ambiguity' counts labelled objects, and the photos have none"
            fix = "use labelled photos (DATA.TRAIN for a risk, otherwise DATA.CALIB), or set ROUTING.POLICY to"
            raise EarlyExitError(f"{problem}; {fix} ambiguous_mass")
        counts = torch.tensor(objects, dtype=torch.float64) + 1
        return (counts.mean() / counts).tolist()

    def forward(self, signals: ExitSignals, exit_index: int) -> Tensor:
        """Return confidences [N]. Raise an EarlyExitError if the number of weights is not the number of classes."""
        weights, classes = len(self.weights), signals.logits.shape[-1] - 1
        if weights != classes:
            problem = f"has weights of {weights} classes, the model has {classes}"
            raise EarlyExitError(f"routing policy 'balanced_ambiguity' {problem}; calibrate again (tools/calibrate.py)")
        largest, likeliest = signals.logits.softmax(-1)[..., 1:].max(-1)
        return 1 / (1 + (where_ambiguous(largest) * self.weights[likeliest]).sum(-1))


LEVELS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""For each level, the number of default boxes with a higher object probability is a statistic."""
_LEVELS = torch.tensor(LEVELS)  # created once, since torch.tensor takes as long as ten operations
NUM_STATISTICS = len(LEVELS) + 4
HIDDEN_UNITS, FIT_STEPS = 8, 600


def logit_statistics(logits: Tensor) -> Tensor:
    """Compute statistics of the object probabilities: logits [N, A, C] to [N, `NUM_STATISTICS`].

    Let p be the object probability of a default box. The first statistics are log(1 + x) for these x: the number of
    boxes with p above each of `LEVELS`, the sum of all p, and the sum of the ambiguous p. The last two are the two
    largest values of max_b p_b(c) over the object classes c, where b are the default boxes.
    """
    by_box_and_class = logits.softmax(-1)[..., 1:]
    probability, by_class = by_box_and_class.amax(-1), by_box_and_class.amax(1)
    counts = (probability[..., None] > _LEVELS.to(probability)).sum(1, dtype=probability.dtype)
    sums = torch.stack([probability, where_ambiguous(probability)], 1).sum(-1)
    two_largest = by_class.topk(2, dim=-1).values if by_class.shape[-1] > 1 else F.pad(by_class, (0, 1))
    return torch.cat([torch.cat([counts, sums], 1).log1p(), two_largest], 1)


class GainModel(nn.Module):
    """Predicts the gain of the full path, which is the loss at the exit minus the loss at the full path.

    It is a perceptron with one hidden layer on the standardised statistics, plus linear terms in the statistics and in
    the means of the tap's channels.
    """

    def __init__(self, tap_channels: int) -> None:
        super().__init__()
        self.tap_channels = tap_channels
        for name, fill in (("mean", 0.0), ("scale", 1.0)):
            self.register_buffer(name, torch.full((NUM_STATISTICS + tap_channels,), fill))
        self.hidden = nn.Linear(NUM_STATISTICS, HIDDEN_UNITS)
        self.output = nn.Linear(HIDDEN_UNITS, 1)
        self.skip = nn.Linear(NUM_STATISTICS, 1, bias=False)
        self.tap = nn.Linear(tap_channels, 1, bias=False)
        for layer in (self.output, self.skip, self.tap):
            nn.init.zeros_(layer.weight)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return gains [N] for the inputs of :func:`gain_inputs`."""
        inputs = (inputs - self.mean) / self.scale
        statistics, tap = inputs[:, :NUM_STATISTICS], inputs[:, NUM_STATISTICS:]
        return (self.output(torch.tanh(self.hidden(statistics))) + self.skip(statistics) + self.tap(tap)).squeeze(1)

    def to_plain(self) -> dict[str, list]:
        return {name: value.tolist() for name, value in self.state_dict().items()}

    @classmethod
    def from_plain(cls, values: dict[str, list]) -> GainModel:
        state = {name: torch.tensor(value) for name, value in values.items()}
        model = cls(state["tap.weight"].shape[1])
        model.load_state_dict(state)
        return model


def gain_inputs(signals: ExitSignals, tap_channels: int) -> Tensor:
    """Return the inputs of a `GainModel`, [N, NUM_STATISTICS + tap_channels]: statistics and the tap's means."""
    return torch.cat([logit_statistics(signals.logits), signals.tap[:, :tap_channels]], dim=1)


def fit_gain(inputs: Tensor, gains: Tensor, seed: int = 0) -> GainModel:
    """Fit a `GainModel` to inputs [n, NUM_STATISTICS + tap_channels] and gains [n]: least squares, by AdamW."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = GainModel(inputs.shape[1] - NUM_STATISTICS)
    model.mean, model.scale = inputs.mean(0), inputs.std(0, unbiased=len(inputs) > 1).clamp(min=1e-3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=1.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, FIT_STEPS)
    for _ in range(FIT_STEPS):
        optimizer.zero_grad()
        ((model(inputs) - gains) ** 2).mean().backward()
        optimizer.step()
        schedule.step()
    return model


@register_policy("learned_gain", FEWER_CANDIDATES)
class LearnedGain(FittedPolicy):
    """1 / (1 + exp(gain)), with the gain that a `GainModel` predicts, in standard deviations of the gains at the exit.
    ``parameters`` has the `GainModel.to_plain` of each early exit."""

    reads_taps = True
    expected = "the numbers of a fitted model for every early exit"

    def __init__(self, parameters: Sequence[dict[str, list]]) -> None:
        super().__init__()
        self.models = nn.ModuleList(map(GainModel.from_plain, parameters)).requires_grad_(False)

    @classmethod
    def fit(cls, photos: RecordedPhotos) -> list[dict[str, list]]:
        """Fit a `GainModel` per early exit to the gains divided by their standard deviation."""
        losses, fitted = photos.losses(), []
        for index in range(len(photos.temperatures)):
            gain = losses[:, index] - losses[:, -1]
            gain = gain / gain.std(unbiased=False).clamp(min=1e-6)
            # the first half of a pooled tap has the channels' means, the second half their maxima
            inputs = [gain_inputs(batch, batch.tap.shape[1] // 2) for batch in photos.signals(index, cls.boxes)]
            fitted.append(fit_gain(torch.cat(inputs), gain, seed=photos.seed).to_plain())
        return fitted

    def forward(self, signals: ExitSignals, exit_index: int) -> Tensor:
        """Return confidences [N]; 1 at the full path, since no exit follows."""
        if exit_index >= len(self.models):
            return torch.ones_like(signals.logits[:, 0, 0])
        model = self.models[exit_index]
        return torch.sigmoid(-model(gain_inputs(signals, model.tap_channels)))


RIDGE_PENALTIES = tuple(10.0**power for power in range(-1, 6))
LARGEST_WEIGHT = 10.0  # limit for the weight of a calibration photo in a cross-fit; a training photo has weight 1
LOGIT_EPS = 1e-3  # probabilities are clamped to [0.001, 0.999] before their logit is computed


@register_policy("foreseen_emptiness", FEWER_CANDIDATES)
class ForeseenEmptiness(FittedPolicy):
    """1 - p, where p is the predicted largest score of the full path. Ridge regression predicts the logit of p.
    ``parameters`` has ``{"weight": [d], "bias": float}`` for each early exit."""

    reads_taps = True
    cross_fits = True
    expected = "weight and bias, numbers, for every early exit"

    def __init__(self, parameters: Sequence[dict]) -> None:
        super().__init__()
        self.early_exits = len(parameters)
        for index, values in enumerate(parameters):
            self.register_buffer(f"weight{index}", torch.tensor(values["weight"]))
            self.register_buffer(f"bias{index}", torch.tensor(values["bias"]))

    @classmethod
    def fit(cls, photos: RecordedPhotos) -> list[dict[str, list | float]]:
        """Fit a regression of the full path's largest score for each early exit. It needs no labels."""
        exits = range(len(photos.temperatures))
        return [fit_largest_score(cls._inputs(photos, index), photos.largest_scores()) for index in exits]

    @classmethod
    def cross_fit(
        cls, train: RecordedPhotos, calib: RecordedPhotos, folds: Tensor
    ) -> tuple[list[dict[str, list | float]], list[Tensor]]:
        """See `FittedPolicy.cross_fit`. Each calibration photo has the weight n_train / n_calib, clamped to [1,
        `LARGEST_WEIGHT`]."""
        train_scores, calib_scores = train.largest_scores(), calib.largest_scores()
        num_train, num_calib = len(train_scores), len(calib_scores)
        weight = min(max(num_train / max(num_calib, 1), 1.0), LARGEST_WEIGHT)
        scores = torch.cat([train_scores, calib_scores])
        weights = torch.cat([torch.ones(num_train), torch.full((num_calib,), weight)])
        all_folds = torch.cat([torch.full((num_train,), -1), folds])  # training photos are in no fold
        fitted, confidences = [], []
        for index in range(len(calib.temperatures)):
            inputs = torch.cat([cls._inputs(train, index), cls._inputs(calib, index)])
            confidence = torch.empty(num_calib)
            for fold in folds.unique():
                left_out = all_folds == fold
                fit = fit_largest_score(inputs[~left_out], scores[~left_out], weights[~left_out])
                predicted = inputs[left_out] @ torch.tensor(fit["weight"]) + fit["bias"]
                confidence[folds == fold] = torch.sigmoid(-predicted)
            confidences.append(confidence)
            fitted.append(fit_largest_score(inputs, scores, weights))
        return fitted, confidences

    @classmethod
    def _inputs(cls, photos: RecordedPhotos, exit_index: int) -> Tensor:
        return torch.cat([regression_inputs(batch) for batch in photos.signals(exit_index, cls.boxes)])

    def forward(self, signals: ExitSignals, exit_index: int) -> Tensor:
        """Return confidences [N]; at the full path those of `emptiness`."""
        if exit_index >= self.early_exits:
            return emptiness(signals.logits)
        weight, bias = getattr(self, f"weight{exit_index}"), getattr(self, f"bias{exit_index}")
        return torch.sigmoid(-F.linear(regression_inputs(signals), weight[None], bias[None])[:, 0])


def regression_inputs(signals: ExitSignals) -> Tensor:
    """Return the inputs [N, d] of the regression: the pooled tap and, if the exit has a branch, the logit of its
    largest object probability."""
    if signals.empty:
        return signals.tap
    largest = object_probability(signals.logits).amax(-1, keepdim=True)
    return torch.cat([signals.tap, torch.logit(largest, eps=LOGIT_EPS)], dim=1)


def fit_largest_score(inputs: Tensor, probability: Tensor, weights: Tensor | None = None) -> dict[str, list | float]:
    """Fit the logit of ``probability`` [n] by ridge regression on ``inputs`` [n, d], weighted by ``weights`` [n].

    The penalty in `RIDGE_PENALTIES` with the smallest leave-one-out error is chosen. Let X be the standardised inputs,
    y the centred targets and w the coefficients. The leave-one-out residuals are

        (y - Xw) / (1 - h),    h = diag(X (X'X + penalty I)^-1 X') + 1/n

    (Golub, Heath and Wahba 1979, equation 1.3). With ``weights``, the rows of X and y are multiplied by the square
    roots of the weights (whose mean is 1), and 1/n becomes the photo's share of the weights.

    Returns:
        ``weight`` [d] and ``bias`` for inputs that are not standardised.
    """
    inputs, targets = inputs.double(), torch.logit(probability.double(), eps=LOGIT_EPS)
    share = torch.ones_like(targets) if weights is None else weights.double()
    share = share / share.sum()
    root = (share * len(share)).sqrt()
    mean, center = share @ inputs, share @ targets
    scale = (share @ (inputs - mean) ** 2).sqrt().clamp(min=1e-3)
    left, values, right = torch.linalg.svd(root[:, None] * (inputs - mean) / scale, full_matrices=False)
    centered = root * (targets - center)
    projected = left.T @ centered
    best: tuple[float, Tensor] | None = None
    for penalty in RIDGE_PENALTIES:
        shrink = values**2 / (values**2 + penalty)
        leverage = (left**2 @ shrink) + share
        error = ((centered - left @ (shrink * projected)) / (1 - leverage).clamp(min=1e-6)).square().mean().item()
        if best is None or error < best[0]:
            best = error, right.T @ (values / (values**2 + penalty) * projected)
    weight = best[1] / scale
    return {"weight": weight.float().tolist(), "bias": float(center - mean @ weight)}
