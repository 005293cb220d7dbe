"""Every option changes what it says it changes: one probe for each, and no option without one."""

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megamoe import kernels
from megamoe.checkpoint.format import step_folder
from megamoe.config import RunConfig, from_dict
from megamoe.config.load import merge, parse_overrides
from megamoe.config.reference import option_rows
from megamoe.data.corpus import load_corpus
from megamoe.data.labelled import load_labelled
from megamoe.data.overlap import Overlap
from megamoe.data.sentences import Sentences
from megamoe.data.stream import TokenStream
from megamoe.errors import DivergenceError, MegaMoEError
from megamoe.moe.auxiliary import auxiliary_loss
from megamoe.moe.ranks import ONE_RANK
from megamoe.moe.routers import resolve_options
from megamoe.moe.schedules import top_k_at
from megamoe.parallel.device import Device
from megamoe.parallel.ds_config import layout_of, resolve_ds_config
from megamoe.parallel.engine import build_model
from megamoe.parallel.launch import World, read_launch, start
from megamoe.parallel.optimizer import build_optimizer, parameter_groups
from megamoe.training.callbacks import Callback, StepRecord, build_callbacks
from megamoe.training.classifier_trainer import ClassifierTrainer
from megamoe.training.evaluation import best_k, evaluate, require_causal
from megamoe.training.finetune import read_sentences
from megamoe.training.guard import Guard
from megamoe.training.heartbeat import Heartbeat, Watch
from megamoe.training.learning_rate import Plateau, learning_rate
from megamoe.training.metrics_file import read_metrics
from megamoe.training.run_folder import RunFolder
from megamoe.training.session import choose_kernels, find_checkpoint, with_vocabulary
from megamoe.training.trainer import Trainer
from tests.data import goldens
from tests.ranks import run_ranks
from tests.training.runs import FP32, build_trainer, toy_corpus, toy_run

VOCAB = 11
CPU = Device("cpu", bf16=True, fp16=False)
BASE: dict[str, Any] = {
    "name": "toy",
    "output_dir": "missing",
    "model": {
        "n_layers": 2, "d_model": 16, "n_heads": 2, "d_head": 8, "d_inner": 24, "dropout": 0.1,
        "segment_len": 6, "memory_len": 8, "init_std": 0.2,
    },
    "moe": {"layers": "1", "n_experts": 4, "d_expert": 8, "top_k": 2, "schedule": {"min_k": 1, "max_k": 4}},
    "training": {"batch_size": 8, "max_steps": 12},
    "evaluation": {"batch_size": 3, "segment_len": 4},
}  # fmt: skip


class OneRank(World):
    """A world of this process alone, without a process group."""

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return values.detach().clone()

    def barrier(self) -> None:
        pass


ALONE = OneRank(0, 1, torch.device("cpu"))


def config(*overrides: str) -> RunConfig:
    return from_dict(merge(BASE, parse_overrides(overrides)))


def attempt(action: Callable[[], Any]) -> Any:
    try:
        return action()
    except MegaMoEError as error:
        return str(error)


def folder(run: RunConfig) -> Any:
    return str(RunFolder.of(run).root)


def corpus(run: RunConfig) -> Any:
    return attempt(lambda: load_corpus(run.data).name)


def vocabulary(run: RunConfig) -> Any:
    return attempt(lambda: with_vocabulary(run, toy_corpus(VOCAB)).model.vocab_size)


def model(run: RunConfig) -> torch.nn.Module:
    ds = resolve_ds_config(run, FP32, 1, CPU)
    return build_model(run, layout_of(run, ds, 1), ALONE, VOCAB)


def numbers(run: RunConfig) -> Any:
    """Parameters, and the losses of three segments with dropout on."""
    net = model(run)
    text = torch.arange(4 * 19).view(4, 19) ** 2 % VOCAB
    losses, memory = [], None
    for i in range(0, 18, 6):
        output = net(text[:, i : i + 6], text[:, i + 1 : i + 7], memory)
        extra, _ = auxiliary_loss(output.routings, run.moe, ONE_RANK.mean)
        memory = output.memory
        losses.append((output.loss_BS.mean() + extra).item())
    return sum(p.numel() for p in net.parameters()), losses


def recomputes(run: RunConfig) -> Any:
    return [getattr(module, "checkpoint_activations", None) for module in model(run).modules()]


def batches(run: RunConfig) -> Any:
    tokens = toy_corpus(VOCAB).tokens["train"]
    stream = TokenStream(tokens, batch_size=run.training.batch_size, segment_len=run.model.segment_len)
    return stream.batch(0).input_ids_BS.shape


def top_ks(run: RunConfig) -> Any:
    return [top_k_at(run.moe.schedule, run.moe.top_k, step, run.training.max_steps) for step in range(12)]


def rates(run: RunConfig) -> Any:
    """The rates of a run whose validation loss never falls again."""
    plateau, result = Plateau(), []
    for step in range(12):
        result.append(learning_rate(run.optimizer, step, run.training.max_steps, plateau))
        plateau.observe(1.0, run.optimizer)
    return result


def optimizer(run: RunConfig) -> Any:
    groups = parameter_groups(model(run), run.optimizer.weight_decay)
    built = build_optimizer(groups, run.optimizer, resolve_ds_config(run, FP32, 1, CPU), CPU)
    decays = [group["weight_decay"] for group in built.param_groups]
    return type(built).__name__, built.defaults["betas"], built.defaults["eps"], decays


def deepspeed(run: RunConfig) -> Any:
    return resolve_ds_config(run, FP32, 2, CPU)


def layout(run: RunConfig) -> Any:
    return layout_of(run, deepspeed(run), 2)


def guarded(run: RunConfig) -> Any:
    """Steps until the guard stops a run that skips from step 10 on and whose loss jumps at step 30."""
    guard = Guard(run, types.SimpleNamespace(mean=ONE_RANK.mean))  # type: ignore[arg-type]
    for step in range(60):
        loss = torch.tensor(1.0 if step < 30 else 5.0)
        try:
            guard.check(
                StepRecord(step, 0.1, 2, loss, {}, torch.tensor(1.0), 10 <= step < 25 or step >= 35, 8, ())
            )
        except DivergenceError:
            return step
    return None


def compiled(run: RunConfig) -> Any:
    choose_kernels(run, ALONE)
    found = kernels.in_use()
    kernels.use(compiled=False)
    return found


def watched(run: RunConfig) -> Any:
    return Watch(Heartbeat(), run, World(0, 1, torch.device("cpu")), Path("heartbeats")).timeout


def figures(run: RunConfig) -> Any:
    net = model(run).eval()
    scored = evaluate(
        net, toy_corpus(VOCAB), "valid", run.evaluation.top_ks[:2], run, ALONE,
        max_tokens=run.evaluation.max_tokens,
    )  # fmt: skip
    return scored.tokens, scored.nats


def deciding(run: RunConfig) -> Any:
    return best_k(run)


def refusal(run: RunConfig) -> Any:
    return attempt(lambda: require_causal(run))


def observers(run: RunConfig) -> Any:
    built = build_callbacks(run, RunFolder(Path("missing")), is_main=True)
    return [(type(callback).__name__, getattr(callback, "project", "")) for callback in built]


def kind_of_model(run: RunConfig) -> Any:
    return attempt(lambda: type(model(run)).__name__)


def labelled(run: RunConfig) -> Any:
    """Classes, and how many sentences the splits have, in the recorded files or the bundled ones."""
    text = attempt(lambda: load_labelled(run.task))
    if isinstance(text, str):
        return text
    return text.labels, [len(examples) for examples in text.splits.values()]


def read_for_task(run: RunConfig) -> Any:
    read = attempt(lambda: read_sentences(run))
    return read if isinstance(read, str) else read[1].tokenizer.kind


def half_trained_on(run: RunConfig) -> Any:
    return attempt(lambda: Overlap(1, 2).require_below(run.task.max_overlap, "test", "toy"))


def start_of_classifier(run: RunConfig) -> Any:
    return attempt(lambda: ClassifierTrainer.begin(types.SimpleNamespace(run=run)))  # type: ignore[arg-type]


def sentence_batches(run: RunConfig) -> Any:
    sentences = Sentences([np.ones(1 + i % 9) for i in range(40)], np.arange(40), 0)
    trainer = types.SimpleNamespace(
        run=run,
        corpus=types.SimpleNamespace(splits={"train": sentences}),
        engine=types.SimpleNamespace(rows=range(run.training.batch_size)),
    )
    return ClassifierTrainer._open_stream(trainer).batch(0).labels_B.tolist()  # type: ignore[arg-type]


def start_point(run: RunConfig) -> Any:
    return attempt(lambda: find_checkpoint(run, RunFolder.of(run)))


TESTS = Path(__file__).parents[1]
ADAPTIVE = "model.cutoffs=4,8 model.div_val=2"
LINEAR = "moe.schedule.mode=linear_increase"
SST2 = "task.name=sst2"
RECORDED = str(goldens.FOLDER / "sst2")
PLATEAU = "optimizer.schedule=plateau"

# Option, another value, what to look at, and what else both runs have.
PROBES: list[tuple[str, str, Callable[[RunConfig], Any], str]] = [
    ("name", "other", folder, ""),
    ("output_dir", "other", folder, ""),
    ("data.dataset", "text", corpus, ""),
    ("data.path", "missing", corpus, ""),
    ("data.tokenizer", "reference_symbols", corpus, ""),
    ("model.vocab_size", "9", vocabulary, ""),
    ("model.n_layers", "3", numbers, ""),
    ("model.d_model", "12", numbers, ""),
    ("model.n_heads", "1", numbers, ""),
    ("model.d_head", "4", numbers, ""),
    ("model.d_inner", "32", numbers, ""),
    ("model.dropout", "0.5", numbers, ""),
    ("model.attention_dropout", "0.5", numbers, ""),
    ("model.pre_norm", "true", numbers, ""),
    ("model.segment_len", "5", batches, ""),
    ("model.memory_len", "3", numbers, ""),
    ("model.same_length", "true", numbers, ""),
    ("model.clamp_len", "2", numbers, ""),
    ("model.cutoffs", "4,8", numbers, ""),
    ("model.div_val", "2", numbers, "model.cutoffs=4,8"),
    ("model.d_embed", "8", numbers, ""),
    ("model.tie_weights", "false", numbers, ""),
    ("model.tie_projections", "true", numbers, ADAPTIVE),
    ("model.init_std", "0.1", numbers, ""),
    ("model.projection_init_std", "0.1", numbers, ADAPTIVE),
    ("moe.layers", "all", numbers, ""),
    ("moe.n_experts", "8", numbers, ""),
    ("moe.d_expert", "4", numbers, ""),
    ("moe.top_k", "1", numbers, ""),
    ("moe.ep_size", "1", layout, ""),
    ("moe.balance_loss", "0.1", numbers, ""),
    ("moe.z_loss", "0.1", numbers, ""),
    ("moe.router.name", "smoe", numbers, ""),
    ("moe.router.hyper_size", "16", numbers, ""),
    ("moe.schedule.mode", "cosine_increase", top_ks, ""),
    ("moe.schedule.min_k", "2", top_ks, LINEAR),
    ("moe.schedule.max_k", "3", top_ks, LINEAR),
    ("moe.schedule.steps", "4", top_ks, LINEAR),
    ("optimizer.name", "adamw", optimizer, ""),
    ("optimizer.lr", "1e-3", rates, ""),
    ("optimizer.betas", "0.8,0.9", optimizer, ""),
    ("optimizer.eps", "1e-6", optimizer, ""),
    ("optimizer.weight_decay", "0.1", optimizer, ""),
    ("optimizer.schedule", "inv_sqrt", rates, ""),
    ("optimizer.warmup_steps", "5", rates, ""),
    ("optimizer.min_lr", "1e-4", rates, ""),
    ("optimizer.decay_rate", "0.9", rates, PLATEAU),
    ("optimizer.patience", "2", rates, PLATEAU),
    ("training.max_steps", "20", rates, ""),
    ("training.batch_size", "4", batches, ""),
    ("training.micro_batch_size", "2", deepspeed, ""),
    ("training.seed", "1", numbers, ""),
    ("training.grad_clip", "1", deepspeed, ""),
    ("training.activation_checkpointing", "true", recomputes, ""),
    ("training.kernels", "compiled", compiled, ""),
    ("training.spike_factor", "3", guarded, ""),
    ("training.max_skipped_steps", "5", guarded, ""),
    ("training.hang_timeout", "60", watched, ""),
    ("evaluation.batch_size", "4", figures, ""),
    ("evaluation.segment_len", "5", figures, ""),
    ("evaluation.memory_len", "1", figures, ""),
    ("evaluation.same_length", "true", figures, ""),
    ("evaluation.clamp_len", "2", figures, ""),
    ("evaluation.top_ks", "3,4", figures, ""),
    ("data.domains", "missing", corpus, ""),
    ("evaluation.best_k", "1", deciding, ""),
    ("evaluation.allow_noncausal", "true", refusal, "moe.router.name=expert_choice"),
    ("evaluation.max_tokens", "30", figures, ""),
    ("checkpoint.resume", "missing", start_point, ""),
    ("task.name", "sst2", kind_of_model, "task.labels=a,b"),
    ("task.path", RECORDED, labelled, SST2),
    ("task.checkpoint", "missing", read_for_task, SST2),
    ("task.tokens", "words", read_for_task, SST2),
    ("task.from_scratch", "true", start_of_classifier, "task.checkpoint=missing"),
    ("task.labels", "1,0", labelled, SST2),
    ("task.valid_fraction", "0.5", labelled, f"{SST2} task.path={RECORDED} task.valid_fraction=0.3"),
    ("task.max_overlap", "0.6", half_trained_on, ""),
    ("task.bucket", "4", sentence_batches, ""),
    ("logging.wandb", "true", observers, ""),
    ("logging.wandb_project", "mine", observers, "logging.wandb=true"),
]

# What only the loop shows: option, and another value than in `LOOP`.
LOOP: dict[str, Any] = {
    "training": {"max_steps": 4}, "evaluation": {"every": 2}, "checkpoint": {"every": 1, "keep_last": 2},
    "logging": {"every": 2, "tensorboard": False},
}  # fmt: skip
IN_THE_LOOP = {
    "evaluation.every": 1,
    "checkpoint.every": 0,
    "checkpoint.keep_last": 1,
    "checkpoint.keep_every": 1,
    "checkpoint.async_write": False,
    "logging.every": 1,
    "logging.tensorboard": True,
}

# What real runs show elsewhere.
ELSEWHERE = {"logging.profile_steps": "training/test_profile.py"}


def test_no_option_is_forgotten():
    assert all(name in (TESTS / file).read_text() for name, file in ELSEWHERE.items())
    named = {name for name, *_ in PROBES} | set(IN_THE_LOOP) | set(ELSEWHERE)
    named = {name for name in named if name != "moe.router.hyper_size"} | {"moe.router.options"}
    assert named == {row.name for row in option_rows()}


@pytest.mark.parametrize(("option", "value", "probe", "besides"), PROBES, ids=[row[0] for row in PROBES])
def test_an_option_reaches_what_it_names(option, value, probe, besides, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", types.ModuleType("wandb"))
    base = config(*besides.split())
    changed = config(*besides.split(), f"{option}={value}")
    resolve_options(changed.moe.router)
    before = probe(base)
    assert probe(base) == before  # else anything would seem to reach
    assert probe(changed) != before


class Saves(Callback):
    """Steps whose checkpoint was complete before the next step began."""

    def __init__(self) -> None:
        self.at_once: list[int] = []

    def on_checkpoint(self, trainer: Trainer, folder: Path) -> None:
        if folder.name == step_folder(trainer.step) and trainer.step < trainer.run.training.max_steps:
            self.at_once.append(trainer.step)


def left_behind(folder: str) -> dict[str, Any]:
    """What a run leaves, for each option of the loop and for none."""
    world = start(read_launch())
    result = {}
    for option, value in {"": None, **IN_THE_LOOP}.items():
        section, _, key = option.partition(".")
        changes = merge(LOOP, {section: {key: value}} if option else {})
        run = toy_run(Path(folder), **changes, name=option or "base")
        saves = Saves()
        build_trainer(run, FP32, world, [saves]).train()
        root = RunFolder.of(run).root
        lines = read_metrics(root / "metrics.jsonl")
        result[option] = (
            [(line["step"], "train/loss" in line) for line in lines],
            sorted(path.name for path in (root / "checkpoints").iterdir()),
            saves.at_once,
            (root / "tensorboard").exists(),
        )
    return result


def test_options_of_the_loop_change_what_it_leaves(tmp_path):
    (left,) = run_ranks(left_behind, 1, str(tmp_path))
    assert [option for option in IN_THE_LOOP if left[option] == left[""]] == []
