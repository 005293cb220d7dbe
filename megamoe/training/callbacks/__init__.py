"""Observers of a run, one file each, and the set that a run gets."""

from megamoe.config.schema import RunConfig
from megamoe.training.callbacks.callback import Callback, StepRecord
from megamoe.training.callbacks.checkpoint import CheckpointCallback
from megamoe.training.callbacks.console import ConsoleCallback
from megamoe.training.callbacks.health import HealthCallback
from megamoe.training.callbacks.jsonl import JsonlCallback
from megamoe.training.callbacks.results import ResultsCallback
from megamoe.training.callbacks.tensorboard import TensorBoardCallback
from megamoe.training.callbacks.wandb import WandbCallback
from megamoe.training.run_folder import RunFolder

__all__ = ["Callback", "StepRecord", "build_callbacks"]


def build_callbacks(run: RunConfig, folder: RunFolder, *, is_main: bool) -> list[Callback]:
    """What `run` asks for, in the order in which it is told; nothing is written yet.

    Args:
        run: the run.
        folder: its folder.
        is_main: whether this rank writes and prints for all.

    Raises:
        ConfigError: a tracker is asked for that is not installed.
    """
    shared: list[Callback] = [HealthCallback(), CheckpointCallback(run.checkpoint)]
    if not is_main:
        return shared
    console = ConsoleCallback(folder.log)
    writers: list[Callback] = [console, JsonlCallback(folder.metrics)]
    if run.logging.tensorboard:
        writers.append(TensorBoardCallback(folder.tensorboard))
    if run.logging.wandb:
        writers.append(WandbCallback(run.logging.wandb_project))
    # Writers first, so that what a checkpoint follows is on disk before it.
    return [*writers, *shared, ResultsCallback(console)]
