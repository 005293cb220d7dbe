"""Builds the compiled kernels with the compiler of the machine, once for each kind of processor."""

import functools
import hashlib
import os
import platform
import tempfile
from pathlib import Path

import torch

from megamoe.errors import ConfigError

SOURCE = Path(__file__).with_name("kernels.cpp")
NAME = "megamoe_kernels"


@functools.cache
def load() -> Path:
    """Load the kernels as `torch.ops.megamoe`, after building them (about ten seconds) if nobody has.

    Returns:
        The library. It lies where torch keeps extensions (`TORCH_EXTENSIONS_DIR`), in a folder of its own
        for each source, torch and processor, so that machines of a cluster may share their home.

    Raises:
        ConfigError: there is no compiler, it fails, or what it has built is damaged.
    """
    from torch.utils import cpp_extension

    root = os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
    library = Path(root) / f"{NAME}-{_digest()}" / f"{NAME}.so"
    try:
        if library.exists():
            torch.ops.load_library(library)
        else:
            _build_and_load(library)
    except (OSError, RuntimeError) as error:
        why = str(error).strip().splitlines()[0]
        what, remedy = "built", "install a C++ compiler such as g++"
        if library.exists():
            what, remedy = "loaded", f"remove {library.parent}"
        raise ConfigError(
            f"training.kernels = 'compiled': cannot be {what} ({why}); {remedy}, or set"
            " training.kernels=torch"
        ) from error
    return library


def _build_and_load(library: Path) -> None:
    """Build beside the place and move: processes that build at once do not wait for each other's locks."""
    from torch.utils import cpp_extension

    library.parent.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{NAME}-", dir=library.parent.parent) as scratch:
        cpp_extension.load(
            NAME, [str(SOURCE)], extra_cflags=_flags(), build_directory=scratch, is_python_module=False
        )
        library.parent.mkdir(exist_ok=True)
        (Path(scratch) / library.name).replace(library)


def _flags() -> list[str]:
    """For this very processor; the two names choose torch's vector types."""
    capability = torch.backends.cpu.get_cpu_capability()
    vectors = f"-DCPU_CAPABILITY={capability}", f"-DCPU_CAPABILITY_{capability}"
    return ["-O3", "-march=native", "-fopenmp", *vectors]


def _digest() -> str:
    parts = SOURCE.read_text(), torch.__version__, platform.machine(), *_flags(), _processor()
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    """Its instructions, as Linux lists them; elsewhere its name."""
    listing = Path("/proc/cpuinfo")
    if listing.exists():
        flags = [line for line in listing.read_text().splitlines() if line.startswith(("flags", "Features"))]
        return flags[0] if flags else ""
    return platform.processor()
