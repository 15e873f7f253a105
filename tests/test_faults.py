"""docs/reliability.md is what the marks of the tests say, and these are the marks that pytest sees."""

import pytest

from tests import faults
from tests.documents import ROOT


def test_the_page_is_fresh() -> None:
    page = (ROOT / "docs/reliability.md").read_text(encoding="utf-8")
    assert page == faults.page(), "write it again: python -m tests.faults > docs/reliability.md"


def test_pytest_sees_the_same_marks(request: pytest.FixtureRequest) -> None:
    """Of all tests that run together with this one."""
    linked = {(test.file, test.name, number) for number, tests in faults.marked().items() for test in tests}
    for item in request.session.items:
        file = item.path.relative_to(faults.TESTS).as_posix()
        for mark in item.iter_markers("fault"):
            assert {(file, item.name.partition("[")[0], number) for number in mark.args} <= linked


def test_a_mark_of_no_fault_is_refused(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "test_x.py").write_text("@pytest.mark.fault(3, 21)\ndef test_x(): pass\n")
    monkeypatch.setattr(faults, "TESTS", tmp_path)
    with pytest.raises(ValueError, match="test_x is marked with fault 21; there is no such fault"):
        faults.marked()


def test_marks_of_files_classes_and_functions(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "test_a.py").write_text(
        "pytestmark = [pytest.mark.fault(1), pytest.mark.slow]\n"
        "def test_one(): pass\n@pytest.mark.fault(2)\ndef test_two(): pass\ndef helper(): pass\n"
    )
    (tmp_path / "test_b.py").write_text(
        "class TestIt:\n    @pytest.mark.fault(2, 2)\n    def test_three(self): pass\n"
        "@pytest.mark.fault(1)\n@pytest.mark.slow\ndef test_four(): pass\ndef test_five(): pass\n"
        "@pytest.mark.fault(3)\ndef helper(): pass\n"
    )
    monkeypatch.setattr(faults, "TESTS", tmp_path)
    found = faults.marked()
    assert found[1] == [
        ("test_a.py", "test_one", True),
        ("test_a.py", "test_two", True),
        ("test_b.py", "test_four", True),
    ]
    assert found[2] == [("test_a.py", "test_two", True), ("test_b.py", "test_three", False)]
    assert not any(found[number] for number in faults.FAULTS if number > 2)
