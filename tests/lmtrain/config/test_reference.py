"""docs/config.md says what the schema says."""

from pathlib import Path

from lmtrain.config.reference import reference
from lmtrain.config.schema import SECTIONS

PAGE = Path(__file__).parents[3] / "docs" / "config.md"


def test_the_page_is_fresh() -> None:
    assert PAGE.read_text(encoding="utf-8") == reference(), (
        "write it again: python -m lmtrain.config.reference > docs/config.md"
    )


def test_every_setting_has_a_meaning() -> None:
    for name, section in SECTIONS.items():
        for field in section.__dataclass_fields__.values():
            assert field.metadata["meaning"], f"{name}.{field.name}"
