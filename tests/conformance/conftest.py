"""Every registered mixer, in every case of its oracle, goes through the whole suite."""

from collections.abc import Iterator

import pytest
import torch

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
def one_thread() -> Iterator[None]:
    """Matrices are small here: a second thread would cost more than it does."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def subject(request: pytest.FixtureRequest) -> Subject:
    """A mixer in one setting."""
    return _with_oracle(request)


@pytest.fixture
def typical(request: pytest.FixtureRequest) -> Subject:
    """A mixer in the setting that stands for it in a whole model."""
    return _with_oracle(request)
