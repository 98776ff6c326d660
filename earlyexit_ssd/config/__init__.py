"""Configuration: one documented default tree, YAML files over it, checked before anything runs."""

from earlyexit_ssd.config.check import PHASE_SECTIONS, PHASES
from earlyexit_ssd.config.defaults import get_cfg
from earlyexit_ssd.config.load import load_config

__all__ = ["PHASES", "PHASE_SECTIONS", "get_cfg", "load_config"]
