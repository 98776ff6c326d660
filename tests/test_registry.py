"""Every decorator that registers an extension refuses the same mistakes."""

import pytest

from earlyexit_ssd.data import register_format
from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.evaluation.metrics import operating_point, register_metric
from earlyexit_ssd.modeling.branches import register_branch
from earlyexit_ssd.modeling.detector import register_detector
from earlyexit_ssd.registry import Registry
from earlyexit_ssd.routing import register_policy


@pytest.mark.parametrize(
    ("register", "value", "message"),
    [
        (register_policy("entropy"), len, "routing policy 'entropy'"),
        (register_branch("light"), len, "branch 'light'"),
        (register_detector("ssd300_vgg16"), type("Mine", (), {}), r"detector \(MODEL.NAME\) 'ssd300_vgg16'"),
        (register_format("coco", len, malformed_line="dropped"), len, "data format 'coco'"),
        (register_metric(), operating_point, "metric 'operating_point'"),
    ],
)
def test_a_name_is_registered_once(register, value, message):
    with pytest.raises(EarlyExitError, match=f"^{message} is registered already; choose another name"):
        register(value)


@pytest.mark.parametrize("decorator", [register_policy, register_branch, register_detector])
def test_a_decorator_without_a_name_is_refused(decorator):
    with pytest.raises(EarlyExitError, match=r"registered under .*, expected a name; .* brackets of the decorator"):
        decorator(len)(len)


def test_a_metric_without_brackets_is_refused():
    with pytest.raises(EarlyExitError, match=r"expected a dict; write @register_metric\(\)"):
        register_metric(len)


def test_an_unknown_name_suggests_the_nearest():
    fruit = Registry("fruit")
    fruit.register("apple", 1)
    assert fruit.find("apple") == 1
    message = r"fruit is 'aple', expected one of apple, or a name that an imported module registers \(did you mean"
    with pytest.raises(EarlyExitError, match=message):
        fruit.find("aple")
    with pytest.raises(EarlyExitError, match=r"fruit is \['apple'\]"):
        fruit.find(["apple"])
