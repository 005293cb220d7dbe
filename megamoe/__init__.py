"""megamoe: train sparse mixture-of-experts language models with HyperRouter on DeepSpeed."""

__version__ = "0.1.0"
