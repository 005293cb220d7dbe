"""What a run shows before its first step: every quantity that follows from its settings."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.table import Table

from megamoe import kernels
from megamoe.models.parameter_counts import parameter_counts
from megamoe.moe.routers import router_class
from megamoe.parallel.placement import global_shapes
from megamoe.training.evaluation import NO_EXPERTS, evaluation_span, top_ks_to_score

if TYPE_CHECKING:
    from megamoe.training.trainer import Trainer


def banner(rows: Mapping[str, str]) -> Table:
    """A table of names and values."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold cyan", no_wrap=True)
    table.add_column()
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def describe(trainer: "Trainer") -> dict[str, str]:
    """What the banner of a language model says."""
    run, corpus = trainer.run, trainer.corpus
    sizes = ", ".join(f"{split} {len(tokens):,}" for split, tokens in corpus.tokens.items())
    tokens_per_step = run.training.batch_size * run.model.segment_len
    streams = f"{run.evaluation.batch_size} streams x {run.evaluation.segment_len} tokens"
    return {
        "run": run_row(trainer, "from scratch"),
        "corpus": f"{corpus.name}  ({corpus.unit}s: {sizes}; vocabulary {corpus.vocab_size:,}) {corpus.note}",
        **model_rows(trainer),
        "batch": f"{batch_row(trainer, 'streams')}; {tokens_per_step:,} tokens per step",
        **schedule_rows(trainer, streams),
    }


def run_row(trainer: "Trainer", origin: str) -> str:
    """Where the run lies, and where it starts: at a step that was done before, or at `origin`."""
    start = f"resuming at step {trainer.step:,}" if trainer.step else origin
    return f"{trainer.folder.root}  ({start}, {trainer.run.training.max_steps:,} steps)"


def model_rows(trainer: "Trainer") -> dict[str, str]:
    """What is trained, and how it lies on the ranks."""
    layout = trainer.engine.layout
    return {
        "model": _model_row(trainer),
        "parameters": _parameter_row(trainer),
        "routing": _routing_row(trainer),
        "layout": _layout_row(trainer),
        "precision": (
            f"{str(layout.dtype).removeprefix('torch.')}, ZeRO stage {layout.zero_stage}"
            + (", compiled kernels" if kernels.in_use() else "")
        ),
    }


def schedule_rows(trainer: "Trainer", batches: str) -> dict[str, str]:
    """The learning rate, and how `batches` are scored."""
    run = trainer.run
    top_ks = top_ks_to_score(run, run.evaluation.top_ks)
    scored = "" if top_ks == (NO_EXPERTS,) else f", test at k = {_list(top_ks)}"
    return {
        "learning rate": (
            f"{run.optimizer.name}, {run.optimizer.schedule}, peak {run.optimizer.lr:g},"
            f" warm-up {run.optimizer.warmup_steps} steps, clip {run.training.grad_clip:g}"
        ),
        "evaluation": f"{batches}, memory {evaluation_span(run).memory_len}{scored}",
    }


def _model_row(trainer: "Trainer") -> str:
    model = trainer.run.model
    norm = "pre-norm" if model.pre_norm else "post-norm"
    return (
        f"Transformer-XL, {model.n_layers} layers x {model.d_model},"
        f" {model.n_heads} heads x {model.d_head}, {norm},"
        f" segment {model.segment_len}, memory {model.memory_len}"
    )


def _parameter_row(trainer: "Trainer") -> str:
    moe, model = trainer.run.moe, trainer.engine.model
    counts = parameter_counts(model, global_shapes(model))
    text = f"{counts.total:,} in all: {counts.trainable:,} trainable, {counts.frozen:,} frozen"
    if counts.experts:
        k = router_class(moe.router.name).experts_per_token(moe.top_k, moe.n_experts)
        text += f"; {counts.active(k, moe.n_experts):,} active at k = {k}"
    return text


def _routing_row(trainer: "Trainer") -> str:
    moe, layers = trainer.run.moe, trainer.run.moe.layer_indices(trainer.run.model.n_layers)
    if not layers:
        return "no layer has experts"
    schedule = moe.schedule
    k = f"k = {moe.top_k}"
    if router_class(moe.router.name).experts_per_token(1, moe.n_experts) == moe.n_experts:
        k = f"k = {moe.n_experts} always"
    elif schedule.mode != "constant":
        k = f"k from {schedule.mode} over {schedule.min_k}..{schedule.max_k}, {moe.top_k} at evaluation"
    return f"{moe.router.name}, {moe.n_experts} experts x {moe.d_expert} in layers {_list(layers)}, {k}"


def _layout_row(trainer: "Trainer") -> str:
    world, ep_size = trainer.world, trainer.engine.layout.ep_size
    text = f"{world.world_size} data-parallel rank{'s' * (world.world_size > 1)} on {world.device.type}"
    if trainer.run.moe.layer_indices(trainer.run.model.n_layers):
        local = trainer.run.moe.n_experts // ep_size
        text += f", expert-parallel size {ep_size} ({local} experts of a layer on each rank)"
    return text


def batch_row(trainer: "Trainer", unit: str) -> str:
    """How the `unit`s of a global batch are shared out."""
    training, layout = trainer.run.training, trainer.engine.layout
    accumulated = f" x {layout.accumulation} accumulated" if layout.accumulation > 1 else ""
    return (
        f"{training.batch_size} {unit} = {layout.micro_batch_size} per forward pass{accumulated}"
        f" x {layout.world_size} rank{'s' * (layout.world_size > 1)}"
    )


def _list(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers))
