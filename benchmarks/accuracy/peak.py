"""Memory of the forward and backward pass of a training run, as the kernel counts it.

Each run has a process of its own, in which freed memory goes back to the kernel at once: every tensor of
64 KB and more is a mapping of its own. What is resident is then what is alive, to the page, and repeats.
Under the setting that runs choose for speed (docs/deepspeed.md) it would also be what was freed and is kept.
"""

import gc
import os
import statistics
from dataclasses import dataclass
from unittest.mock import patch

import torch

from benchmarks.accuracy.cases import DTYPES, Case
from benchmarks.accuracy.live import NOWHERE
from benchmarks.accuracy.states import BACKWARD, FORWARD, UPDATE
from benchmarks.side_by_side.ours import one_rank
from benchmarks.side_by_side.space import saved_bytes
from megamoe.models.transformer_xl import TransformerXL
from megamoe.serve.measurement import forget_peak, peak_bytes, resident_bytes
from megamoe.training.session import load_checked_corpus, with_vocabulary
from megamoe.training.trainer import Trainer
from tests.ranks import run_ranks

WARMUP_STEPS, STEPS = 2, 3
PATIENCE_SECONDS = 1800.0


@dataclass(frozen=True)
class Peak:
    """Bytes above what the process held before a micro-batch.

    Attributes:
        kept: when the backward pass begins.
        peak: most in both passes.
    """

    kept: int
    peak: int


class PeakTrainer(Trainer):
    """Takes a few steps in place of training to the end, and looks at the memory of the process.

    It looks at the second of three micro-batches: gradients are there before, and are reduced later.
    """

    floor = before_backward = 0

    def _beat(self, phase: str) -> None:
        super()._beat(phase)
        if phase in (FORWARD, UPDATE):
            self.peaks.append(Peak(self.before_backward - self.floor, peak_bytes() - self.floor))
            gc.collect()
            self.floor = resident_bytes()
            forget_peak()
        elif phase == BACKWARD:
            self.before_backward = resident_bytes()

    def peak(self) -> Peak:
        """Medians over a few steps."""
        measured = []
        for _ in range(WARMUP_STEPS + STEPS):
            self.peaks: list[Peak] = []
            self._train_step()
            _, _, second, _ = self.peaks  # the first is of what came before
            measured.append(second)
        counted = measured[WARMUP_STEPS:]
        return Peak(
            round(statistics.median(peak.kept for peak in counted)),
            round(statistics.median(peak.peak for peak in counted)),
        )


def peak_here(case: Case) -> Peak:
    """In this process."""
    world, run = one_rank(), case.run()
    corpus = load_checked_corpus(run)
    trainer = PeakTrainer(with_vocabulary(run, corpus), case.ds_config(), world, corpus, NOWHERE)
    return trainer.peak()


def peak_of(case: Case) -> Peak:
    """In a fresh process."""
    with patch.dict(os.environ, {"MALLOC_MMAP_THRESHOLD_": str(1 << 16)}):  # glibc reads it at the start
        result: Peak = run_ranks(peak_here, 1, case, timeout=PATIENCE_SECONDS)[0]
    return result


def saved(case: Case) -> int:
    """Bytes that autograd keeps of one forward pass, counted tensor by tensor."""
    run, dtype = case.run(), DTYPES[case.dtype]
    batch_size, sizes = case.layout().micro_batch_size, run.model
    model = TransformerXL(sizes, run.moe, seed=run.training.seed)
    for parameter in model.parameters():
        parameter.data = parameter.to(dtype)
    memory_BMD = torch.zeros(batch_size, sizes.memory_len, sizes.d_model, dtype=dtype)
    tokens_BN = torch.arange(batch_size * (sizes.segment_len + 1)).view(batch_size, -1) % sizes.vocab_size

    def loss() -> torch.Tensor:
        output = model(tokens_BN[:, :-1], tokens_BN[:, 1:], (memory_BMD,) * sizes.n_layers)
        mean: torch.Tensor = output.loss_BS.mean()
        return mean

    return saved_bytes(model, loss)
