"""What a run is: one frozen dataclass per section, every option with its default and its reason.

The tree of options is the tree of these classes: ``moe.router.name`` on the command line is
``RunConfig.moe.router.name`` here. Values that contradict each other inside one section are refused
by that section; values that contradict the model, the data or the machine are refused where the two
meet (`megamoe.parallel.ds_config`, `megamoe.training`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import PurePath
from typing import Any, Literal

from megamoe.errors import ConfigError

Auto = Literal["auto"]


def option(default: Any, help: str) -> Any:
    """A dataclass field with a help text, which `--help` and docs/configuration.md show."""
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


def _require(condition: bool, name: str, value: object, remedy: str) -> None:
    if not condition:
        raise ConfigError(f"{name} = {value!r}: {remedy}")


def require_positive(section: str, owner: object, *names: str) -> None:
    """Refuse fields `names` of `owner` that are not above 0; "auto" passes.

    Raises:
        ConfigError: which, as ``section.name``, and its value.
    """
    for name in names:
        value = getattr(owner, name)
        if value != "auto":
            _require(value > 0, f"{section}.{name}", value, "give a number above 0")


def require_not_negative(section: str, owner: object, *names: str) -> None:
    """Refuse fields that are below 0; as `require_positive`."""
    for name in names:
        value = getattr(owner, name)
        if value != "auto":
            _require(value >= 0, f"{section}.{name}", value, "give 0 or more")


def require_fraction(section: str, owner: object, *names: str) -> None:
    """Refuse fields that are no probability in [0, 1); as `require_positive`."""
    for name in names:
        value = getattr(owner, name)
        _require(0 <= value < 1, f"{section}.{name}", value, "give a probability in [0, 1)")


def divisors_near(number: int, wanted: int) -> list[int]:
    """The divisors of `number` next to `wanted`, below and above it."""
    below = [d for d in range(1, min(number, wanted) + 1) if number % d == 0]
    above = [d for d in range(wanted, number + 1) if number % d == 0]
    return sorted({*below[-1:], *above[:1]})


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which text is read, and in which units."""

    dataset: Literal["enwik8", "text8", "wikitext2", "wikitext103", "text"] = option(
        "enwik8", "corpus; it also names the figures that are reported"
    )
    path: str = option(
        "", "folder written by tools/prepare_data.py; empty reads the sample bundled with megamoe"
    )
    tokenizer: Literal["auto", "bytes", "reference_symbols", "words", "sentencepiece"] = option(
        "auto",
        "unit of text; auto: what the prepared folder holds; of bundled text bytes, or words of WikiText."
        " reference_symbols drops newline bytes as the published enwik8 loader does",
    )
    domains: str = option(
        "", "JSON file of the text's domains, for policies that look at them; see docs/data.md"
    )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Transformer-XL around the mixture layers."""

    vocab_size: int = option(0, "symbols; 0 takes it from the data")
    n_layers: int = option(4, "decoder layers")
    d_model: int = option(256, "model width D")
    n_heads: int = option(8, "attention heads")
    d_head: int = option(64, "width of one head; n_heads * d_head need not equal d_model")
    d_inner: int = option(512, "hidden width of the feed-forward in layers without experts")
    dropout: float = option(0.1, "dropout on embeddings, positions, sublayer outputs and hidden units")
    attention_dropout: float = option(0.0, "dropout on attention probabilities")
    pre_norm: bool = option(False, "LayerNorm before each sublayer instead of after its residual")
    segment_len: int = option(512, "tokens per training segment S")
    memory_len: int = option(512, "cached positions M per layer that attention also sees")
    same_length: bool = option(False, "let every token attend to equally many positions")
    clamp_len: int = option(0, "largest relative distance told apart; 0 tells all apart")
    cutoffs: tuple[int, ...] = option((), "vocabulary cut-offs of the adaptive softmax; empty: plain")
    div_val: int = option(1, "divide the embedding width by this factor from one cluster to the next")
    d_embed: int = option(0, "embedding width; 0 means d_model")
    tie_weights: bool = option(True, "share the embedding with the output layer")
    tie_projections: bool = option(False, "share the adaptive projections of the tail clusters too")
    init_std: float = option(0.02, "standard deviation of initial weights")
    projection_init_std: float = option(0.01, "the same for the adaptive projections")

    def __post_init__(self) -> None:
        require_positive(
            "model", self, "n_layers", "d_model", "n_heads", "d_head", "d_inner", "segment_len",
            "div_val", "init_std", "projection_init_std",
        )  # fmt: skip
        _require(self.n_layers <= 10_000, "model.n_layers", self.n_layers, "stay at or below 10000")
        require_fraction("model", self, "dropout", "attention_dropout")
        require_not_negative("model", self, "vocab_size", "memory_len", "clamp_len", "d_embed")
        _require(self.d_model % 2 == 0, "model.d_model", self.d_model,
                 "give an even width; positions are sine and cosine pairs")  # fmt: skip
        rising = all(a < b for a, b in zip((0, *self.cutoffs), self.cutoffs, strict=False))
        _require(rising, "model.cutoffs", self.cutoffs, "give rising positive numbers")
        if self.vocab_size and self.cutoffs:
            _require(self.cutoffs[-1] < self.vocab_size, "model.cutoffs", self.cutoffs,
                     f"stay below the vocabulary of {self.vocab_size}")  # fmt: skip


OF_THE_VOCABULARY = ("vocab_size", "cutoffs", "div_val", "d_embed")
"""Options of `ModelConfig` that follow from how text is cut into tokens."""


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """A routing policy by name, and that policy's own options."""

    name: str = option("hyper", "routing policy; `megamoe routers` lists them")
    options: Mapping[str, Any] = option(
        {},
        "options of that policy, written moe.router.OPTION=VALUE; `megamoe routers NAME` lists them",
    )


@dataclass(frozen=True, kw_only=True)
class TopKScheduleConfig:
    """How many experts a token gets while training, as a function of the step."""

    mode: Literal[
        "constant", "linear_increase", "linear_decrease", "cosine_increase", "cosine_decrease",
        "exp_increase", "multi_step_increase", "multi_step_decrease",
    ] = option("constant", "shape of the curve; constant trains at moe.top_k")  # fmt: skip
    min_k: int = option(8, "smallest k")
    max_k: int = option(16, "largest k")
    steps: int = option(0, "steps over which k moves; 0 means training.max_steps")

    def __post_init__(self) -> None:
        require_positive("moe.schedule", self, "min_k", "max_k")
        require_not_negative("moe.schedule", self, "steps")
        _require(self.min_k <= self.max_k, "moe.schedule.min_k", self.min_k,
                 f"stay at or below moe.schedule.max_k = {self.max_k}")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """The mixture layers."""

    layers: str = option("all", 'layers with experts: "all", "none", or 0-based indices as 0,1,2')
    n_experts: int = option(16, "experts E per mixture layer")
    d_expert: int = option(512, "hidden width F of one expert")
    top_k: int = option(2, "experts per token where no schedule is in force; the default at evaluation")
    ep_size: int | Auto = option("auto", "ranks that share one set of experts; auto: as many as divide")
    balance_loss: float | Auto = option(
        "auto",
        "weight of the load-balance loss, E * sum_e f_e P_e, 1 at balance; auto: what the policy was"
        " published with",
    )
    z_loss: float = option(0.0, "weight of the router z-loss, mean of logsumexp(logits)^2")
    router: RouterConfig = field(default_factory=RouterConfig)
    schedule: TopKScheduleConfig = field(default_factory=TopKScheduleConfig)

    def __post_init__(self) -> None:
        require_positive("moe", self, "n_experts", "d_expert", "top_k", "ep_size")
        _require(self.top_k <= self.n_experts, "moe.top_k", self.top_k,
                 f"stay at or below moe.n_experts = {self.n_experts}")  # fmt: skip
        if self.schedule.mode != "constant":
            _require(self.schedule.max_k <= self.n_experts, "moe.schedule.max_k",
                     self.schedule.max_k, f"stay at or below moe.n_experts = {self.n_experts}")  # fmt: skip
        if self.ep_size != "auto":
            nearest = " or ".join(map(str, divisors_near(self.n_experts, self.ep_size)))
            _require(self.n_experts % self.ep_size == 0, "moe.ep_size", self.ep_size,
                     f"give a divisor of moe.n_experts = {self.n_experts}, such as {nearest}")  # fmt: skip
        require_not_negative("moe", self, "balance_loss", "z_loss")

    def layer_indices(self, n_layers: int) -> tuple[int, ...]:
        """The 0-based layers that hold experts, rising.

        Raises:
            ConfigError: `layers` names a layer that the model lacks, or is not a list of numbers.
        """
        if self.layers in ("all", "none"):
            return tuple(range(n_layers)) if self.layers == "all" else ()
        try:
            indices = sorted({int(index) for index in self.layers.split(",")})
        except ValueError:
            raise ConfigError(
                f'moe.layers = {self.layers!r}: give "all", "none", or indices such as 0,1,2'
            ) from None
        _require(0 <= indices[0] and indices[-1] < n_layers, "moe.layers", self.layers,
                 f"name layers 0 to {n_layers - 1} only")  # fmt: skip
        return tuple(indices)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Adam and the learning rate as a function of the step."""

    name: Literal["adam", "adamw"] = option("adam", "adam couples weight decay, adamw decouples it")
    lr: float = option(2.5e-4, "peak learning rate")
    betas: tuple[float, float] = option((0.9, 0.999), "decay of the two moments")
    eps: float = option(1e-8, "added to the root of the second moment")
    weight_decay: float = option(0.0, "applied to weight matrices; never to biases and norms")
    schedule: Literal["cosine", "inv_sqrt", "plateau", "constant"] = option(
        "cosine", "curve after warm-up; plateau lowers the rate when validation stops improving"
    )
    warmup_steps: int = option(0, "steps of linear warm-up")
    min_lr: float = option(0.0, "floor of the cosine and plateau curves")
    decay_rate: float = option(0.5, "plateau: factor by which the rate falls")
    patience: int = option(0, "plateau: evaluations without improvement before the rate falls")

    def __post_init__(self) -> None:
        require_positive("optimizer", self, "lr", "eps")
        _require(all(0 <= beta < 1 for beta in self.betas), "optimizer.betas", self.betas,
                 "give two numbers in [0, 1)")  # fmt: skip
        _require(0 < self.decay_rate < 1, "optimizer.decay_rate", self.decay_rate,
                 "give a number between 0 and 1")  # fmt: skip
        require_not_negative("optimizer", self, "weight_decay", "warmup_steps", "min_lr", "patience")
        _require(self.min_lr <= self.lr, "optimizer.min_lr", self.min_lr,
                 f"stay at or below optimizer.lr = {self.lr:g}")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The loop."""

    max_steps: int = option(400_000, "optimizer steps of the whole run")
    batch_size: int = option(22, "token streams per optimizer step over all ranks")
    micro_batch_size: int | Auto = option(
        "auto", "streams per rank and forward pass; auto: batch_size / ranks, without accumulation"
    )
    seed: int = option(1111, "seed of initial weights, dropout and every random decision")
    grad_clip: float = option(0.25, "largest global gradient norm; 0 does not clip")
    activation_checkpointing: bool = option(
        False, "recompute activations in the backward pass; routing is kept, not recomputed"
    )
    kernels: Literal["torch", "compiled"] = option(
        "torch",
        "what does the element-wise work of mixture and attention on a CPU; compiled: faster, C++ that is"
        " built at the first start (ten seconds); where that fails, torch",
    )
    spike_factor: float = option(
        0.0, "stop with a diagnosis when a step's loss exceeds this factor of its running mean; 0: off"
    )
    max_skipped_steps: int = option(
        20, "stop after this many steps in a row were skipped because gradients were not finite"
    )
    hang_timeout: float = option(
        600.0,
        "seconds without progress after which the run tells which rank holds it up, and ends; 0: never."
        " Writing a checkpoint must take less",
    )

    def __post_init__(self) -> None:
        require_positive("training", self, "max_steps", "batch_size", "micro_batch_size", "max_skipped_steps")
        require_not_negative("training", self, "seed", "grad_clip", "spike_factor", "hang_timeout")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How held-out text is scored. The defaults are the published protocol."""

    every: int = option(4000, "steps between evaluations while training; 0: only at the end")
    batch_size: int = option(10, "streams the held-out text is cut into, over all ranks")
    segment_len: int = option(128, "tokens per segment")
    memory_len: int | Auto = option("auto", "memory; auto keeps the span of training")
    same_length: bool = option(False, "let every token attend to equally many positions")
    clamp_len: int = option(0, "largest relative distance told apart; 0 tells all apart")
    top_ks: tuple[int, ...] = option((1, 2, 4, 8, 16, 32, 64), "k to score at; those above E are left out")
    best_k: int | Auto = option(
        "auto", "k whose validation loss decides what is best; auto: moe.top_k if k is constant, else all"
    )
    allow_noncausal: bool = option(
        False, "also score a policy whose choices depend on later tokens; its figures are no language model's"
    )
    max_tokens: int = option(0, "score at most this many tokens per split while training; 0: all")

    def __post_init__(self) -> None:
        require_positive("evaluation", self, "batch_size", "segment_len")
        require_not_negative("evaluation", self, "every", "clamp_len", "max_tokens", "memory_len")
        require_positive("evaluation", self, "best_k")
        _require(all(k > 0 for k in self.top_ks), "evaluation.top_ks", self.top_ks, "give k above 0")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the run is saved, and what is kept."""

    every: int = option(4000, "steps between checkpoints; 0: only at the end")
    keep_last: int = option(2, "newest checkpoints kept")
    keep_every: int = option(0, "also keep each checkpoint whose step is a multiple of this; 0: none")
    async_write: bool = option(
        True, "write while training goes on, from a copy in host memory; false waits for the disk"
    )
    resume: str = option("auto", "auto: the newest in the run folder; never; or a checkpoint folder")

    def __post_init__(self) -> None:
        require_positive("checkpoint", self, "keep_last")
        require_not_negative("checkpoint", self, "every", "keep_every")


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """What a run tells about itself."""

    every: int = option(200, "steps between lines in metrics.jsonl and on the console")
    tensorboard: bool = option(True, "write TensorBoard events into the run folder")
    wandb: bool = option(False, "report to Weights & Biases, which must be installed")
    wandb_project: str = option("megamoe", "project there")
    profile_steps: int = option(3, "steps that --profile times, and as many that it counts and records")

    def __post_init__(self) -> None:
        require_positive("logging", self, "every", "profile_steps")


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """What a classifier is fine-tuned for; `megamoe finetune` sets it, language models have none."""

    name: Literal["", "sst2", "sst5", "imdb", "banking77"] = option(
        "", "form of the labelled text; empty: a language model, not a classifier"
    )
    path: str = option("", "folder with the labelled text; empty reads the sentences bundled with megamoe")
    checkpoint: str = option("", "language model to start from")
    from_scratch: bool = option(
        False, "take that checkpoint's config and tokenizer but random weights, as a control"
    )
    tokens: Literal["checkpoint", "words"] = option(
        "checkpoint",
        "units of text; checkpoint: its tokenizer, so that embeddings transfer; words: lower-cased, with a"
        " vocabulary of the labelled text, as published",
    )
    labels: tuple[str, ...] = option(
        (), "classes in the order of their numbers; empty takes them from the data"
    )
    bucket: int = option(1, "batches whose sentences are sorted by length together, to pad less; 1: none")
    valid_fraction: float = option(
        0.1, "share of the training sentences that selects the weights where the data has no such split"
    )
    max_overlap: float = option(
        0.01, "largest share of a split's sentences that may be trained on too; its accuracy is refused above"
    )

    def __post_init__(self) -> None:
        require_positive("task", self, "bucket")
        _require(0 < self.valid_fraction < 1, "task.valid_fraction", self.valid_fraction,
                 "give a number between 0 and 1")  # fmt: skip
        require_fraction("task", self, "max_overlap")
        _require(len(set(self.labels)) == len(self.labels) != 1, "task.labels", self.labels,
                 "name two or more different classes, or none")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run. Everything that changes its numbers is in here or in the DeepSpeed config."""

    name: str = option("", "folder of the run below output_dir; empty: name of the preset and router")
    output_dir: str = option("runs", "where run folders are made")
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    task: TaskConfig = field(default_factory=TaskConfig)

    def __post_init__(self) -> None:
        self.moe.layer_indices(self.model.n_layers)
        place = PurePath(self.name)
        _require(not place.is_absolute() and ".." not in place.parts, "name", self.name,
                 "name a folder below output_dir, and change output_dir to write elsewhere")  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dicts, lists and scalars; `megamoe.config.load.from_dict` reads them back."""
        return _plain(self)


def _plain(value: Any) -> Any:
    if hasattr(value, "__dataclass_fields__"):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value
