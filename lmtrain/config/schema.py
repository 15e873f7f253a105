"""The schema: every setting with its type, default, range and meaning. It makes errors and docs/config.md."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from attention.divisors import largest_divisor
from data.corpora import CORPORA
from data.corpora.contract import DEFAULT_ALPHABET, DEFAULT_COLUMN, DEFAULT_SPLIT, DEFAULT_VALIDATION
from data.mixture import MIXTURE
from data.tasks import TASKS, Task

MICRO_BATCH_TOKENS = 16384
"""Most tokens that a derived micro-batch holds."""

BYTE_VOCABULARY = 256

if TYPE_CHECKING:
    CorpusName = str
else:  # one of those that are registered
    CorpusName = Literal[(*CORPORA, MIXTURE, *TASKS)]


def setting(
    default: Any,
    meaning: str,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> Any:
    """A field of a section: its default, what it means, its range (of each element, if it has several).

    The metadata are those of `attention.mixer.setting`, so settings of mixers are read by the same code.
    """
    limits = {"at_least": at_least, "above": above, "at_most": at_most, "below": below}
    return field(default=default, metadata={"meaning": meaning, **limits})


@dataclass
class RunConfig:
    """The run itself."""

    dir: str | None = setting(None, "folder of the run; null = runs/ and the name of the config")
    seed: int = setting(1337, "of weights, dropout and the order of samples", at_least=0)


@dataclass
class DataConfig:
    """What is read."""

    corpus: CorpusName = setting(  # noqa: RUF009 - a name is immutable
        "stdlib",
        "`text`, `jsonl`: files of your own; `hub`: a dataset of the hub; `enwik8`, `text8`, `pg19`, `wikitext2`, "
        "`wikitext103`; `stdlib`: the Python sources on this machine; `iid`: independent uniform letters, which nobody "
        "predicts without seeing them ([data.md](data.md)); `mixture` of several; or a synthetic task",
    )
    task: dict[str, Any] = field(
        default_factory=dict, metadata={"meaning": "settings of the synthetic task that is the corpus; see below"}
    )
    mixture: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "meaning": "texts of the corpus `mixture`: name -> weight, or {weight: ..., corpus: ..., its settings}; a "
            "text is called as its corpus unless that is given"
        },
    )
    path: str | None = setting(
        None,
        "file, folder or pattern; a relative one is looked up here, then in `$LMTRAIN_DATA`. `hub`: the name of the "
        "dataset, or a folder laid out like one",
    )
    validation: str = setting(
        DEFAULT_VALIDATION,
        "what validates: a share at the end of the text, or the path of a text; `hub`: or the name of a split",
    )
    alphabet: int = setting(
        DEFAULT_ALPHABET,
        "letters of the corpus `iid`: at best it costs log2 of it bits per byte",
        at_least=2,
        at_most=26,
    )
    column: str = setting(DEFAULT_COLUMN, "the column of a table that holds the text (`jsonl`, `hub`)")
    subset: str | None = setting(None, "of a dataset of the hub that has several, the one that is meant")
    split: str = setting(DEFAULT_SPLIT, "of a dataset of the hub, the split that trains")
    revision: str | None = setting(None, "of a dataset of the hub: branch, tag or commit; null = the newest")
    streaming: bool = setting(False, "read a dataset of the hub while it arrives, without a copy of its files")
    tokenizer: str = setting(
        "bytes",
        "`bytes`; the `characters` of the training text; `bpe`: pairs of bytes, learnt from it; or the path of a "
        "tokenizer.json",
    )
    vocab_size: int = setting(32000, "tokens of the tokenizer bpe", at_least=257, at_most=1 << 20)
    seq_len: int = setting(1024, "tokens of a training sequence", at_least=1)
    documents: Literal["concatenate", "reset"] = setting(
        "concatenate", "`reset`: documents packed into one sequence do not see each other"
    )
    stream: bool = setting(
        False,
        "each row of a batch is one continuous text, read in segments of seq_len tokens; what the mixers remember is "
        "carried along",
    )
    skip: str | None = setting(
        None,
        "samples that are never read, say after a spike of the loss: `1000:1100, 5000:5200`, without the last ones",
    )
    carry: int | None = setting(
        None, "carried along, no key lives for more tokens than that; null = 4 x seq_len", at_least=1
    )
    cache: str | None = setting(None, "folder of prepared tokens; null = `$LMTRAIN_CACHE`, or ~/.cache/lmtrain")


@dataclass
class TrainConfig:
    """How far and in what pieces."""

    steps: int = setting(1000, "optimizer steps", at_least=1)
    batch_tokens: int = setting(16384, "tokens of one step, over all ranks; a multiple of data.seq_len", at_least=1)
    micro_batch: int | None = setting(
        None,
        f"sequences of one forward pass; null = as many as fit in {MICRO_BATCH_TOKENS:,} tokens",
        at_least=1,
    )
    dtype: Literal["float32", "bfloat16", "float16"] = setting("float32", "of matrix products; weights stay float32")
    clip: float = setting(1.0, "largest gradient norm; 0 = off", at_least=0)
    activation_checkpointing: bool = setting(False, "compute each layer again in the backward pass, to save memory")
    compile: bool = setting(False, "compile the model with torch.compile")
    threads: int | None = setting(None, "CPU threads; null = torch's choice", at_least=1, at_most=4096)
    max_time: str | None = setting(
        None,
        "seconds, or as `1h30m`: before it has trained for so long, the process saves and stops with exit code 75; the "
        "same command goes on",
    )
    max_skips: int = setting(
        10, "updates skipped in a row, as not finite or by `spikes`, before training rolls back", at_least=1
    )
    max_rollbacks: int = setting(
        3,
        "roll-backs to the last good checkpoint, never to read again what was read since; then it gives up",
        at_least=0,
    )
    spikes: Literal["log", "skip", "rollback"] = setting(
        "log", "a step far above what is usual is told, its update is skipped, or training rolls back"
    )
    spike_limit: float = setting(
        6.0,
        "what is far: standard deviations of the loss above the median of the last 128, by their median absolute "
        "deviation; for the logarithm of the gradient norm twice as many",
        above=0,
    )


@dataclass
class OptimizerConfig:
    """How weights move."""

    kind: Literal["adamw", "muon"] = setting("adamw", "`muon`: Muon for matrices, AdamW for the rest")
    lr: float = setting(1e-3, "peak learning rate", above=0)
    betas: tuple[float, float] = setting((0.9, 0.95), "decay of the two moments", at_least=0, below=1)
    eps: float = setting(1e-8, "added to the root of the second moment", above=0)
    weight_decay: float = setting(0.1, "of matrices; vectors and routers do not decay", at_least=0)
    schedule: Literal["cosine", "wsd", "constant"] = setting(
        "cosine", "after the warm-up: `cosine`, `wsd` (stable, then decay), `constant`"
    )
    warmup: float = setting(0.05, "share of the steps in which the rate rises", at_least=0, at_most=1)
    final: float = setting(0.1, "last learning rate as a share of the peak (cosine, wsd)", at_least=0, at_most=1)
    decay: float = setting(0.2, "wsd: share of the steps, at the end, in which the rate falls", at_least=0, at_most=1)


@dataclass
class LogConfig:
    """What is told."""

    every: int = setting(10, "steps between two rows of metrics.jsonl", at_least=1)
    tensorboard: bool = setting(True, "write TensorBoard files too")


@dataclass
class EvalConfig:
    """Evaluation during training, and its protocol."""

    every: int = setting(250, "steps between two evaluations; 0 = only at the end", at_least=0)
    tokens: int = setting(262144, "most tokens scored by an evaluation in training", at_least=1)
    context: int | None = setting(None, "most tokens that a scored token may see; null = data.seq_len", at_least=1)
    stride: int | None = setting(None, "new tokens scored per window; null = eval.context", at_least=1)


@dataclass
class CheckpointConfig:
    """What is kept."""

    every: int = setting(250, "steps between two checkpoints; the last step always has one", at_least=1)
    keep: int = setting(3, "newest checkpoints kept, of those that verify", at_least=1)
    asynchronous: bool | None = setting(
        None,
        "written by a thread from a copy in CPU memory while training goes on; null = if a GPU trains: on a CPU the "
        "thread and its copy take what training needs",
    )


@dataclass
class ParallelConfig:
    """Who computes."""

    engine: Literal["torch", "deepspeed"] = setting(
        "torch", "`torch`: every rank holds everything; `deepspeed`: by ZeRO each holds a part"
    )
    sequence: int = setting(
        1, "ranks that share each sequence, every one a slice of its tokens; divides the processes", at_least=1
    )
    zero: int = setting(
        2, "with deepspeed, what is in parts: 1 moments, 2 gradients too, 3 weights too", at_least=1, at_most=3
    )
    offload: bool = setting(False, "with deepspeed: moments, and weights if in parts, lie in the memory of the CPU")
    deepspeed: dict[str, Any] = field(
        default_factory=dict,
        metadata={"meaning": "with deepspeed: settings of its own JSON, added to those that are generated"},
    )
    timeout: float = setting(
        600.0,
        "seconds after which a job of several ranks ends because one of them is silent or none comes any further: more "
        "than a micro-batch takes",
        above=0,
    )


@dataclass
class ModelConfig:
    """The decoder."""

    dim: int = setting(256, "width of the residual stream", at_least=1, at_most=2**16)
    layers: int = setting(4, "residual blocks", at_least=1, at_most=2**16)
    mixers: dict[str, dict[str, Any]] = field(
        default_factory=dict, metadata={"meaning": "name -> {kind: a mixer, and its settings}; see below"}
    )
    pattern: str = setting(
        "", "names of mixers, one word per layer, repeated over the layers; `a+b`: both, side by side"
    )
    vocab_size: int | None = setting(None, "rows of the embedding; null = those of the tokenizer", at_least=1)
    norm: Literal["rmsnorm", "layernorm"] = setting("rmsnorm", "norm in front of each branch")
    ffn: Literal["swiglu", "gelu"] = setting("swiglu", "feed-forward layer")
    ffn_dim: int | None = setting(None, "its width; null = 8/3 dim rounded up to 64 (swiglu), 4 dim (gelu)", at_least=1)
    learned_positions: int | None = setting(
        None,
        "rows of a learned position table; at least data.seq_len and eval.context (mixers: `rotary: 0`)",
        at_least=1,
    )
    tied: bool = setting(False, "the head is the embedding")
    dropout: float = setting(0.0, "of the embedding and of each branch", at_least=0, below=1)
    init_std: float | None = setting(
        None,
        "of the first weights; null = fan_in^-1/2. Outputs to the residual: times (2 layers)^-1/2",
        above=0,
    )

    @property
    def hidden(self) -> int:
        """ffn_dim, filled in."""
        if self.ffn_dim is not None:
            return self.ffn_dim
        return 4 * self.dim if self.ffn == "gelu" else -(-8 * self.dim // (3 * 64)) * 64


@dataclass
class Config:
    """All settings of a run, checked and resolved.

    interpolations: for each key written with `${...}`, the text as written and the value it had. Saved is the
    text: it may name an environment variable whose value is a secret.
    """

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    log: LogConfig = field(default_factory=LogConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    interpolations: dict[str, tuple[str, Any]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def batch_sequences(self) -> int:
        """Sequences of one optimizer step, over all ranks."""
        return self.train.batch_tokens // self.data.seq_len

    def micro_batch(self, ranks: int = 1) -> int:
        """Sequences of one forward pass on each of `ranks` that read sequences of their own.

        Unless set, the largest divisor of a rank's share whose tokens fit in MICRO_BATCH_TOKENS; at least 1.
        """
        if self.train.micro_batch is not None:
            return self.train.micro_batch
        return largest_divisor(self.batch_sequences // ranks, max(1, MICRO_BATCH_TOKENS // self.data.seq_len))

    @property
    def task(self) -> Task:
        """The synthetic task that data.corpus names."""
        return TASKS[self.data.corpus](**self.data.task)

    @property
    def known_vocabulary(self) -> int | None:
        """Tokens of the text, where these are known without reading it."""
        if self.data.corpus in TASKS:
            return self.task.vocab_size
        return BYTE_VOCABULARY if self.data.tokenizer == "bytes" else None

    @property
    def assumed_vocabulary(self) -> int:
        """model.vocab_size; before the text is read, the most that its tokenizer may make, or that of bytes."""
        if self.model.vocab_size is not None:
            return self.model.vocab_size
        return self.data.vocab_size if self.data.tokenizer == "bpe" else BYTE_VOCABULARY

    @property
    def carry(self) -> int:
        """data.carry, filled in."""
        return self.data.carry or 4 * self.data.seq_len

    @property
    def eval_context(self) -> int:
        """eval.context, filled in."""
        return self.eval.context or self.data.seq_len

    @property
    def eval_stride(self) -> int:
        """eval.stride, filled in."""
        return self.eval.stride or self.eval_context


SECTIONS: dict[str, Any] = {
    name: hint for name, hint in typing.get_type_hints(Config).items() if dataclasses.is_dataclass(hint)
}
"""The sections by name, in the order of the file."""
