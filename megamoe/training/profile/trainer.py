"""``--profile`` of ``megamoe train`` and ``megamoe finetune``: a few steps of a run, recorded."""

import os
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from megamoe.config.schema import RunConfig
from megamoe.errors import StoppedError
from megamoe.moe.rooms import room
from megamoe.parallel.launch import Launch
from megamoe.training import signals
from megamoe.training.callbacks.callback import StepRecord
from megamoe.training.classifier_trainer import ClassifierTrainer
from megamoe.training.finetune import read_sentences
from megamoe.training.preflight.measure import arithmetic_speed
from megamoe.training.profile.flops import flop_counter
from megamoe.training.profile.report import rooms_table
from megamoe.training.profile.rooms import STEP, time_by_room
from megamoe.training.run_folder import write_json
from megamoe.training.session import conduct, read_corpus
from megamoe.training.terminal import open_terminal
from megamoe.training.trainer import Trainer

WARMUP_STEPS = 5
"""The memory of Transformer-XL fills, DeepSpeed allocates, and products of new shapes are compiled."""


def profile_training(run: RunConfig, ds: Mapping[str, Any], launch: Launch) -> None:
    """Record a few steps of `run`; every process of the launch calls this.

    The profile is a run of its own in the folder ``profile`` of the run folder, so that it neither goes on
    with the run nor is gone on with; arguments and errors are those of `megamoe.training.session.train`.
    """
    conduct(_apart(run), ds, launch, read_corpus, Profile)


def profile_finetuning(run: RunConfig, ds: Mapping[str, Any], launch: Launch) -> None:
    """The same for what `megamoe.training.finetune.finetune` trains."""
    conduct(_apart(run), ds, launch, read_sentences, ClassifierProfile)


def _apart(run: RunConfig) -> RunConfig:
    return replace(run, name=f"{run.name}/profile")


class Profile(Trainer):
    """Takes a few steps in place of training to the end, and tells where their time went.

    After `WARMUP_STEPS` steps, the operations of `logging.profile_steps` steps are counted, as many are
    timed and as many recorded, since counting and recording take time. Nothing is logged or saved.
    """

    def _run_to_end(self) -> None:
        self.callbacks = []
        n_steps = self.run.logging.profile_steps
        self._take_steps(WARMUP_STEPS)
        with flop_counter() as counter:
            self._take_steps(n_steps)
        peak = arithmetic_speed(self.world, self.engine.product_dtype)
        tokens_before = self.tokens
        record, seconds = self._take_steps(n_steps)
        tokens = (self.tokens - tokens_before) / n_steps
        recorded = self._record(n_steps)
        self._write_trace(recorded)
        flops = counter.get_total_flops() // n_steps
        if self.world.is_main:
            on_device = self.world.device.type != "cpu"
            self._report({
                "steps": n_steps, "last_step": self.step, "top_k": record.top_k,
                "ranks": self.world.world_size,
                "dtype": str(self.engine.product_dtype).removeprefix("torch."),
                "step_seconds": seconds, "tokens_per_second": tokens / seconds,
                "flops_per_step": flops, "gemm_peak_flops": peak, "mfu": flops / seconds / peak,
                "time": "time on the GPU" if on_device else "time of the process",
                "rooms": time_by_room(recorded.events(), n_steps, on_device=on_device),
            })  # fmt: skip

    def _take_steps(self, n_steps: int) -> tuple[StepRecord, float]:
        """The last of `n_steps` steps, and the seconds of one."""
        self._synchronize()
        begin = time.perf_counter()
        for _ in range(n_steps):
            with room(STEP):
                record = self._train_step()
                self._synchronize()
        seconds = (time.perf_counter() - begin) / n_steps
        self._stop_if_asked()
        return record, seconds

    def _synchronize(self) -> None:
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()

    def _record(self, n_steps: int) -> torch.profiler.profile:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else torch tells stderr that it begins and ends
        activities = [ProfilerActivity.CPU]
        if self.world.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=activities) as recorded:
            self._take_steps(n_steps)
        return recorded

    def _write_trace(self, recorded: torch.profiler.profile) -> None:
        """Replace the traces of a profile before; on all ranks."""
        if self.world.is_main:
            for old in self.folder.root.glob("*.trace.json"):
                old.unlink()
        self.world.barrier()
        recorded.export_chrome_trace(str(self.folder.trace(self.world.rank)))
        self.world.barrier()

    def _report(self, figures: Mapping[str, Any]) -> None:
        write_json(self.folder.rooms, figures)
        terminal = open_terminal()
        terminal.print(rooms_table(figures), highlight=False)
        terminal.print(f"traces: {self.folder.root}/rank-*.trace.json (https://ui.perfetto.dev opens them);"
                       f" figures: {self.folder.rooms}", highlight=False, soft_wrap=True)  # fmt: skip

    def _stop_if_asked(self) -> None:
        asked = signals.agreed(self.world)
        if asked is not None:
            raise StoppedError(f"stopped on {asked.name} before the profile was written")


class ClassifierProfile(Profile, ClassifierTrainer):
    """The same of the steps that train a classifier."""
