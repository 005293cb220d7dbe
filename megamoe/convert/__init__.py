"""Conversions between checkpoints: each reads and writes one tensor at a time."""
