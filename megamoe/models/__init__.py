"""Transformer-XL, written as if for one device."""
