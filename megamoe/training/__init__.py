"""The loop: trainer, evaluation, callbacks."""
