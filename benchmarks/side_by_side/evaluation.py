"""Held-out text scored at several k: in one pass, and in a pass for each k."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from benchmarks.side_by_side.ours import one_rank
from benchmarks.side_by_side.sizes import Sizes
from benchmarks.side_by_side.timing import Case, Way, clock_of
from megamoe.config import RunConfig
from megamoe.data.corpus import Corpus
from megamoe.data.tokenizers import ByteTokenizer
from megamoe.models.transformer_xl import TransformerXL
from megamoe.training.evaluation import evaluate, top_ks_to_score

SECTION = "evaluation"
ONE_PASS, SEPARATE = "one pass", "a pass for each k"
SEGMENTS = 6
N_BYTES = 256


def draw_text(run: RunConfig, way: str, number: int) -> Corpus:
    """Random bytes as the validation split of call `number` of a way."""
    n_tokens = run.evaluation.batch_size * (SEGMENTS * run.evaluation.segment_len + 1)
    random = np.random.default_rng([number, *way.encode()])
    tokens = {"valid": random.integers(0, N_BYTES, n_tokens, dtype=np.uint8)}
    return Corpus("random bytes", "byte", True, "", tokens, ByteTokenizer())


def ways_of(run: RunConfig) -> list[Way]:
    """Both ways of scoring one model."""
    model, world = TransformerXL(run.model, run.moe, seed=1).eval(), one_rank()
    all_ks = top_ks_to_score(run, run.evaluation.top_ks)

    def way(name: str, passes: list[tuple[int, ...]]) -> Way:
        def score(text: Corpus) -> None:
            for top_ks in passes:
                evaluate(model, text, "valid", top_ks, run, world)

        return Way(name, score, lambda number: (draw_text(run, name, number),))

    return [way(ONE_PASS, [all_ks]), way(SEPARATE, [(k,) for k in all_ks])]


def measure(sizes: Sizes, threads: int) -> Iterator[Case]:
    """The small model with experts in every layer, and with experts in the highest alone; fp32."""
    small = sizes.small.run()
    small = replace(small, model=replace(small.model, vocab_size=N_BYTES))
    highest = replace(small, moe=replace(small.moe, layers=str(small.model.n_layers - 1)))
    for experts, run in (("every layer", small), ("the highest layer", highest)):
        settings = {"experts in": experts, "streams": run.evaluation.batch_size, "threads": threads}
        yield Case(SECTION, settings, sizes.turns.take(ways_of(run), clock_of(threads)))
