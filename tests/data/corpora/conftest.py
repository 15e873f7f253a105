"""What tests of datasets of the hub need."""

from pathlib import Path

import pytest


@pytest.fixture
def datasets_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `datasets` keeps for itself goes where the test ends; it is offline and draws no bars."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
