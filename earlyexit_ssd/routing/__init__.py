"""Routing: which exit each photo takes."""

from earlyexit_ssd.routing.policies import POLICIES, FittedPolicy, RecordedPhotos, get_policy, register_policy
from earlyexit_ssd.routing.router import ExitRouter

__all__ = ["POLICIES", "ExitRouter", "FittedPolicy", "RecordedPhotos", "get_policy", "register_policy"]
