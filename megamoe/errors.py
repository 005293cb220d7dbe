"""The errors a user can meet. Each message is one line: the field, its value, and the remedy."""


class MegaMoEError(Exception):
    """Root of everything megamoe raises on purpose; the command line turns it into exit code 2."""


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
