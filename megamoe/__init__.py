"""megamoe: train sparse mixture-of-experts language models with HyperRouter on DeepSpeed."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megamoe.checkpoint.load import load_model

__all__ = ["__version__", "load_model"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Imported when it is used, so that `import megamoe` needs no torch.
    if name == "load_model":
        from megamoe.checkpoint.load import load_model

        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
