"""What DeepSpeed does to its process, and what it must not do."""

import os
import subprocess
import sys
from pathlib import Path

from parallel.world import World
from tests.processes import SECONDS, begin, run_ranks

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

ALONE_TWICE = """
import os
import torch
from torch.nn import functional
from lmtrain.config import OptimizerConfig
from lmtrain.optimizer import torch_adamw
from parallel.deepspeed import DeepSpeedEngine
from tests.parallel.test_engine import Bigram, batch

linear, seen = functional.linear, []
for stage in (3, 1, 2):
    model = Bigram()
    engine = DeepSpeedEngine(model, torch_adamw(model, OptimizerConfig()), device=torch.device("cpu"), stage=stage)
    assert os.environ["LOCAL_RANK"] == "0"
    tokens, labels = batch()
    engine.backward(engine.forward_loss(tokens, labels, None, int((labels >= 0).sum()), seed=0))
    seen.append(engine.step(0.1).loss)
    engine.close()
    assert functional.linear is linear, "another function stands in its place"
    assert not torch.distributed.is_initialized(), "a group is left behind"
    assert not any(name in os.environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"))
    torch.nn.functional.linear(torch.ones(2, 3), torch.ones(4, 3))
assert len(set(seen)) == 1
"""

NO_IMPORT = """
import sys
import lmtrain.setup, lmtrain.train
from lmtrain.config import load
load("demo", ["parallel.engine=deepspeed"])
assert "deepspeed" not in sys.modules
"""


TWO_WORLDS = """
import gc
import sys
from pathlib import Path
import torch
from torch.distributed import FileStore
from lmtrain.config import OptimizerConfig
from lmtrain.optimizer import torch_adamw
from parallel.deepspeed import DeepSpeedEngine, load_library
from parallel.world import join
from tests.parallel.test_engine import Bigram, batch

def of_gloo():
    return [task for task in Path("/proc/self/task").iterdir() if "gloo" in (task / "comm").read_text()]

def step(stage):
    with join(store=FileStore(f"{sys.argv[1]}-{stage}", 2)) as world:
        model = Bigram()
        adamw = torch_adamw(model, OptimizerConfig())
        engine = DeepSpeedEngine(model, adamw, device=torch.device("cpu"), stage=stage, world=world)
        tokens, labels = batch()
        engine.backward(engine.forward_loss(tokens, labels, None, 20, seed=0))
        engine.step(0.1)
        engine.close()
        assert of_gloo()

load_library()
for stage in (2, 3):
    step(stage)
    gc.collect()
    assert not of_gloo(), f"stage {stage}"
"""


def run_alone(program: str, tmp_path: Path) -> str:
    """What a process without a launcher says; it must end well, and compile nothing."""
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    extensions = tmp_path / "extensions"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**environment, "TORCH_EXTENSIONS_DIR": str(extensions)},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stderr
    assert not extensions.exists() or not list(extensions.iterdir())
    return done.stdout + done.stderr


def test_without_a_launcher_one_engine_after_the_other_and_not_a_word(tmp_path: Path) -> None:
    assert run_alone(ALONE_TWICE, tmp_path) == ""


def test_who_does_not_choose_it_does_not_import_it(tmp_path: Path) -> None:
    assert run_alone(NO_IMPORT, tmp_path) == ""


def test_one_world_after_the_other_and_no_thread_is_left(tmp_path: Path) -> None:
    started = [
        begin(
            [sys.executable, "-c", TWO_WORLDS, str(tmp_path / "store")],
            env={**os.environ, "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo"},
        )
        for rank in "01"
    ]
    assert [process.wait(SECONDS) for process in started] == [0, 0]


def builds(world: World) -> list[str]:
    """The extensions that are compiled or asked for while an engine starts and steps."""
    import torch
    from deepspeed.ops.op_builder.builder import OpBuilder

    from tests.parallel.test_deepspeed import engine_of, one_step

    asked: list[str] = []

    def refuse(builder: OpBuilder, *rest: object, **how: object) -> None:
        asked.append(builder.name)
        raise RuntimeError("nothing is compiled here")

    OpBuilder.load = OpBuilder.jit_load = refuse
    for stage, offload in ((1, False), (2, True), (3, True)):
        with engine_of(stage, world, offload=offload) as engine:
            one_step(engine, 0)
    assert torch.distributed.is_initialized()
    return asked


def test_nothing_is_compiled_at_start() -> None:
    assert run_ranks(2, builds) == [[], []]
