"""Bytes and words to token streams: corpora, tokenizers, resumable streams."""
