"""From names in the configuration to a data set that is ready to load."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from fvcore.common.config import CfgNode

from earlyexit_ssd.data import catalog
from earlyexit_ssd.data.checks import check_boxes, clip_boxes
from earlyexit_ssd.data.classes import few, limit_negatives, limit_photos, select_classes, union_of_classes
from earlyexit_ssd.data.dataset import DetectionDataset
from earlyexit_ssd.data.disjoint import require_unique
from earlyexit_ssd.data.photos import check_photos, drop_repeated_files
from earlyexit_ssd.data.problems import Problems
from earlyexit_ssd.data.records import RawDataset
from earlyexit_ssd.data.transforms import build_transforms
from earlyexit_ssd.errors import DataError

logger = logging.getLogger(__name__)

NO_CLASS = "{} names no class; set DATA.CLASSES to what is to be detected"


def load_dataset(
    cfg: CfgNode,
    names: str | Sequence[str],
    train: bool = False,
    need_boxes: bool | None = None,
    unlabelled: bool = False,
) -> DetectionDataset:
    """Read, check and join data sets, and keep the wanted classes.

    Args:
        cfg: the whole configuration; its ``DATA`` node and ``SEED`` are used.
        names: names of the catalog or of ``DATA.DATASETS``.
        train: limit the negatives, augment, and leave out objects to ignore.
        need_boxes: refuse a set without any wanted object, by default in training alone, and photos that nobody
            labelled, unless it is False.
        unlabelled: photos that nobody labelled may stand where boxes are needed: the full path says what is there.

    Raises:
        ConfigError: an unknown data set.
        DataError: missing files, a broken record (``DATA.ON_BAD`` "refuse"), an unknown class, no photo left.
    """
    names = (names,) if isinstance(names, str) else tuple(names)
    data = cfg.DATA
    raws = [read_dataset(cfg, name) for name in names]
    classes = tuple(data.CLASSES) or (union_of_classes(raws) if names == tuple(data.TRAIN) else class_names(cfg))
    if not classes and not any(raw.labelled for raw in raws):
        raise DataError(NO_CLASS.format(" + ".join(names)))
    labelled = all(raw.labelled for raw in raws)
    if need_boxes is not False and not unlabelled:
        _require_labelled(raws, train)
    records = select_classes(raws, classes, train)
    if train:
        records = limit_negatives(records, data.NEGATIVE_SHARE, cfg.SEED)
    records = limit_photos(records, data.LIMIT, cfg.SEED)
    problems = Problems(data.ON_BAD)
    records = clip_boxes(check_photos(records, problems), problems)
    title = " + ".join(names)
    problems.log(title)
    if not records:
        raise DataError(f"{title}: no usable photo is left; check the folder of the photos")
    transforms = build_transforms(data.AUGMENTATION) if train else None
    if len(names) > 1:
        require_unique(title, records)
    flags = [annotation.ignore for record in records for annotation in record.annotations]
    ignored, objects = sum(flags), len(flags) - sum(flags)
    negatives = sum(not record.has_targets for record in records)
    if not objects and (labelled or not unlabelled) and (train if need_boxes is None else need_boxes):
        wanted, purpose = few(classes) or "any class", "learnt" if train else "measured"
        fixes = ["add photos that show it", "name other DATA.CLASSES"]
        fixes += ["let the full path teach (LOSS.SUPERVISION teacher)"] if train else []
        found = f"no box of {wanted}"
        if ignored:
            found = f"{ignored} boxes of {wanted}, all of them marked iscrowd, difficult or ignore,"
            fixes[0] = "set these flags to 0 where the objects are ordinary ones (mask exports write iscrowd 1)"
        raise DataError(f"{title}: {found} in {len(records)} photos; nothing can be {purpose}: {', or '.join(fixes)}")
    also = f" and {ignored} to ignore" if ignored else ""
    without = f"{negatives} photos without any" if labelled else "nobody labelled some of the photos"
    logger.info("%s: %d photos, %d boxes%s, %s", title, len(records), objects, also, without)
    return DetectionDataset(records, classes, transforms, train, cfg.SEED, data.ON_BAD, labelled)


def _require_labelled(raws: Sequence[RawDataset], train: bool) -> None:
    """Where boxes teach or measure, a photo that nobody labelled would stand for one that shows nothing."""
    for raw in raws:
        if not raw.labelled:
            fix = ", or let the full path teach, without a joint phase (LOSS.SUPERVISION teacher)" if train else ""
            raise DataError(
                f"data set '{raw.name}' is a folder of photos that nobody labelled, and boxes are needed here; "
                f"name data sets with boxes{fix}"
            )


def read_dataset(cfg: CfgNode, name: str) -> RawDataset:
    """One data set with usable boxes and all of its classes; its photo files are not yet looked at.

    Raises:
        ConfigError, DataError: as :func:`load_dataset`.
    """
    problems = Problems(cfg.DATA.ON_BAD)
    raw = drop_repeated_files(check_boxes(catalog.load(name, cfg.DATA, problems), problems), problems)
    problems.log(name)
    return raw


def class_names(cfg: CfgNode) -> tuple[str, ...]:
    """The classes of the run, in label order: ``DATA.CLASSES``, or every class of the training sets."""
    if cfg.DATA.CLASSES:
        return tuple(cfg.DATA.CLASSES)
    names = union_of_classes([catalog.load(name, cfg.DATA, Problems("repair")) for name in cfg.DATA.TRAIN])
    if not names:
        raise DataError(NO_CLASS.format(" + ".join(cfg.DATA.TRAIN)))
    return names
