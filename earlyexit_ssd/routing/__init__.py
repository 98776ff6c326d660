"""Routing: which exit each image takes."""

from earlyexit_ssd.modeling.pretrained import register_router
from earlyexit_ssd.routing.policies import POLICIES, get_policy
from earlyexit_ssd.routing.router import ExitRouter

register_router(ExitRouter)

__all__ = ["POLICIES", "ExitRouter", "get_policy"]
