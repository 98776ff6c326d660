"""The configuration: documented defaults, overridden by YAML files, and checked before anything runs."""

from earlyexit_ssd.config.check import CLOSED, PHASE_SECTIONS
from earlyexit_ssd.config.load import get_cfg, load_config

__all__ = ["CLOSED", "PHASE_SECTIONS", "get_cfg", "load_config"]
