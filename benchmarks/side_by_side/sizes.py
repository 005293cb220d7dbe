"""How much is measured: all of it, a smoke run, or less for tests."""

from dataclasses import dataclass, replace

from benchmarks.side_by_side.timing import Turns
from megamoe.config import RunConfig, load_config
from megamoe.config.schema import RouterConfig

VOCAB_SIZE = 204
"""Symbols of enwik8 as published."""


@dataclass(frozen=True)
class Work:
    """A run of the preset small_enwik8 with some options changed.

    Attributes:
        name: for the report.
        overrides: dotted options.
        batch: streams of a step.
        top_k: experts per token.
    """

    name: str
    overrides: tuple[str, ...] = ()
    batch: int = 4
    top_k: int = 8

    def run(self, router: str = "") -> RunConfig:
        """Its config, under another routing policy if one is named."""
        changes = (f"training.batch_size={self.batch}", *self.overrides)
        run = load_config(preset="small_enwik8", overrides=changes)
        moe = replace(run.moe, router=RouterConfig(name=router)) if router else run.moe
        return replace(run, model=replace(run.model, vocab_size=VOCAB_SIZE), moe=moe)


WIDE = Work("d_model 512", ("model.d_model=512", "moe.d_expert=1024"), batch=2)
TWO_MILLION = Work(
    "2 M parameters",
    (
        "model.n_layers=2", "model.d_model=128", "model.n_heads=4", "model.d_head=32",
        "model.segment_len=128", "model.memory_len=128", "moe.layers=0,1", "moe.d_expert=224",
        "moe.router.hyper_size=64",
    ),
    batch=8,
)  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
        small: the published small run, whose widths all sections share; goals are about it.
        large: a second one for whole steps; None leaves it out.
        engines: models that the engine is measured with.
        turns: of layers and attention.
        step_turns: of whole steps.
        tokens: tokens of the mixture layer.
        goal_tokens: of those, what goals are about.
        top_ks: experts per token of the mixture layer.
        attention_batch: streams of the attention.
        memory_batch: streams of the step whose memory is measured.
        quick: too little to judge goals by.
    """

    small: Work = Work("small")
    large: Work | None = WIDE
    engines: tuple[Work, ...] = (TWO_MILLION, Work("24 M parameters"))
    turns: Turns = Turns(rounds=5, warmup=6)
    step_turns: Turns = Turns(rounds=5, warmup=6)
    tokens: tuple[int, ...] = (1024, 4096, 16384)
    goal_tokens: int = 4096
    top_ks: tuple[int, ...] = (2, 8, 16)
    attention_batch: int = 4
    memory_batch: int = 22
    quick: bool = False

    def rules(self) -> str:
        """What is the same for all sides."""
        run = self.small.run()
        return (
            f"dropout {run.model.dropout}, gradients clipped at {run.training.grad_clip}, Adam at learning"
            f" rate {run.optimizer.lr}; warm-up and counted calls of each way: {self.turns.warmup} and"
            f" {self.turns.rounds}, of steps {self.step_turns.warmup} and {self.step_turns.rounds}"
        )


FULL = Sizes()

QUICK = Sizes(
    small=Work("small", batch=1),
    large=None,
    engines=(TWO_MILLION, Work("24 M parameters", batch=1)),
    turns=Turns(rounds=2, warmup=1),
    step_turns=Turns(rounds=2, warmup=1),
    tokens=(1024,),
    goal_tokens=1024,
    top_ks=(2, 8),
    attention_batch=1,
    memory_batch=2,
    quick=True,
)
