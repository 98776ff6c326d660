"""Seeds from tuples of numbers."""

from hypothesis import given
from hypothesis import strategies as st

from earlyexit_ssd.data.seeding import mixed_seed


def test_pinned():
    """A change here would change the views of every run that is resumed."""
    assert mixed_seed(0, 3, 7) == 6812392217526899882
    assert len({mixed_seed(s, e, i) for s in range(4) for e in range(4) for i in range(20)}) == 320


@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=4))
def test_range(numbers):
    assert 0 <= mixed_seed(*numbers) < 2**63
