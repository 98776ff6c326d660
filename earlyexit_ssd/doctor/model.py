"""Checks of a detector, one for each way in which a training is known to go wrong without an error.

The thresholds are reasoned, not fitted; the reason stands beside each. A *photo with objects* has an object in its
ground truth. *Foreground* is 1 - the probability of background. Default boxes that match an object are 0.7 % of all in
a typical photo, and hardly ever more than a tenth.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from scipy.stats import rankdata
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import box_iou

from earlyexit_ssd.doctor import findings
from earlyexit_ssd.evaluation.verdict import DETECTS_AP50, LARGEST_LOSS

MODEL_CHECKS: list[findings.Check] = []  # in the order of the table
check = functools.partial(findings.check, MODEL_CHECKS)

BOX_CODER = BoxCoder(weights=(10.0, 10.0, 5.0, 5.0))  # torchvision's encoding of boxes in its SSD
ENOUGH_PHOTOS = 10  # with fewer photos of a kind nothing is said about them
SCORE = 0.25  # a score at which users show detections: higher than any that keeps noise, lower than most
FEW_PHOTOS = 0.01  # a share of photos that is as good as none


@dataclass(frozen=True)
class ExitOutput:
    """Outputs of one exit (or the full path) for n photos."""

    name: str
    foreground: Tensor  # [n, A] in [0, 1], at each default box 1 - the probability of background
    deltas: Tensor  # [n, A, 4] box regression in torchvision's encoding (weights 10, 10, 5, 5)

    @classmethod
    def of(cls, name: str, logits: Tensor, deltas: Tensor) -> ExitOutput:
        """From raw class logits [n, A, C], background in column 0."""
        return cls(name, 1 - logits.float().softmax(-1)[..., 0], deltas.float())

    @classmethod
    def joined(cls, parts: Sequence[ExitOutput]) -> ExitOutput:
        """The outputs of one exit for several batches, as one."""
        foreground, deltas = (torch.cat([getattr(one, key) for one in parts]) for key in ("foreground", "deltas"))
        return cls(parts[0].name, foreground, deltas)


@dataclass(frozen=True)
class ModelEvidence:
    """What the checks look at. A check whose evidence is missing says nothing."""

    exits: Sequence[ExitOutput] = ()  # of the exits that have a branch, and of the full path
    default_boxes: Tensor = field(default_factory=lambda: torch.zeros(0, 4))  # [A, 4] xyxy in network pixels
    objects: Sequence[Tensor] = ()  # per photo [g, 4] xyxy in network pixels
    # exit, the full path last -> share of the photos that leave there; empty if every early exit is closed
    shares: Mapping[str, float] = field(default_factory=dict)
    # exit -> its temperature after each epoch, or the last one alone
    temperatures: Mapping[str, Sequence[float]] = field(default_factory=dict)
    # exit -> mean confidence of its gate after each epoch; one that rises as a detector learns, as the mean foreground
    # does not
    confidences: Mapping[str, Sequence[float]] = field(default_factory=dict)
    ap50: Mapping[str, float | None] = field(default_factory=dict)  # exit, the full path last -> AP50; None: undefined
    # early exit -> lower end of the 95 % interval of its AP50 - the full path's, on the same photos
    above_full: Mapping[str, float] = field(default_factory=dict)
    computed_aps: int | None = None  # number of APs in the files of the run; None: there are no files

    @property
    def shows(self) -> Tensor:
        """[n] bool, the photos with objects."""
        return torch.tensor([len(boxes) > 0 for boxes in self.objects], dtype=torch.bool)


def per_exit(measure: Callable[[ExitOutput, ModelEvidence], float]) -> Callable[[ModelEvidence], dict[str, float]]:
    """A check of every exit by itself, where enough photos have objects."""

    @functools.wraps(measure)
    def of_all(evidence: ModelEvidence) -> dict[str, float]:
        judged = evidence.exits if int(evidence.shows.sum()) >= ENOUGH_PHOTOS else ()
        return {one.name: measure(one, evidence) for one in judged}

    return of_all


# If a share f of the default boxes had probability 1 and all others 0, the figure would be sqrt((1 - f) / f): 12 for
# the usual 0.7 %, 3 where a tenth matches. 0.5 needs f = 0.8, and no photo has objects at 80 % of its default boxes.
@check(
    least=0.5,
    meaning="all default boxes get nearly the same score, so objects are not told from background",
    advice="train with default boxes assigned by IoU (never at random), and check that boxes belong to their photos",
)
@per_exit
def near_uniform_scores(found: ExitOutput, evidence: ModelEvidence) -> float:
    """Standard deviation / mean of the foreground over a photo's default boxes, mean over photos with objects."""
    foreground = found.foreground[evidence.shows]
    return (foreground.std(1) / foreground.mean(1).clamp(min=1e-12)).mean().item()


# A default box that overlaps its object with IoU 0.5 has deltas within 3.5: a side twice or half as long is
# 5 ln 2 = 3.5, a shift of a third of the side 10 / 3. Only boxes matched by force need more, so the likeliest ones,
# which are seldom these, may have one in four outside.
@check(
    most=0.25,
    meaning="the likeliest boxes are shifted or scaled as no default box that overlaps an object needs to be",
    advice="check the assignment of default boxes, the box format (xyxy, pixels) and the encoding (10, 10, 5, 5)",
)
@per_exit
def deltas_out_of_range(found: ExitOutput, evidence: ModelEvidence) -> float:
    """Of the ten likeliest default boxes of each photo with objects, the share with a delta outside [-5, 5]."""
    likeliest = found.foreground[evidence.shows].topk(min(10, found.foreground.shape[1]), 1).indices
    deltas = found.deltas[evidence.shows].gather(1, likeliest[..., None].expand(-1, -1, 4))
    return (~(deltas.abs() <= 5)).any(-1).float().mean().item()  # NaN counts as outside


# 0.007 is what a network knows of a default box without a look at the photo. Of the likeliest of thousands of boxes in
# a photo that shows something it must say far more: 0.1 is 14 times as much, and still too low for any use.
@check(
    least=0.1,
    meaning="the network says background everywhere, even in photos that show objects",
    advice="lower the share or weight of negatives, look for wrong labels, and take penalties off the confidence",
)
@per_exit
def background_everywhere(found: ExitOutput, evidence: ModelEvidence) -> float:
    """Largest foreground of each photo with objects, the median of these photos."""
    return found.foreground[evidence.shows].amax(1).median().item()


# At most a tenth of the default boxes are on objects. If half of them pass a score that users set, most detections are
# on background.
@check(
    most=0.5,
    meaning="most default boxes claim an object, wherever they are",
    advice="check that negatives are trained (LOSS.NEG_TO_POS_RATIO, LOSS.MIN_NEGATIVES) and background is class 0",
)
@per_exit
def foreground_everywhere(found: ExitOutput, evidence: ModelEvidence) -> float:
    """Share of the default boxes of all photos whose foreground is 0.25 or more."""
    return (found.foreground >= SCORE).float().mean().item()


# 0.5 is chance, where the standard error is 0.13 with 10 photos of each kind and 0.05 with 70. Even exits behind a
# shallow layer reach 0.73 (docs/results), so less than 0.6 is nearer to chance than to any detector.
@check(
    least=0.6,
    meaning="the largest object probability is no higher in photos with objects than in photos without",
    advice="do not route by it: train the exit until it detects, and then choose a policy",
)
def confidence_ignores_objects(evidence: ModelEvidence) -> dict[str, float]:
    """AUC of each photo's largest foreground: the probability that it is higher in a photo with objects than in a photo
    without. (The policy is not looked at: most tell how sure an exit is, which is another thing.)"""
    shows = evidence.shows
    if min(int(shows.sum()), int((~shows).sum())) < ENOUGH_PHOTOS:
        return {}
    return {one.name: area_under_curve(one.foreground.amax(1), shows) for one in evidence.exits}


def area_under_curve(values: Tensor, positive: Tensor) -> float:
    """Area under the ROC curve of ``values`` [n] for ``positive`` [n] bool, ties count half (Mann and Whitney 1947)."""
    ranks = torch.from_numpy(rankdata(values.double().numpy()))
    count = int(positive.sum())
    return ((ranks[positive].sum() - count * (count + 1) / 2) / (count * (len(positive) - count))).item()


# The figure is Cohen's kappa (1960): 0 is chance, 1 is perfect. Below 0.2 agreement is called slight (Landis and Koch
# 1977). It allows for sets in which one object fills every photo, where boxes at random overlap it too.
@check(
    least=0.2,
    meaning="the boxes with the highest scores do not lie on objects",
    advice="look at pictures of detections, and check boxes and photos of the training set (earlyexit doctor data)",
)
@per_exit
def positives_off_objects(found: ExitOutput, evidence: ModelEvidence) -> float:
    """Of the photos with objects, the share o whose likeliest box has IoU 0.5 or more with one of them, corrected for
    chance: (o - c) / (1 - c), with c the share where each such box is laid on the next photo with objects."""
    shown = evidence.shows.nonzero().flatten().tolist()
    likeliest = found.foreground[shown].argmax(1)
    deltas = found.deltas[shown, likeliest]
    boxes = BOX_CODER.decode_single(deltas, evidence.default_boxes[likeliest]).nan_to_num()
    objects = [evidence.objects[photo] for photo in shown]

    def share_on(objects: Sequence[Tensor]) -> float:
        hits = [box_iou(box[None], one).max() >= 0.5 for box, one in zip(boxes, objects, strict=True)]
        return torch.stack(hits).float().mean().item()

    own, chance = share_on(objects), share_on([*objects[1:], objects[0]])
    return (own - chance) / max(1 - chance, 1e-6)


# Where fewer than one photo in a hundred leaves early, the exits cannot pay for the time that their branches take.
@check(
    least=FEW_PHOTOS,
    meaning="exits are open and no photo leaves early, so every photo pays for branches that it does not use",
    advice="calibrate the thresholds (earlyexit calibrate), or train the exits until they detect",
)
def exits_none(evidence: ModelEvidence) -> dict[str, float]:
    """Share of the photos that leave early."""
    return {"routed": 1 - list(evidence.shares.values())[-1]} if evidence.shares else {}


# One exit for all is sound where that exit does the full path's work: the verdict, with the same limit, then says to
# ship it alone. Without AP50 nobody knows, which is the failure.
@check(
    least=1 - LARGEST_LOSS,
    meaning="all photos leave at one exit, and that exit is less accurate than the full path, or its AP50 is unknown",
    advice="look at AP50 at that exit, train it, and calibrate the thresholds (earlyexit calibrate)",
)
def exits_all(evidence: ModelEvidence) -> dict[str, float]:
    """Where an early exit takes 99 % of the photos or more: AP50 there / AP50 of the full path (0.05 if it is less)."""
    full = max(list(evidence.ap50.values() or [0])[-1] or 0.0, DETECTS_AP50)
    early = list(evidence.shares)[:-1]
    return {name: (evidence.ap50.get(name) or 0.0) / full for name in early if evidence.shares[name] >= 1 - FEW_PHOTOS}


# Temperatures of trained networks lie in [0.5, 3] (Guo et al. 2017 find 1.1 to 3). Within 2 % of a bound, the fit has
# reached it and would go on.
@check(
    least=0.51,
    most=2.94,
    meaning="the temperature is at or beyond the bounds [0.5, 3], so the logits are far from probabilities",
    advice="bound it (ROUTING.TEMPERATURE_BOUNDS), fit it on held-out photos, and look at AP50 before it",
)
def temperature_at_bound(evidence: ModelEvidence) -> dict[str, float]:
    """Last temperature."""
    return {name: values[-1] for name, values in evidence.temperatures.items() if len(values)}


# A fit on a fixed set settles, and its steps shrink. Three steps in one direction of 10 % each are 1.33 in all.
@check(
    most=1.1,
    meaning="the temperature grows or falls by more than a tenth in every epoch and does not settle",
    advice="fit it on detached logits, by likelihood, within bounds; a distribution loss must not reach it",
)
def temperature_runs_away(evidence: ModelEvidence) -> dict[str, float]:
    """Of the last three steps in one direction, the least factor; 1 if their directions differ."""
    figures = {}
    for name, values in evidence.temperatures.items():
        if len(values) >= 4:
            last = torch.tensor(values[-4:]).clamp(min=1e-6)
            steps = (last[1:] / last[:-1]).log()
            figures[name] = steps.abs().min().exp().item() if len(steps.sign().unique()) == 1 else 1.0
    return figures


# A gate that has learnt moves by tens of per cent; a tenth of what it was means that penalties have taken it.
@check(
    least=0.1,
    meaning="the confidence has fallen to less than a tenth of what it was, so no photo will leave",
    advice="take penalties and quality factors out of the confidence, and calibrate thresholds instead",
)
def confidence_collapses(evidence: ModelEvidence) -> dict[str, float]:
    """Last mean confidence / the highest of all epochs."""
    named = {name: values for name, values in evidence.confidences.items() if len(values) > 1 and max(values) > 0}
    return {name: values[-1] / max(values) for name, values in named.items()}


# The verdict's limit (evaluation/verdict.py): below it a detector does not detect, whatever its other figures are.
@check(
    least=DETECTS_AP50,
    meaning="it does not detect",
    advice="train it before any other figure is looked at; the other findings may say what is wrong",
)
def low_ap50(evidence: ModelEvidence) -> dict[str, float]:
    """AP50."""
    return {name: ap50 for name, ap50 in evidence.ap50.items() if ap50 is not None}


# A part of a network that is clearly better than the whole means that the rest was not trained or was damaged.
@check(
    most=0.0,
    meaning="the exit is better than the full path behind it, with 95 % confidence",
    advice="train the full path to its end and check that it is unchanged since, or ship that exit alone",
)
def exit_above_full(evidence: ModelEvidence) -> dict[str, float]:
    """Lower end of the 95 % bootstrap interval of AP50 of the exit - AP50 of the full path."""
    return dict(evidence.above_full)


@check(
    least=1,
    meaning="the run never computed an average precision, so nobody knows whether it detects",
    advice="evaluate it (earlyexit evaluate) before exit rates and milliseconds are looked at",
)
def ap_never_computed(evidence: ModelEvidence) -> dict[str, float]:
    """Number of APs in the files of the run."""
    return {} if evidence.computed_aps is None else {"run": evidence.computed_aps}
