"""What a real run leaves behind is what a sweep reads of it."""

from pathlib import Path

from lmtrain.run import read_metrics
from lmtrain.sweep.collect import pace_and_memory
from lmtrain.train import DONE, train
from tests.lmtrain import tiny


def test_pace_and_memory_of_finished_runs(tmp_path: Path) -> None:
    for steps in (6, 12):
        folder = tmp_path / str(steps)
        folder.mkdir()
        assert train(tiny.config(folder, f"train.steps={steps}")) == DONE
        assert train(tiny.config(folder, f"train.steps={steps}")) == DONE, "it is asked again"
        pace, memory = pace_and_memory(folder / "run", 0)
        rates = [row["tokens_per_second"] for row in read_metrics(folder / "run") if "tokens_per_second" in row]
        assert min(rates) <= pace <= max(rates)
        assert memory > 1 << 20
