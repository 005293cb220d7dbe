"""Sizes that take no time."""

from dataclasses import replace

from benchmarks.side_by_side.sizes import QUICK, Work
from benchmarks.side_by_side.timing import Turns

SMALL = Work(
    "small",
    (
        "model.n_layers=2", "model.d_model=16", "model.n_heads=2", "model.d_head=8", "model.segment_len=12",
        "model.memory_len=18", "moe.layers=0,1", "moe.n_experts=8", "moe.d_expert=24",
        "moe.router.hyper_size=8", "moe.schedule.max_k=8", "evaluation.batch_size=2",
        "evaluation.segment_len=6",
    ),
    batch=2,
    top_k=4,
)  # fmt: skip

TINY = replace(
    QUICK,
    small=SMALL,
    engines=(replace(SMALL, name="one"), replace(SMALL, name="another")),
    turns=Turns(rounds=1, warmup=1),
    step_turns=Turns(rounds=1, warmup=1),
    tokens=(32,),
    goal_tokens=32,
    memory_batch=2,
)
