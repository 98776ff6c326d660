import pytest

from earlyexit_ssd.config import load_config
from earlyexit_ssd.pipeline import replay


@pytest.mark.parametrize(
    ("reference", "measured", "expected"),
    [
        ("full", ("CALIB",), {"TRAIN": False, "CALIB": True, "TEST": False}),
        ("labels", ("CALIB",), {"TRAIN": True, "CALIB": True, "TEST": False}),
        ("full", ("CALIB", "TEST"), {"TRAIN": False, "CALIB": True, "TEST": True}),
    ],
)
def test_what_measures_needs_labels(monkeypatch, reference, measured, expected):
    """Photos that nobody labelled would stand for some that show nothing."""
    asked = {}

    def load_dataset(cfg, names, need_boxes, unlabelled):
        asked[next(split for split in ("TRAIN", "CALIB", "TEST") if cfg.DATA[split] == names)] = need_boxes

    class Loaded(Exception):
        pass

    def require_disjoint(**sets):
        raise Loaded

    monkeypatch.setattr(replay, "load_dataset", load_dataset)
    monkeypatch.setattr(replay, "distinct", lambda dataset, near: (dataset, None))
    monkeypatch.setattr(replay, "require_disjoint", require_disjoint)
    with pytest.raises(Loaded):
        replay.disjoint_sets(load_config(None, ["CALIBRATION.REFERENCE", reference]), measured)
    assert asked == expected
