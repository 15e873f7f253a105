"""What all tests of mixers and operations share."""

import pytest


@pytest.fixture(autouse=True)
def small_products(one_thread: None) -> None:
    """Matrices are small in every test here."""
