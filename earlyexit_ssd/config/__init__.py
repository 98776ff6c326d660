"""Configuration: one documented default tree, YAML files over it, checked before anything runs."""

from earlyexit_ssd.config.check import (
    C4_LAYER,
    CLOSED,
    FOLDS,
    LARGEST_SIDE,
    LAST_LAYER,
    LOSS_CHOICES,
    MOST_CHANNELS,
    MOST_WIDTH,
    PHASE_SECTIONS,
    PHASES,
    TAIL_BLOCKS,
    check_config,
    num_exits,
)
from earlyexit_ssd.config.load import get_cfg, load_config

__all__ = [
    "C4_LAYER",
    "CLOSED",
    "FOLDS",
    "LARGEST_SIDE",
    "LAST_LAYER",
    "LOSS_CHOICES",
    "MOST_CHANNELS",
    "MOST_WIDTH",
    "PHASES",
    "PHASE_SECTIONS",
    "TAIL_BLOCKS",
    "check_config",
    "get_cfg",
    "load_config",
    "num_exits",
]
