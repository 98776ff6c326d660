"""Each check reports the outputs with its own defect, and no sound outputs."""

import dataclasses

import pytest
import torch

from earlyexit_ssd.doctor.findings import diagnose
from earlyexit_ssd.doctor.model import BOX_CODER, MODEL_CHECKS, ExitOutput, ModelEvidence, area_under_curve

PHOTOS, SIDE = 24, 320.0


def boxes_of_a_grid() -> torch.Tensor:
    """100 default boxes of 64 px, [100, 4] xyxy."""
    centres = torch.cartesian_prod(torch.arange(16.0, SIDE, 32.0), torch.arange(16.0, SIDE, 32.0))
    return torch.cat([centres - 32, centres + 32], 1)


def sound() -> ModelEvidence:
    """Twelve photos with one object each, on different default boxes, and twelve without; one exit, the full path."""
    boxes = boxes_of_a_grid()
    objects, logits = [], torch.zeros(PHOTOS, 100, 2)
    logits[..., 0] = 4 + torch.rand(PHOTOS, 100)
    deltas = torch.randn(PHOTOS, 100, 4)
    for photo in range(PHOTOS):
        objects.append(torch.zeros(0, 4))
        if photo % 2:
            place = photo * 4
            objects[-1] = boxes[place : place + 1] + torch.tensor([4.0, -4.0, 12.0, 6.0])
            logits[photo, place] = torch.tensor([-1.0, 1.0])
            deltas[photo, place] = BOX_CODER.encode_single(objects[-1], boxes[place : place + 1])[0]
    return ModelEvidence(
        exits=[ExitOutput.of(name, logits, deltas) for name in ("exit8", "full")],
        default_boxes=boxes,
        objects=objects,
        shares={"exit8": 0.5, "full": 0.5},
        temperatures={"exit8": [1.0, 1.2, 1.28, 1.3, 1.31]},
        confidences={"exit8": [0.41, 0.3, 0.35]},
        ap50={"exit8": 0.4, "full": 0.5},
        above_full={"exit8": -0.1},
        named_right={"cat": 0.5, "dog": 0.9},
        computed_aps=4,
    )


def with_exit(**changes: torch.Tensor) -> ModelEvidence:
    """Sound outputs with changes of the first exit."""
    evidence = sound()
    first, full = evidence.exits
    return dataclasses.replace(evidence, exits=[dataclasses.replace(first, **changes), full])


def test_sound_outputs_give_no_bad_finding_and_every_check_judges():
    diagnosis = diagnose(MODEL_CHECKS, sound())
    assert diagnosis.bad == () and diagnosis.not_judged == ["exits_all"]  # no exit takes all photos


def changed(**changes) -> ModelEvidence:
    return dataclasses.replace(sound(), **changes)


def claims_everywhere() -> torch.Tensor:
    """Two of three default boxes predict an object, with a lower probability than the default box on the object."""
    foreground = sound().exits[0].foreground
    claims = (torch.arange(100) % 3 > 0) * (0.3 + 0.5 * torch.rand(PHOTOS, 100))
    return foreground.maximum(claims)


def alike_without_objects() -> torch.Tensor:
    """Each photo without objects has the scores of the next photo, which has one."""
    return sound().exits[0].foreground[1::2].repeat_interleave(2, 0)


def beside_their_objects() -> torch.Tensor:
    """The likeliest boxes are shifted away from their objects."""
    likely = sound().exits[0].foreground[..., None] > 0.5
    return sound().exits[0].deltas + likely * torch.tensor([3.5, 3.5, 0.0, 0.0])


BROKEN = {
    # as after a random assignment of default boxes
    "near_uniform_scores": lambda: with_exit(foreground=0.2 + sound().exits[0].foreground / 50),
    "deltas_out_of_range": lambda: with_exit(deltas=sound().exits[0].deltas + 6.0),
    "background_everywhere": lambda: with_exit(foreground=sound().exits[0].foreground / 20),
    "foreground_everywhere": lambda: with_exit(foreground=claims_everywhere()),
    "confidence_ignores_objects": lambda: with_exit(foreground=alike_without_objects()),
    "positives_off_objects": lambda: with_exit(deltas=beside_their_objects()),
    "exits_none": lambda: changed(shares={"exit8": 0.0, "full": 1.0}),
    "exits_all": lambda: changed(shares={"exit8": 1.0, "full": 0.0}),
    "temperature_at_bound": lambda: changed(temperatures={"exit8": [1.0, 3.0]}),
    "temperature_runs_away": lambda: changed(temperatures={"exit8": [0.6, 0.8, 1.3, 2.4]}),
    "confidence_collapses": lambda: changed(confidences={"exit8": [0.41, 0.09, 0.007]}),
    "low_ap50": lambda: changed(ap50={"exit8": 0.04, "full": 0.5}),
    "classes_exchanged": lambda: changed(named_right={"cat": 0.9, "dog": 0.1}),
    "exit_above_full": lambda: changed(above_full={"exit8": 0.01}),
    "ap_never_computed": lambda: changed(computed_aps=0),
}  # fmt: skip


def test_every_check_has_a_case():
    assert list(BROKEN) == list(MODEL_CHECKS)


@pytest.mark.parametrize("name", BROKEN)
def test_a_check_reports_its_own_defect(name):
    fired = {finding.check for finding in diagnose(MODEL_CHECKS, BROKEN[name]()).bad}
    assert name in fired
    assert fired <= {name, *ALSO.get(name, ())}


ALSO = {"deltas_out_of_range": ["positives_off_objects"]}


def test_figures_by_hand():
    assert area_under_curve(torch.tensor([0.1, 0.4, 0.35, 0.8]), torch.tensor([False, False, True, True])) == 0.75
    assert area_under_curve(torch.ones(4), torch.tensor([False, False, True, True])) == 0.5
