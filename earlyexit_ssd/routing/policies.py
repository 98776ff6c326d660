"""Policies: functions from the output of an exit to one confidence per image.

A high confidence means that going on to deeper exits would gain little. A policy without fitted parameters is a
function of the logits [N, A, C] of N images, A default boxes and C classes, background first. The router has already
divided the logits of an early exit by its temperature. A policy with fitted parameters is a class, see
:class:`FittedPolicy`. It may also read the pooled tap. docs/extending.md has examples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from earlyexit_ssd.errors import EarlyExitError, nearest
from earlyexit_ssd.modeling.outputs import ExitSignals

Policy = Callable[[ExitSignals, int], Tensor]  # function from an exit's signals and index to confidences [N] in [0, 1]

AMBIGUOUS = (0.05, 0.6)  # a default box is ambiguous if its largest object probability is between these two
CANDIDATES, FEWER_CANDIDATES = 512, 128
"""Number of default boxes per image that a policy reads: 512 for sums and means over boxes, 128 for maxima and fitted
policies. All others are almost surely background."""


class RecordedPhotos(Protocol):
    """Recorded outputs of n photos, for fitting a policy. Rows are photos, in the same order in every method.

    Attributes:
        temperatures: one per early exit.
        seed: seed of random draws in a fit.
    """

    temperatures: Sequence[float]
    seed: int

    def signals(self, exit_index: int, boxes: int | None = None) -> Iterator[ExitSignals]:
        """Signals of an early exit in batches, as the policy gets them: logits divided by the temperature, for the
        ``boxes`` likeliest default boxes of each photo (None: all)."""

    def losses(self) -> Tensor:
        """Loss of each photo at each exit, the full path last: [n, exits] in [0, 1]."""

    def largest_scores(self) -> Tensor:
        """Largest score of the full path's detections in each photo, [n]; 0 without a detection."""

    def object_counts(self) -> list[int]:
        """Number of labelled objects of each class, without crowds."""


class FittedPolicy(nn.Module):
    """Base class of policies with fitted parameters. Register a subclass by name; calibration then fits it.

    ``__init__(parameters)`` takes what ``fit`` returned, after a round trip through JSON. ``forward(signals,
    exit_index)`` returns confidences [N] in [0, 1], also for the full path, whose index is the number of early exits.

    Attributes:
        boxes: number of default boxes per image that the policy gets, set by ``register_policy``; None: all.
        reads_taps: whether the policy reads the tap, so that it works at an exit without a branch.
        needs_training_photos: whether ``fit`` needs training photos; if not, it gets calibration photos.
        cross_fits: whether the policy has ``cross_fit``, which adds calibration photos to the training photos.
        expected: description of the parameters, for messages.
    """

    boxes: int | None = None
    reads_taps = False
    needs_training_photos = True
    cross_fits = False
    expected = "what its fit() gives"

    @classmethod
    def fit(cls, photos: RecordedPhotos) -> Any:
        """The fitted parameters as plain JSON types. An EarlyExitError if these photos do not suffice."""
        raise NotImplementedError  # abstract: every fitted policy defines it

    @classmethod
    def cross_fit(cls, train: RecordedPhotos, calib: RecordedPhotos, folds: Tensor) -> tuple[Any, list[Tensor]]:
        """Fit on training and calibration photos, without boxes.

        Args:
            folds: number of the fold of each calibration photo, from 0, [n].

        Returns:
            the parameters of the fit on all photos, and per early exit the confidences of the calibration photos, [n].
            The confidence of a photo comes from a fit without the photos of its fold.
        """
        raise NotImplementedError  # abstract: policies with ``cross_fits`` define it; no other is cross-fitted


@dataclass(frozen=True)
class RegisteredPolicy:
    """A policy made from a function of the logits. It is pickled by name, since pickle refuses a decorated function."""

    name: str
    function: Callable[..., Tensor]
    boxes: int | None

    def __call__(self, signals: ExitSignals, exit_index: int) -> Tensor:
        return self.function(signals.logits)

    def __reduce__(self) -> tuple:
        return get_policy, (self.name,)


POLICIES: dict[str, RegisteredPolicy] = {}
FITTED_POLICIES: dict[str, type[FittedPolicy]] = {}
Registered = TypeVar("Registered", bound=Callable)


def register_policy(name: str, boxes: int | None = None) -> Callable[[Registered], Registered]:
    """Register a function of the logits [N, A, C], or a `FittedPolicy`, under ``name`` for ``ROUTING.POLICY``.

    Args:
        boxes: number of default boxes per image that the policy gets, see :func:`at_likeliest_boxes`; None: all.

    Raises:
        EarlyExitError: a name that is taken or no string, ``boxes`` below 1, or a class other than a `FittedPolicy`.
    """
    if not isinstance(name, str):
        raise EarlyExitError(f'register_policy takes the policy\'s name, got {name!r}; write @register_policy("name")')
    if boxes is not None and (type(boxes) is not int or boxes < 1):
        raise EarlyExitError(f"routing policy '{name}' looks at {boxes} default boxes; give 1 or more, or None for all")

    def register(policy: Registered) -> Registered:
        if name in POLICIES or name in FITTED_POLICIES:
            raise EarlyExitError(f"routing policy '{name}' is registered already; choose another name")
        if not isinstance(policy, type):
            POLICIES[name] = RegisteredPolicy(name, policy, boxes)
        elif issubclass(policy, FittedPolicy):
            FITTED_POLICIES[name], policy.boxes = policy, boxes
        else:
            raise EarlyExitError(f"routing policy '{name}' is the class {policy.__name__}; derive it from FittedPolicy")
        return policy

    return register


def get_policy(name: str, parameters: Any = None) -> Policy:
    """The policy ``name``, with ``parameters`` if it is a fitted one. An EarlyExitError if one of them is wrong."""
    require_known(name)
    told = f"routing policy '{name}'"
    if name not in FITTED_POLICIES:
        if parameters is not None:
            raise EarlyExitError(f"{told} has no parameters, some were given; leave them out")
        return POLICIES[name]
    policy = FITTED_POLICIES[name]
    if not parameters:
        raise EarlyExitError(f"{told} has no parameters; tools/calibrate.py fits it and writes a certificate")
    try:
        return policy(parameters)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as problem:
        wrong = f"its parameters are {str(parameters)[:60]}, expected {policy.expected}"
        raise EarlyExitError(f"{told}: {wrong}; calibrate again (tools/calibrate.py)") from problem


def require_known(name: str) -> None:
    """An EarlyExitError with the nearest name if no policy has that name."""
    names = [*POLICIES, *FITTED_POLICIES]
    if not isinstance(name, str):
        raise EarlyExitError(f"routing policy {name!r}: expected the name that it is registered by")
    if name not in names:
        hint = nearest(name, names) or f"; there are {', '.join(names)}"
        raise EarlyExitError(f"unknown routing policy '{name}'{hint}")


def reads_taps(name: str | None) -> bool:
    """Whether the policy reads the tap, so that it works at an exit without a branch."""
    return getattr(FITTED_POLICIES.get(name), "reads_taps", False)


def cross_fits(name: str) -> bool:
    """Whether the policy has ``cross_fit``."""
    return getattr(FITTED_POLICIES.get(name), "cross_fits", False)


def needs_training_photos(name: str) -> bool:
    """Whether ``fit`` of the policy needs training photos."""
    return getattr(FITTED_POLICIES.get(name), "needs_training_photos", False)


@register_policy("mean_foreground")
def mean_foreground(logits: Tensor) -> Tensor:
    """Mean of the foreground probability, 1 - p(background), over all default boxes; only for comparison, since it is
    close to 0 for every photo."""
    total = exp_(logits - logits[..., :1]).sum(-1)  # not clamped, to save time: if the sum is infinite, 1 / sum is 0
    return 1 - total.reciprocal().mean(-1)


@register_policy("max_foreground", FEWER_CANDIDATES)
def max_foreground(logits: Tensor) -> Tensor:
    """Largest probability of any class but background at any default box: a photo leaves if one object is certain."""
    return FastSoftmax(logits).largest.amax(-1)


@register_policy("entropy", CANDIDATES)
def entropy(logits: Tensor) -> Tensor:
    """1 - H / log C, with H the entropy of a default box's class probabilities, averaged over the default boxes. As in
    BranchyNet (Teerapittayanon et al. 2016, section III-B), which has one entropy per image."""
    differences = _minus_background(logits)
    ratios = exp_(differences.clone())
    total = ratios.sum(-1)
    entropies = total.log() - differences.mul_(ratios).sum(-1) / total
    return (1 - entropies.mean(-1) / math.log(logits.shape[-1])).clamp(0, 1)


@register_policy("margin", CANDIDATES)
def margin(logits: Tensor) -> Tensor:
    """Probability of the likeliest class (or background) minus that of the second likeliest, averaged over the default
    boxes with their foreground probabilities as weights."""
    softmax = FastSoftmax(logits)
    first = softmax.ratios.amax(-1)
    difference = (first - without_largest(softmax.ratios, first).amax(-1)) / softmax.total
    return (difference * softmax.foreground).sum(-1) / softmax.foreground.sum(-1).clamp(min=1e-12)


@register_policy("ambiguous_mass", CANDIDATES)
def ambiguous_mass(logits: Tensor) -> Tensor:
    """1 / (1 + m), with m the sum of the largest object probabilities of the ambiguous default boxes (`AMBIGUOUS`)."""
    return 1 / (1 + where_ambiguous(FastSoftmax(logits).largest).sum(-1))


@register_policy("emptiness", FEWER_CANDIDATES)
def emptiness(logits: Tensor) -> Tensor:
    """1 - the largest object probability of any default box: a photo leaves if it probably shows nothing."""
    return 1 - max_foreground(logits)


def at_likeliest_boxes(signals: ExitSignals, boxes: int | None) -> ExitSignals:
    """The signals at the ``boxes`` default boxes with the largest (object logit - background logit); None: all. The
    choice is the same at every temperature."""
    logits = signals.logits
    images, count, classes = logits.shape
    if boxes is None or boxes >= count:
        return signals
    difference = largest_of(logits[..., 1:]) - logits[..., 0]
    where = difference.topk(boxes, dim=-1, sorted=False).indices
    if images == 1:  # the usual case, with the fewest operations
        chosen = logits[0].index_select(0, where[0])[None]
    else:  # index_select on all boxes of all images is faster than gather
        indices = where + torch.arange(0, images * count, count, device=where.device)[:, None]
        chosen = logits.reshape(-1, classes).index_select(0, indices.flatten()).view(images, -1, classes)
    return ExitSignals(chosen, signals.tap, signals.empty)


def largest_of(values: Tensor) -> Tensor:
    """``values.amax(-1)``, up to twice as fast. PyTorch vectorises amax only if the last dimension is a multiple of
    32."""
    classes = values.shape[-1]
    if classes < 32 or classes % 32 == 0:
        return values.amax(-1)
    return torch.maximum(values[..., : classes - classes % 32].amax(-1), values[..., -32:].amax(-1))


def without_largest(values: Tensor, largest: Tensor) -> Tensor:
    """``values`` [..., C] >= 0, replaced by 0 where they equal their maximum ``largest`` [...]; faster than a mask. At
    ties all are replaced, so `margin` is then too large."""
    return (largest[..., None] - values).sign_().mul_(values)


def where_ambiguous(probability: Tensor) -> Tensor:
    """``probability`` where it is `AMBIGUOUS`, else 0."""
    low, high = AMBIGUOUS
    if torch.onnx.is_in_onnx_export():  # F.threshold cannot be exported with another threshold than 0
        return probability * ((probability > low) & (probability < high))
    return F.threshold(probability, low, 0.0) * (probability < high)


class FastSoftmax:
    """Softmax of logits [N, A, C]. For few classes it is five times as fast as PyTorch's.

    Attributes:
        ratios: p(class) / p(background) = exp(logit - background logit), [N, A, C].
        total: sum of the ratios of a default box, [N, A]. So p(class) is ratio / total.
    """

    def __init__(self, logits: Tensor) -> None:
        self.ratios = exp_(_minus_background(logits))
        self.total = self.ratios.sum(-1)

    @property
    def foreground(self) -> Tensor:
        """1 - p(background), [N, A]."""
        return 1 - 1 / self.total

    @property
    def largest(self) -> Tensor:
        """The largest probability of any class but background, [N, A]."""
        return self.ratios[..., 1:].amax(-1) / self.total


def exp_(values: Tensor) -> Tensor:
    """``values.exp_()``, computed as 2^(x log2 e). PyTorch's exp is MKL's, which takes three times as long on AMD
    processors. This works in place, because allocating memory takes longer than the arithmetic."""
    if torch.onnx.is_in_onnx_export():  # ONNX has no exp2
        return values.exp_()
    return values.mul_(math.log2(math.e)).exp2_()


def _minus_background(logits: Tensor) -> Tensor:
    """Logits [N, A, C] minus the background logit, clamped to at most 60, so that sums of exp stay finite in fp32."""
    return (logits - logits[..., :1]).clamp_(max=60.0)


@register_policy("balanced_ambiguity", FEWER_CANDIDATES)
class BalancedAmbiguity(FittedPolicy):
    """`ambiguous_mass` with each probability times the weight of its class, since AP is a mean over classes.
    ``parameters``: a positive weight for each class except background, large for rare ones."""

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
        """Weights mean(n + 1) / (n + 1), with n the number of objects of a class. Raises an EarlyExitError if no photo
        has a labelled object."""
        objects = photos.object_counts()
        if not any(objects):
            raise EarlyExitError(
                "policy 'balanced_ambiguity' counts labelled objects, and the photos have none; give labels (of "
                "DATA.TRAIN for a risk, else of DATA.CALIB), or take ambiguous_mass (ROUTING.POLICY)"
            )
        counts = torch.tensor(objects, dtype=torch.float64) + 1
        return (counts.mean() / counts).tolist()

    def forward(self, signals: ExitSignals, exit_index: int) -> Tensor:
        """Confidences [N]. Raises an EarlyExitError if the number of weights is not the number of classes."""
        weights, classes = len(self.weights), signals.logits.shape[-1] - 1
        if weights != classes:
            raise EarlyExitError(
                f"routing policy 'balanced_ambiguity' has weights of {weights} classes, the model has {classes}; "
                "calibrate again (tools/calibrate.py)"
            )
        softmax = FastSoftmax(signals.logits)
        largest, likeliest = softmax.ratios[..., 1:].max(-1)
        return 1 / (1 + (where_ambiguous(largest / softmax.total) * self.weights[likeliest]).sum(-1))


LEVELS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Probability levels: the number of default boxes above each is a statistic."""
_LEVELS = torch.tensor(LEVELS)  # made once, since torch.tensor takes as long as ten operations
NUM_STATISTICS = len(LEVELS) + 4
HIDDEN_UNITS, FIT_STEPS = 8, 600


def logit_statistics(logits: Tensor) -> Tensor:
    """Statistics of the object probabilities: logits [N, A, C] to [N, `NUM_STATISTICS`].

    Let p be the largest object probability of a default box. The first statistics are log(1 + x), where x is the number
    of boxes with p above each of `LEVELS`, the sum of all p, and the sum of the ambiguous p. The last two are the
    probabilities of the two likeliest classes, each the maximum over the default boxes.
    """
    softmax = FastSoftmax(logits)
    by_box_and_class = softmax.ratios[..., 1:] / softmax.total[..., None]
    probability, by_class = by_box_and_class.amax(-1), by_box_and_class.amax(1)
    counts = (probability[..., None] > _LEVELS.to(probability)).sum(1, dtype=probability.dtype)
    sums = torch.stack([probability, where_ambiguous(probability)], 1).sum(-1)
    two_largest = by_class.topk(2, dim=-1).values if by_class.shape[-1] > 1 else F.pad(by_class, (0, 1))
    return torch.cat([torch.cat([counts, sums], 1).log1p(), two_largest], 1)


class GainModel(nn.Module):
    """Predicts the gain of going on, loss at the exit - loss at the full path: a perceptron with one hidden layer on
    the standardised statistics, plus linear terms in the statistics and in the means of the tap's channels."""

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
        """Gains [N] from the inputs of :func:`gain_inputs`."""
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
    """Inputs of a `GainModel`, [N, NUM_STATISTICS + tap_channels]: statistics and means of the tap's channels."""
    return torch.cat([logit_statistics(signals.logits), signals.tap[:, :tap_channels]], dim=1)


def fit_gain(inputs: Tensor, gains: Tensor, seed: int = 0) -> GainModel:
    """Least-squares fit (AdamW, full batch) of the gains [n] to the inputs [n, NUM_STATISTICS + tap_channels]."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = GainModel(inputs.shape[1] - NUM_STATISTICS)
    model.mean, model.scale = inputs.mean(0), inputs.std(0).clamp(min=1e-3)
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
    """1 / (1 + exp(gain)). A `GainModel` predicts the gain, in standard deviations of the gains at that exit.
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
            inputs = [gain_inputs(one, one.tap.shape[1] // 2) for one in photos.signals(index, cls.boxes)]
            fitted.append(fit_gain(torch.cat(inputs), gain, seed=photos.seed).to_plain())
        return fitted

    def forward(self, signals: ExitSignals, exit_index: int) -> Tensor:
        """Confidences [N]; 1 at the full path, since no exit follows."""
        if exit_index >= len(self.models):
            return torch.ones_like(signals.logits[:, 0, 0])
        model = self.models[exit_index]
        return torch.sigmoid(-model(gain_inputs(signals, model.tap_channels)))


RIDGE_PENALTIES = tuple(10.0**power for power in range(-1, 6))
LARGEST_WEIGHT = 10.0  # largest weight of a calibration photo in a cross-fit; that of a training photo is 1
LEAST_PROBABILITY = 1e-3  # probabilities are clamped to [this, 1 - this] before their logit is taken


@register_policy("foreseen_emptiness", FEWER_CANDIDATES)
class ForeseenEmptiness(FittedPolicy):
    """1 - p, where p is a prediction of the full path's largest object score, by ridge regression.
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
        """Fit a regression of the full path's largest score for each early exit, without labels."""
        exits = range(len(photos.temperatures))
        return [fit_largest_score(cls._inputs(photos, index), photos.largest_scores()) for index in exits]

    @classmethod
    def cross_fit(
        cls, train: RecordedPhotos, calib: RecordedPhotos, folds: Tensor
    ) -> tuple[list[dict[str, list | float]], list[Tensor]]:
        """See `FittedPolicy.cross_fit`. Each calibration photo has weight n_train / n_calib, limited to 1 to
        `LARGEST_WEIGHT`."""
        known, largest = train.largest_scores(), calib.largest_scores()
        weight = min(max(len(known) / max(len(largest), 1), 1.0), LARGEST_WEIGHT)
        scores = torch.cat([known, largest])
        weights = torch.cat([torch.ones(len(known)), torch.full((len(largest),), weight)])
        all_folds = torch.cat([torch.full((len(known),), -1), folds])  # training photos are in no fold
        fitted, confidences = [], []
        for index in range(len(calib.temperatures)):
            inputs = torch.cat([cls._inputs(train, index), cls._inputs(calib, index)])
            values = torch.empty(len(scores))
            for fold in folds.unique():
                left_out = all_folds == fold
                found = fit_largest_score(inputs[~left_out], scores[~left_out], weights[~left_out])
                predicted = inputs[left_out] @ torch.tensor(found["weight"]) + found["bias"]
                values[left_out] = torch.sigmoid(-predicted)
            confidences.append(values[len(known) :])
            fitted.append(fit_largest_score(inputs, scores, weights))
        return fitted, confidences

    @classmethod
    def _inputs(cls, photos: RecordedPhotos, exit_index: int) -> Tensor:
        return torch.cat([regression_inputs(one) for one in photos.signals(exit_index, cls.boxes)])

    def forward(self, signals: ExitSignals, exit_index: int) -> Tensor:
        """Confidences [N]; at the full path 1 - its own largest object probability."""
        if exit_index >= self.early_exits:
            return emptiness(signals.logits)
        weight, bias = getattr(self, f"weight{exit_index}"), getattr(self, f"bias{exit_index}")
        return torch.sigmoid(-F.linear(regression_inputs(signals), weight[None], bias[None])[:, 0])


def regression_inputs(signals: ExitSignals) -> Tensor:
    """Inputs [N, d] of the regression: the pooled tap and, if the exit has a branch, the logit of its largest object
    probability."""
    if signals.empty:
        return signals.tap
    largest = FastSoftmax(signals.logits).largest.amax(-1, keepdim=True)
    return torch.cat([signals.tap, torch.logit(largest, eps=LEAST_PROBABILITY)], dim=1)


def fit_largest_score(inputs: Tensor, probability: Tensor, weights: Tensor | None = None) -> dict[str, list | float]:
    """Ridge regression of the logit of ``probability`` [n] on ``inputs`` [n, d], weighted by ``weights`` [n].

    The penalty with the least leave-one-out error is chosen. Let X be the standardised inputs, y the targets and w the
    coefficients. The leave-one-out residuals are (y - Xw) / (1 - h), where h is the diagonal of X (X'X + penalty I)^-1
    X' + 1/n (Golub, Heath and Wahba 1979, equation 1.3). With ``weights``, 1/n becomes the photo's share of the
    weights. Returns ``weight`` [d] and ``bias``, for inputs that are not standardised.
    """
    inputs, targets = inputs.double(), torch.logit(probability.double(), eps=LEAST_PROBABILITY)
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
