"""Checks of a detector. Each one finds a known failure of training that raises no error.

The comment above a check gives the reason for its limits, which were not fitted to data. A *photo with objects* has
an object in its ground truth. *Foreground* is 1 - the probability of background. Typically 0.7 % of a photo's default
boxes match an object, and hardly ever more than 10 %.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from scipy.stats import mannwhitneyu
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import box_iou

from earlyexit_ssd.doctor import findings
from earlyexit_ssd.evaluation.verdict import DETECTS_AP50, LARGEST_LOSS

MODEL_CHECKS: dict[str, findings.Check] = {}  # in the order of the table
check = functools.partial(findings.check, MODEL_CHECKS)

BOX_CODER = BoxCoder(weights=(10.0, 10.0, 5.0, 5.0))  # torchvision's encoding of boxes in its SSD
ENOUGH_PHOTOS = 10  # a check needs so many photos with objects, and as many without if it compares both
SHOWN_SCORE = 0.25  # a low score threshold for showing detections; noise is mostly below it
FEW_PHOTOS = 0.01  # a smaller share of the photos counts as none


@dataclass(frozen=True)
class ExitOutput:
    """Outputs of one exit (or the full path) for n photos."""

    name: str
    foreground: Tensor  # 1 - the probability of background at each default box, [n, A] in [0, 1]
    deltas: Tensor  # box regression in torchvision's encoding (weights 10, 10, 5, 5), [n, A, 4]

    @classmethod
    def of(cls, name: str, logits: Tensor, deltas: Tensor) -> ExitOutput:
        """Convert raw class logits [n, A, C], with background in column 0, and box regression [n, A, 4]."""
        return cls(name, 1 - logits.float().softmax(-1)[..., 0], deltas.float())

    @classmethod
    def joined(cls, parts: Sequence[ExitOutput]) -> ExitOutput:
        """Join the outputs of one exit for several batches."""
        foreground, deltas = (torch.cat([getattr(part, key) for part in parts]) for key in ("foreground", "deltas"))
        return cls(parts[0].name, foreground, deltas)


@dataclass(frozen=True)
class ModelEvidence:
    """Input of the checks. A check whose input is missing is skipped."""

    exits: Sequence[ExitOutput] = ()  # of the exits that have a branch, and of the full path
    default_boxes: Tensor = field(default_factory=lambda: torch.zeros(0, 4))  # [A, 4] xyxy in network pixels
    objects: Sequence[Tensor] = ()  # boxes of each photo, [g, 4] xyxy in network pixels
    # exit -> share of the photos that leave there, the full path last; empty if all early exits are closed
    shares: Mapping[str, float] = field(default_factory=dict)
    # exit -> temperature after each epoch, or only the last one
    temperatures: Mapping[str, Sequence[float]] = field(default_factory=dict)
    # exit -> mean confidence after each epoch; only for a policy whose confidence rises as a detector learns
    confidences: Mapping[str, Sequence[float]] = field(default_factory=dict)
    ap50: Mapping[str, float | None] = field(default_factory=dict)  # exit -> AP50, the full path last; None: undefined
    # early exit -> lower end of the 95 % interval of its AP50 - the full path's, on the same photos
    above_full: Mapping[str, float] = field(default_factory=dict)
    # class -> share of its objects found by the full path that get its name
    named_right: Mapping[str, float] = field(default_factory=dict)
    computed_aps: int | None = None  # number of APs in the files of the run; None without files

    @property
    def with_objects(self) -> Tensor:
        """Whether each photo has objects, bool [n]."""
        return torch.tensor([len(boxes) > 0 for boxes in self.objects], dtype=torch.bool)


def per_exit(measure: Callable[[ExitOutput, ModelEvidence], float]) -> Callable[[ModelEvidence], dict[str, float]]:
    """Decorate a measure of one exit, to apply it to every exit if enough photos have objects."""

    @functools.wraps(measure)
    def measure_all(evidence: ModelEvidence) -> dict[str, float]:
        judged = evidence.exits if int(evidence.with_objects.sum()) >= ENOUGH_PHOTOS else ()
        return {output.name: measure(output, evidence) for output in judged}

    return measure_all


# If a share f of the default boxes had probability 1 and all others 0, the figure would be sqrt((1 - f) / f): 12 for
# f = 0.7 %, 3 for f = 10 %. 0.5 needs f = 80 %, and no photo has objects at 80 % of its default boxes.
@check(
    least=0.5,
    meaning="all default boxes get nearly the same score, so objects are not distinguished from background",
    advice="train with default boxes assigned by IoU (never at random), and check that boxes belong to their photos",
)
@per_exit
def near_uniform_scores(output: ExitOutput, evidence: ModelEvidence) -> float:
    """Standard deviation / mean of the foreground over a photo's default boxes, averaged over photos with objects."""
    foreground = output.foreground[evidence.with_objects]
    return (foreground.std(1) / foreground.mean(1).clamp(min=1e-12)).mean().item()


# A default box that overlaps its object with IoU 0.5 has deltas within 3.5: a side twice or half as long gives
# 5 ln 2 = 3.5, a shift by a third of the side 10 / 3. Only an object without such a default box needs more. Its default
# boxes seldom have the highest foreground, so of the boxes that have it a quarter may have larger deltas.
@check(
    most=0.25,
    meaning="the likeliest boxes are shifted or scaled more than a default box that overlaps an object ever needs",
    advice="check the assignment of default boxes, the box format (xyxy, pixels) and the encoding (10, 10, 5, 5)",
)
@per_exit
def deltas_out_of_range(output: ExitOutput, evidence: ModelEvidence) -> float:
    """Share of the ten likeliest default boxes of each photo with objects that have a delta outside [-5, 5]."""
    likeliest = output.foreground[evidence.with_objects].topk(min(10, output.foreground.shape[1]), 1).indices
    deltas = output.deltas[evidence.with_objects].gather(1, likeliest[..., None].expand(-1, -1, 4))
    return (~(deltas.abs() <= 5)).any(-1).float().mean().item()  # NaN counts as outside


# A network that ignores the photo predicts 0.007, the share of default boxes that match an object. For the likeliest of
# thousands of boxes in a photo with objects it must predict far more. 0.1 is 14 times as much, but still of no use.
@check(
    least=0.1,
    meaning="the network predicts background everywhere, even in photos with objects",
    advice="lower the share or weight of negatives, look for wrong labels, and remove penalties from the confidence",
)
@per_exit
def background_everywhere(output: ExitOutput, evidence: ModelEvidence) -> float:
    """Median of the largest foreground of each photo with objects."""
    return output.foreground[evidence.with_objects].amax(1).median().item()


# At most 10 % of the default boxes are on objects. If half of them exceed a user's score threshold, most detections are
# on background.
@check(
    most=0.5,
    meaning="most default boxes predict an object, wherever they are",
    advice="check that negatives are trained (LOSS.NEG_TO_POS_RATIO, LOSS.MIN_NEGATIVES) and background is class 0",
)
@per_exit
def foreground_everywhere(output: ExitOutput, evidence: ModelEvidence) -> float:
    """Share of the default boxes of all photos whose foreground is 0.25 or more."""
    return (output.foreground >= SHOWN_SCORE).float().mean().item()


# 0.5 is chance, with a standard error of 0.13 for 10 photos of each kind and 0.05 for 70. Even exits after a shallow
# layer reach 0.73 (docs/results), so a figure under 0.6 is nearer to chance than to any detector.
@check(
    least=0.6,
    meaning="the largest object probability is no higher in photos with objects than in photos without",
    advice="do not route by it: train the exit until it detects, and then choose a policy",
)
def confidence_ignores_objects(evidence: ModelEvidence) -> dict[str, float]:
    """AUC of each photo's largest foreground: the probability that it is higher in a photo with objects than in a photo
    without. The policy is not used, because most policies measure how certain an exit is, and an exit can be certain
    that a photo is empty."""
    with_objects = evidence.with_objects
    if min(int(with_objects.sum()), int((~with_objects).sum())) < ENOUGH_PHOTOS:
        return {}
    return {output.name: area_under_curve(output.foreground.amax(1), with_objects) for output in evidence.exits}


def area_under_curve(values: Tensor, positive: Tensor) -> float:
    """Return the area under the ROC curve of ``values`` [n] for the positive class, bool [n]. Ties count half (Mann and
    Whitney 1947)."""
    pairs = int(positive.sum()) * int((~positive).sum())
    return float(mannwhitneyu(values[positive].numpy(), values[~positive].numpy()).statistic) / pairs


# The figure is Cohen's kappa (1960): 0 is chance, 1 is perfect, below 0.2 agreement is slight (Landis and Koch 1977).
# So random boxes get a low figure even if they overlap an object that fills each photo.
@check(
    least=0.2,
    meaning="the boxes with the highest scores do not lie on objects",
    advice="look at pictures of detections, and check boxes and photos of the training set (earlyexit doctor data)",
)
@per_exit
def positives_off_objects(output: ExitOutput, evidence: ModelEvidence) -> float:
    """(o - c) / (1 - c). o is the share of photos with objects whose likeliest box has IoU 0.5 or more with an object,
    and c is this share if each box is compared with the objects of the next photo."""
    photos = evidence.with_objects.nonzero().flatten().tolist()
    likeliest = output.foreground[photos].argmax(1)
    deltas = output.deltas[photos, likeliest]
    boxes = BOX_CODER.decode_single(deltas, evidence.default_boxes[likeliest]).nan_to_num()
    objects = [evidence.objects[photo] for photo in photos]

    def share_on(objects: Sequence[Tensor]) -> float:
        hits = [box_iou(box[None], of_photo).max() >= 0.5 for box, of_photo in zip(boxes, objects, strict=True)]
        return torch.stack(hits).float().mean().item()

    observed, chance = share_on(objects), share_on([*objects[1:], objects[0]])
    return (observed - chance) / max(1 - chance, 1e-6)


# If fewer than 1 % of the photos leave early, the exits save less time than their branches take.
@check(
    least=FEW_PHOTOS,
    meaning="exits are open and no photo leaves early, so every photo takes longer for branches that it does not use",
    advice="calibrate the thresholds (earlyexit calibrate), or train the exits until they detect",
)
def exits_none(evidence: ModelEvidence) -> dict[str, float]:
    """Share of the photos that leave early."""
    return {"routed": 1 - list(evidence.shares.values())[-1]} if evidence.shares else {}


# All photos may leave at an exit that is about as accurate as the full path. Then the verdict, with the same limit,
# recommends that exit alone. An undefined AP50 counts as 0.
@check(
    least=1 - LARGEST_LOSS,
    meaning="all photos leave at one exit, and that exit is less accurate than the full path, or its AP50 is unknown",
    advice="look at AP50 at that exit, train it, and calibrate the thresholds (earlyexit calibrate)",
)
def exits_all(evidence: ModelEvidence) -> dict[str, float]:
    """AP50 / AP50 of the full path (at least 0.05) of an early exit at which 99 % of the photos or more leave."""
    full = max(list(evidence.ap50.values() or [0])[-1] or 0.0, DETECTS_AP50)
    early = list(evidence.shares)[:-1]
    return {name: (evidence.ap50.get(name) or 0.0) / full for name in early if evidence.shares[name] >= 1 - FEW_PHOTOS}


# Temperatures of trained networks lie in [0.5, 3] (Guo et al. 2017 find 1.1 to 3). A temperature within 2 % of these
# bounds would probably be beyond them without bounds in the fit.
@check(
    least=0.51,
    most=2.94,
    meaning="the temperature is at or beyond the bounds [0.5, 3], so the logits are far from probabilities",
    advice="bound it (ROUTING.TEMPERATURE_BOUNDS), fit it on held-out photos, and check AP50 first",
)
def temperature_at_bound(evidence: ModelEvidence) -> dict[str, float]:
    """Last temperature of each exit."""
    return {name: values[-1] for name, values in evidence.temperatures.items() if len(values)}


# A fit on a fixed set of photos converges, so its steps shrink. Three steps of 10 % in one direction are a factor of
# 1.33.
@check(
    most=1.1,
    meaning="the temperature rises or falls by more than 10 % in every epoch and does not converge",
    advice="fit it on detached logits, by likelihood, within bounds; a distribution loss must not change it",
)
def temperature_runs_away(evidence: ModelEvidence) -> dict[str, float]:
    """Smallest factor of the last three changes if they have one direction, otherwise 1."""
    figures = {}
    for name, values in evidence.temperatures.items():
        if len(values) >= 4:
            last = torch.tensor(values[-4:]).clamp(min=1e-6)
            steps = (last[1:] / last[:-1]).log()
            figures[name] = steps.abs().min().exp().item() if len(steps.sign().unique()) == 1 else 1.0
    return figures


# In a normal training the mean confidence changes by tens of percent. If it falls to a tenth, penalties outweigh the
# rest of the loss.
@check(
    least=0.1,
    meaning="the confidence has fallen to less than a tenth of an earlier value, so no photo will leave",
    advice="remove penalties and quality factors from the confidence, and calibrate thresholds instead",
)
def confidence_collapses(evidence: ModelEvidence) -> dict[str, float]:
    """Last mean confidence / the highest of all epochs."""
    curves = evidence.confidences.items()
    return {name: values[-1] / max(values) for name, values in curves if len(values) > 1 and max(values) > 0}


# The limit of the verdict (evaluation/verdict.py).
@check(
    least=DETECTS_AP50,
    meaning="it does not detect",
    advice="check the order of DATA.CLASSES, or train it; judge no other figure before",
)
def low_ap50(evidence: ModelEvidence) -> dict[str, float]:
    """AP50 of each exit and of the full path."""
    return {name: ap50 for name, ap50 in evidence.ap50.items() if ap50 is not None}


# torchvision's detector names 0.4 or more of the found objects of every COCO class right. If names are exchanged,
# hardly any object gets its name.
@check(
    least=0.2,
    meaning="nearly all found objects of this class are detected as other classes",
    advice="compare the order of DATA.CLASSES, of the model's classes and of the annotations' categories",
)
def classes_exchanged(evidence: ModelEvidence) -> dict[str, float]:
    """Share of the found objects of a class that the full path gives this class, for the class with the lowest share.
    An object is found if a detection of score 0.25 or more has IoU 0.5 with it. The highest score counts."""
    return dict(sorted(evidence.named_right.items(), key=lambda item: item[1])[:1])


# If a part of a network is clearly better than the whole, the rest was not trained or was damaged.
@check(
    most=0.0,
    meaning="the exit is better than the full path, with 95 % confidence",
    advice="train the full path longer and check that it has not changed since, or ship that exit alone",
)
def exit_above_full(evidence: ModelEvidence) -> dict[str, float]:
    """Lower end of the 95 % bootstrap interval of the exit's AP50 - the full path's AP50."""
    return dict(evidence.above_full)


@check(
    least=1,
    meaning="the run never computed an average precision, so it is unknown whether the detector detects",
    advice="evaluate it (earlyexit evaluate) before you compare exit rates and milliseconds",
)
def ap_never_computed(evidence: ModelEvidence) -> dict[str, float]:
    """Number of APs in the files of the run."""
    return {} if evidence.computed_aps is None else {"run": evidence.computed_aps}
