"""Bytes and words to token streams: corpora, tokenizers, resumable streams."""

from megamoe.data.corpus import Corpus, load_corpus

__all__ = ["Corpus", "load_corpus"]
