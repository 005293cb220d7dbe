"""What a rank does once at the start: config, model, groups, engine, roll call; and which text it reads."""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import deepspeed
import numpy as np
import torch

from benchmarks.scaling.alone import one_rank_of
from benchmarks.scaling.quantity import DEEPSPEED, POLICY, Action, Quantity, Sizes
from megamoe.config import RunConfig, from_dict
from megamoe.config.load import merge
from megamoe.config.schema import MoEConfig, RouterConfig
from megamoe.data.sentences import Sentences, SentenceStream
from megamoe.data.stream import TokenStream
from megamoe.parallel.device import Device
from megamoe.parallel.ds_config import layout_of, resolve_ds_config
from megamoe.parallel.engine import Engine, build_model, require_equal_buffers
from megamoe.parallel.fragments import owned_fragments
from megamoe.parallel.launch import forget_groups
from megamoe.parallel.layer import ExpertParallelMoELayer, connect_experts
from megamoe.parallel.meeting import Present, find_problem
from megamoe.training.heartbeat import Sign, describe_hang, read_signs, sign_file
from megamoe.training.preflight.needs import needs_of
from megamoe.training.run_folder import write_json

VOCAB_SIZE = 32
TINY: dict[str, Any] = {
    "model": {
        "n_layers": 2, "d_model": 16, "n_heads": 2, "d_head": 8, "d_inner": 16, "segment_len": 8,
        "memory_len": 8, "vocab_size": VOCAB_SIZE,
    },
    "moe": {"d_expert": 8, "router": {"name": "hyper", "hyper_size": 8}},
}  # fmt: skip
DS = {"zero_optimization": {"stage": 1}}


def quantities(sizes: Sizes) -> Iterator[Quantity]:
    """Everything above, by ranks and experts."""
    e, r, w = sizes.n_experts, sizes.ep_size, sizes.n_ranks
    worlds = tuple(n for n in sizes.worlds if n >= r)
    yield Quantity("resolve config and layout", "start", "W", sizes.worlds, _resolved, {})
    yield Quantity("arithmetic of the plan", "start", "E", sizes.experts, _planned, {"W": w})
    for policy in ("smoe", "hyper"):
        name = f"build a layer with one expert on each rank and hash its buffers, {policy}"
        owner = {"owner": POLICY} if policy == "hyper" else {}
        yield Quantity(name, "start", "E", sizes.experts, _layer(policy), {}, **owner)
    name = "process groups of experts"
    yield Quantity(name, "start", "W", worlds, lambda n: _groups(n, r), {"R": r}, DEEPSPEED)
    most = max(sizes.worlds)
    yield Quantity(name, "start", "R", sizes.ep_sizes, lambda n: _groups(most, n), {"W": most}, DEEPSPEED)
    beside = {"E": e, "R": 2}
    name = "engine of a small model"
    yield Quantity(f"{name}, without deepspeed.initialize", "start", "W", sizes.engines, _our_engine, beside)
    yield Quantity(f"{name}", "start", "W", sizes.engines, _engine, beside, DEEPSPEED)
    yield Quantity(
        "compare buffers, tell all ranks a result", "start", "W", sizes.worlds, _compared, {"E": e}
    )
    yield Quantity("rank 0: judge the roll call", "start", "W", sizes.worlds, _met, {})
    yield Quantity("which part a rank saves", "checkpoint", "W", sizes.engines, _fragments, beside)
    yield Quantity("who holds up a run that hangs", "start", "W", sizes.worlds, _hang, {})
    yield Quantity("read a rank's batch of the text", "step", "W", sizes.worlds, _batch, {})
    yield Quantity("shuffle sentences", "start", "sentences", sizes.sentences, _shuffled, {})


def _run(n_ranks: int, n_experts: int, ep_size: int) -> RunConfig:
    here: Mapping[str, Any] = {
        "moe": {"n_experts": n_experts, "ep_size": ep_size},
        "training": {"batch_size": n_ranks},
    }
    return from_dict(merge(TINY, here))


@contextmanager
def _resolved(n_ranks: int) -> Iterator[Action]:
    values, device = _run(n_ranks, n_ranks, n_ranks).to_dict(), Device.detect()

    def resolve() -> None:
        run = from_dict(values)
        layout_of(run, resolve_ds_config(run, DS, n_ranks, device), n_ranks).rows(0)

    yield resolve


@contextmanager
def _planned(n_experts: int) -> Iterator[Action]:
    run = _run(n_experts, n_experts, n_experts)
    layout = layout_of(run, resolve_ds_config(run, DS, n_experts, Device.detect()), n_experts)
    yield lambda: needs_of(run, layout)


def _layer(policy: str) -> Any:
    @contextmanager
    def at(n_experts: int) -> Iterator[Action]:
        with one_rank_of(n_experts) as world:
            yield lambda: require_equal_buffers(_one_layer(n_experts, n_experts, policy), world)

    return at


def _one_layer(n_experts: int, ep_size: int, policy: str) -> ExpertParallelMoELayer:
    moe = MoEConfig(n_experts=n_experts, d_expert=64, router=RouterConfig(name=policy))
    settings: dict[str, Any] = {"layer": 0, "seed": 1, "dropout": 0.0, "init_std": 0.02}
    return ExpertParallelMoELayer(64, moe, ep_size=ep_size, rank=0, **settings)


@contextmanager
def _groups(n_ranks: int, ep_size: int) -> Iterator[Action]:
    with one_rank_of(n_ranks):
        layer = _one_layer(ep_size, ep_size, "smoe")

        def connect() -> None:
            forget_groups()
            connect_experts(layer)

        yield connect


@contextmanager
def _builder(n_ranks: int) -> Iterator[Callable[[], Engine]]:
    run = _run(n_ranks, 64, 2)
    ds_config = resolve_ds_config(run, DS, n_ranks, Device.detect())
    with one_rank_of(n_ranks) as world:

        def build() -> Engine:
            forget_groups()
            return Engine(run, ds_config, world, VOCAB_SIZE)

        yield build


@contextmanager
def _engine(n_ranks: int) -> Iterator[Action]:
    with _builder(n_ranks) as build:
        yield lambda: build().close()


@contextmanager
def _our_engine(n_ranks: int) -> Iterator[Action]:
    with _builder(n_ranks) as build, patch.object(deepspeed, "initialize", lambda **_: (None,)):
        yield build


@contextmanager
def _fragments(n_ranks: int) -> Iterator[Action]:
    with _builder(n_ranks) as build:
        engine = build()
        yield lambda: list(owned_fragments(engine))
        engine.close()


@contextmanager
def _compared(n_ranks: int) -> Iterator[Action]:
    run = _run(n_ranks, 64, 2)
    layout = layout_of(run, resolve_ds_config(run, DS, n_ranks, Device.detect()), n_ranks)
    with one_rank_of(n_ranks) as world:
        model = build_model(run, layout, world, VOCAB_SIZE)

        def compare() -> None:
            require_equal_buffers(model, world)
            world.gather_objects(None)

        yield compare


@contextmanager
def _met(n_ranks: int) -> Iterator[Action]:
    present = [Present(f"node-{rank // 8}", f"node-{rank // 8}", rank % 8, "") for rank in range(n_ranks)]
    yield lambda: find_problem(present)


@contextmanager
def _hang(n_ranks: int) -> Iterator[Action]:
    """Half of the ranks are silent."""
    sign = Sign(rank=0, host="node", pid=1, beats=9, step=3, phase="backward", seconds_since_beat=1.0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for rank in range(n_ranks):
            write_json(sign_file(folder, rank), asdict(replace(sign, rank=rank)))
        silent = list(range(0, n_ranks, 2))
        yield lambda: describe_hang(*read_signs(folder, n_ranks), silent, "limit = 600")


@contextmanager
def _batch(n_ranks: int) -> Iterator[Action]:
    tokens = np.zeros(4096 * n_ranks, np.uint8)

    def read() -> None:
        rows = range(4 * (n_ranks // 2), 4 * (n_ranks // 2) + 4)
        TokenStream(tokens, batch_size=4 * n_ranks, segment_len=512, rows=rows).batch(1)

    yield read


@contextmanager
def _shuffled(n_sentences: int) -> Iterator[Action]:
    ids = [np.zeros(1 + number % 32, np.int32) for number in range(n_sentences)]
    sentences = Sentences(ids, np.zeros(n_sentences, np.int64), 0)

    def shuffle() -> torch.Tensor:
        stream = SentenceStream(sentences, batch_size=32, rows=range(8), seed=1, bucket=10)
        return stream.batch(0).input_ids_BS

    yield shuffle
