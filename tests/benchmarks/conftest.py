"""The studies take their cases from the tests of the package and of its tools."""

from tests.evaluation.conftest import found, ground_truth, random_case, small_model  # noqa: F401
from tests.tools.conftest import data_root, plain_charts, tiny, trained, without_evaluation  # noqa: F401
