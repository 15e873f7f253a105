"""Every registered mixer, in every case of its oracle, goes through the whole suite."""

import pytest

from attention.mixer import MIXERS
from tests.conformance.oracle import Case, Subject, load, missing


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`subject`: every case of every mixer; `typical`: the first case of every mixer."""
    for fixture, first_only in (("subject", False), ("typical", True)):
        if fixture in metafunc.fixturenames:
            parameters = [p for kind in sorted(MIXERS) for p in _subjects(kind)[: 1 if first_only else None]]
            metafunc.parametrize(fixture, parameters, indirect=True)


def _subjects(kind: str) -> list:
    if missing(kind):
        return [pytest.param(Subject(kind, Case()), id=kind)]
    return [pytest.param(Subject(kind, case), id=f"{kind} {name}") for name, case in load(kind).cases().items()]


def _with_oracle(request: pytest.FixtureRequest) -> Subject:
    sentence = missing(request.param.kind)
    if sentence:
        pytest.fail(sentence, pytrace=False)
    return request.param


@pytest.fixture(autouse=True)
def small_products(one_thread: None) -> None:
    """Matrices are small in every test here."""


@pytest.fixture
def subject(request: pytest.FixtureRequest) -> Subject:
    """A mixer in one setting."""
    return _with_oracle(request)


@pytest.fixture
def typical(request: pytest.FixtureRequest) -> Subject:
    """A mixer in the setting that stands for it in a whole model."""
    return _with_oracle(request)
