"""Saving and loading a run of at least a gigabyte: megamoe beside DeepSpeed's engine and torch.save.

One engine (Transformer-XL, bf16 with fp32 masters at ZeRO-1, Adam) on the ranks of the launcher, which every
way saves and loads in turn, round by round. It is dense unless --experts asks for expert-parallel layers, one
part on each rank; those DeepSpeed cannot save, since it wants a module for each expert, and is left out.

stall   seconds in which training cannot go on; while a copy is made in the background, a forward and backward
        pass of --tokens runs, and the wait for the rest of the copy counts
slower  seconds that this pass takes longer than an undisturbed one, since it shares cores with the copy
total   seconds until the files are on the disk: of the others fsync is counted too, which they leave out
extra   peak of resident memory above what the process held before, or such a step needs alone, MB

Of several ranks the slowest, and the one that needs most, count.

    python -m benchmarks.checkpoint --output benchmarks/results/2026-11-26-checkpoint-1-rank
    torchrun --nproc-per-node 2 -m benchmarks.checkpoint
    torchrun --nproc-per-node 2 -m benchmarks.checkpoint --experts 8 --layers 5
"""

import argparse
import math
import os
import platform
import shlex
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import add_output, keep
from megamoe.checkpoint.reader import CheckpointReader
from megamoe.checkpoint.restore import restore_checkpoint
from megamoe.checkpoint.state import TrainingState
from megamoe.checkpoint.writer import CheckpointWriter
from megamoe.config import from_dict
from megamoe.parallel.device import Device
from megamoe.parallel.ds_config import resolve_ds_config
from megamoe.parallel.engine import Engine
from megamoe.parallel.launch import World, read_launch, start
from megamoe.parallel.placement import global_shapes, saved_buffers

VOCAB_SIZE = 256
DS = {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}}
Figures = dict[str, float]


class Bench:
    """The engine, and each way of saving and loading it."""

    def __init__(self, world: World, n_layers: int, n_experts: int, n_tokens: int, folder: Path) -> None:
        self.world, self.n_experts, self.folder = world, n_experts, folder
        self.tokens_BN = torch.arange(n_tokens + 1)[None] % VOCAB_SIZE
        moe = {"layers": "all", "n_experts": n_experts, "d_expert": 1024, "ep_size": world.world_size}
        self.run = from_dict({
            "model": {
                "n_layers": n_layers, "d_model": 1024, "n_heads": 16, "d_head": 64, "d_inner": 4096,
                "segment_len": n_tokens, "memory_len": 0,
            },
            "moe": moe if n_experts else {"layers": "none"},
            "training": {"batch_size": world.world_size},
        })  # fmt: skip
        ds = resolve_ds_config(self.run, DS, world.world_size, Device.detect())
        self.engine = Engine(self.run, ds, self.world, VOCAB_SIZE)
        self.writers = {
            name: CheckpointWriter(self.world, background=name == "async") for name in ("async", "sync")
        }
        self._pass()
        self.engine.step()

    def _pass(self) -> float:
        """Seconds of a forward and backward pass."""
        begin = time.perf_counter()
        loss_BS = self.engine.forward(self.tokens_BN[:, :-1], self.tokens_BN[:, 1:]).loss_BS
        assert loss_BS is not None
        self.engine.backward(loss_BS.mean())
        return time.perf_counter() - begin

    @property
    def n_bytes(self) -> int:
        """Bytes of fp32 weights, both moments, and buffers."""
        buffers = saved_buffers(self.engine.model).values()
        numel = sum(map(math.prod, global_shapes(self.engine.model).values()))
        return 12 * numel + sum(buffer.nbytes for buffer in buffers)

    def save_ours(self, name: str) -> Figures:
        """In the background or not; the completion once the thread has written is part of the stall."""
        writer, folder = self.writers[name], self.folder / name / "best"
        run = replace(self.run, model=self.engine.model.model_config)
        undisturbed = self._pass()
        self.engine.step()
        peak = _memory("VmHWM")
        self.world.barrier()
        begin = time.perf_counter()
        done = writer.save([folder], self.engine, TrainingState(step=1), run=run)
        stall = time.perf_counter() - begin
        slower = 0.0
        if not done:
            slower = self._pass() - undisturbed
            waiting = time.perf_counter()
            writer.wait_for_copy()
            stall += time.perf_counter() - waiting
            self.engine.step()
        while not done:
            time.sleep(0.005)
            poll = time.perf_counter()
            done = writer.poll()
            if done:
                stall += time.perf_counter() - poll
        extra = (_memory("VmHWM") - peak) / 1000
        return {"stall": stall, "slower": slower, "total": time.perf_counter() - begin, "extra": extra}

    def save_deepspeed(self) -> Figures:
        """`engine.save_checkpoint`, then fsync."""
        return self._timed(
            lambda: self.engine.deepspeed.save_checkpoint(str(self.folder / "deepspeed"), tag="1")
        )

    def save_torch(self) -> Figures:
        """`torch.save` of each rank's weights, and of its optimizer's masters and moments, then fsync."""

        def save() -> None:
            (self.folder / "torch").mkdir(exist_ok=True)
            torch.save(self._state(), self.folder / "torch" / f"state-{self.world.rank}.pt")

        return self._timed(save)

    def load_ours(self, verify: bool) -> Figures:
        """Restore into the engine, with or without comparing hashes first."""
        begin = time.perf_counter()
        restore_checkpoint(
            CheckpointReader(self.folder / "async" / "best"), self.engine, self.world, verify=verify
        )
        return {"total": time.perf_counter() - begin}

    def load_deepspeed(self) -> Figures:
        """`engine.load_checkpoint`."""
        begin = time.perf_counter()
        self.engine.deepspeed.load_checkpoint(str(self.folder / "deepspeed"))
        return {"total": time.perf_counter() - begin}

    def load_torch(self) -> Figures:
        """`torch.load`, then into the model and the optimizer."""
        begin = time.perf_counter()
        path = self.folder / "torch" / f"state-{self.world.rank}.pt"
        state = torch.load(path, weights_only=True)
        self.engine.model.load_state_dict(state["model"], strict=self.world.is_main)
        self.engine.deepspeed.basic_optimizer.load_state_dict(state["optimizer"])
        for ours, saved in zip(self._masters(), state["masters"], strict=True):
            ours.data.copy_(saved)
        return {"total": time.perf_counter() - begin}

    def _state(self) -> dict[str, Any]:
        return {
            "model": {
                name: values
                for name, values in self.engine.model.state_dict().items()
                if self.world.is_main or ".experts." in name  # the rest all ranks hold alike
            },
            "optimizer": self.engine.deepspeed.basic_optimizer.state_dict(),
            "masters": self._masters(),
        }

    def _masters(self) -> list[torch.Tensor]:
        return [p.detach() for group in self.engine.deepspeed.optimizer.param_groups for p in group["params"]]

    def _timed(self, save: Callable[[], Any]) -> Figures:
        begin = time.perf_counter()
        save()
        stall = time.perf_counter() - begin
        self.world.barrier()
        files = sorted(path for path in self.folder.rglob("*") if path.is_file())
        for path in files[self.world.rank :: self.world.world_size]:
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        return {"stall": stall, "total": time.perf_counter() - begin}


def measured(world: World, action: Callable[[], Figures]) -> Figures:
    """`action`'s figures and the peak of memory it needs, of the rank where they are largest."""
    os.sync()
    world.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # makes VmHWM what is held now
    before = _memory("VmRSS")
    figures = action()
    figures.setdefault("extra", (_memory("VmHWM") - before) / 1000)
    ranks = world.gather_objects(figures)
    return {name: max(rank[name] for rank in ranks) for name in figures}


def _memory(field: str) -> int:
    """kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def compare(bench: Bench, rounds: int) -> dict[str, Any]:
    """Medians of every way, and the bytes it wrote. Of the first save of each only the stall counts."""
    saves = {
        "async": lambda: bench.save_ours("async"),
        "sync": lambda: bench.save_ours("sync"),
        "deepspeed": bench.save_deepspeed,
        "torch": bench.save_torch,
    }
    loads = {
        "megamoe": lambda: bench.load_ours(True),
        "megamoe, hashes not compared": lambda: bench.load_ours(False),
        "deepspeed": bench.load_deepspeed,
        "torch": bench.load_torch,
    }
    if bench.n_experts:
        del saves["deepspeed"], loads["deepspeed"]
    saved: dict[str, list[Figures]] = {name: [] for name in saves}
    loaded: dict[str, list[Figures]] = {name: [] for name in loads}
    for _ in range(rounds + 1):
        for name, save in saves.items():
            if bench.world.is_main:
                shutil.rmtree(bench.folder / name, ignore_errors=True)
            saved[name].append(measured(bench.world, save))
    for _ in range(rounds):
        for name, load in loads.items():
            loaded[name].append(measured(bench.world, load))
    return {
        "save": {
            name: _medians(figures[1:])
            | {"first_stall": figures[0]["stall"], "bytes": size_of(bench.folder / name)}
            for name, figures in saved.items()
        },
        "load": {name: _medians(figures) for name, figures in loaded.items()},
    }


def _medians(figures: list[Figures]) -> Figures:
    return {key: statistics.median(figure[key] for figure in figures) for key in figures[0]}


TITLES = {
    "async": "megamoe, `async_write`",
    "sync": "megamoe, waiting",
    "deepspeed": "`engine.save_checkpoint`",
    "torch": "`torch.save`",
}
REPORT = """\
# Saving and loading a checkpoint

{date}, `{command}`, {machine}.
State: {state:.2f} GB of fp32 weights, Adam moments and frozen buffers{layout}.
Ranks: {ranks}. Medians of {rounds} interleaved rounds. A training pass has {tokens} tokens a rank.

| save | stall, s | first stall, s | next pass slower by, s | until on disk, s | bytes / state | extra, MB |
|---|---|---|---|---|---|---|
{saves}

| load | s | extra memory, MB |
|---|---|---|
{loads}

{share}
While `async_write` copies, the next forward and backward pass runs on the same cores; the update after it
waits for the copy. On disk means after fsync, which the others leave out and are timed with here. Loads
come from the page cache. The others also write the bf16 weights; megamoe hashes what it writes, and
compares hashes when it loads. `async_write` keeps a copy of the state in host memory: the first save
allocates it, so that it is not among the extra memory of later ones. What megamoe needs to load are pages
of the mapped files.
"""


def report(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    state = result["state_bytes"]
    saves = [
        f"| {TITLES[name]} | {row['stall']:.3f} | {row['first_stall']:.3f} | {row.get('slower', 0):.3f} |"
        f" {row['total']:.2f} |"
        f" {row['bytes'] / state:.4f} | {row['extra']:.0f} |"
        for name, row in result["save"].items()
    ]
    loads = [f"| {name} | {row['total']:.2f} | {row['extra']:.0f} |" for name, row in result["load"].items()]
    share = ""
    if "deepspeed" in result["save"]:
        ours, theirs = result["save"]["async"]["stall"], result["save"]["deepspeed"]
        share = (
            f"Training stalls for {ours / theirs['stall']:.1%} of what DeepSpeed's save stalls it, for"
            f" {ours / theirs['total']:.1%} of the time until that is on disk."
        )
    experts = result["experts"]
    layout = f", {experts} experts a layer over all ranks" if experts else ""
    return REPORT.format(
        **result, state=state / 1e9, saves="\n".join(saves), loads="\n".join(loads), share=share,
        layout=layout,
    )  # fmt: skip


def main() -> int:
    """Measure, print, and write JSON and Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--layers", type=int, default=7, help="layers of 13.6 million weights (default: %(default)s)"
    )
    parser.add_argument(
        "--tokens",
        type=int,
        default=256,
        help="tokens of a training pass on each rank (default: %(default)s)",
    )
    parser.add_argument("--rounds", type=int, default=3, help="counted rounds (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where to write (default: the system's temporary folder)")
    add_output(parser)
    parser.add_argument(
        "--experts", type=int, default=0, help="experts of each layer, spread over all ranks (default: none)"
    )
    args = parser.parse_args()
    world = start(read_launch())
    folder = world.gather_objects(tempfile.mkdtemp(dir=args.folder) if world.is_main else "")[0]
    try:
        several = ["torchrun", "--nproc-per-node", str(world.world_size)]
        launcher = several if world.world_size > 1 else ["python"]
        bench = Bench(world, args.layers, args.experts, args.tokens, Path(folder))
        result = {
            "command": shlex.join([*launcher, "-m", "benchmarks.checkpoint", *sys.argv[1:]]),
            "date": date.today().isoformat(),
            "machine": f"{os.cpu_count()} shared CPU cores ({platform.machine()}), torch {torch.__version__},"
            f" load average {os.getloadavg()[0]:.1f} at the start",
            "state_bytes": bench.n_bytes,
            "rounds": args.rounds,
            "ranks": world.world_size,
            "experts": args.experts,
            "tokens": args.tokens,
        } | compare(bench, args.rounds)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if not world.is_main:
        return 0
    print(report(result))
    keep(result, report(result), args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
