"""The errors a user can meet. Each message is one line: the field, its value, and the remedy."""

from enum import IntEnum


class ExitCode(IntEnum):
    """How a process of megamoe ends; docs/training.md tells what a launcher may make of it."""

    DONE = 0
    USER_ERROR = 2
    STOPPED = 75
    LOST_RANK = 76
    INTERRUPTED = 130


class MegaMoEError(Exception):
    """Root of what megamoe raises on purpose and on every rank; the command line gives it an exit code."""

    exit_code = ExitCode.USER_ERROR


class ConfigError(MegaMoEError):
    """A setting is unknown, out of range, or contradicts another one."""


class DataError(MegaMoEError):
    """A data file is missing, truncated, or not what its manifest says."""


class CheckpointError(MegaMoEError):
    """A checkpoint is missing, torn, corrupt, or belongs to another model."""


class DistributedError(MegaMoEError):
    """The launch environment or the process groups cannot run this configuration."""


class DivergenceError(MegaMoEError):
    """Training no longer learns: gradients are not finite, or the loss jumped."""


class StoppedError(MegaMoEError):
    """A signal asked the run to stop; all it has done is in a checkpoint, and the same command goes on."""

    exit_code = ExitCode.STOPPED


class LostRankError(Exception):
    """Another rank is gone, so the ranks cannot agree on anything any more: not a `MegaMoEError`."""
