"""Routing: which exit each image takes, and what can be promised about it."""

from earlyexit_ssd.modeling.pretrained import register_router
from earlyexit_ssd.routing.certificate import Certificate, load_certificate, parse_certificate
from earlyexit_ssd.routing.drift import DriftMonitor
from earlyexit_ssd.routing.policies import POLICIES, get_policy, register_policy
from earlyexit_ssd.routing.router import ExitRouter

register_router(ExitRouter, lambda content, path, model: parse_certificate(content, path).router_for(model))

__all__ = [
    "POLICIES",
    "Certificate",
    "DriftMonitor",
    "ExitRouter",
    "get_policy",
    "load_certificate",
    "register_policy",
]
