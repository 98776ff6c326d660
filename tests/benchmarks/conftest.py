"""Fixtures of other test folders that the tests of the studies use."""

from tests.evaluation.conftest import found, ground_truth, random_case, small_model  # noqa: F401
from tests.tools.conftest import data_root, quick, tiny, trained, without_evaluation  # noqa: F401
