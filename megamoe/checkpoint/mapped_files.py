"""Safetensors files that stay open between reads, and are closed before their pages fill the memory."""

from pathlib import Path
from typing import Any

from safetensors import safe_open

_KEPT_BYTES = 1 << 23
"""So much may be read before files are closed: opening one parses its whole header."""


class MappedFiles:
    """The safetensors files of a folder. What is read of one occupies memory until it is closed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: dict[str, Any] = {}
        self._n_bytes = 0

    def slice(self, file: str, key: str) -> Any:
        """Tensor `key` of `file`, which can be sliced.

        Raises:
            SafetensorError: the file is damaged, or has no such tensor.
            OSError: it cannot be read.
        """
        if file not in self._open:
            self._open[file] = safe_open(self._folder / file, framework="pt")
        return self._open[file].get_slice(key)

    def release(self, n_bytes: int) -> None:
        """Tell that `n_bytes` were read and are done with; past some megabytes the files are closed."""
        self._n_bytes += n_bytes
        if self._n_bytes >= _KEPT_BYTES:
            self.close()

    def close(self) -> None:
        """Close the files; they are opened again when they are needed."""
        self._open.clear()
        self._n_bytes = 0
