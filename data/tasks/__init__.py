"""Synthetic tasks as corpora: importing this registers all of them in `TASKS`."""

from data.tasks import induction, mqar, passkey, selective_copy  # noqa: F401 - each registers itself
from data.tasks.dataset import HELD_OUT_SEED, TaskDataset, TaskLoader
from data.tasks.task import TASKS, Task

__all__ = ["HELD_OUT_SEED", "TASKS", "Task", "TaskDataset", "TaskLoader"]
