"""Raw text to a prepared folder: the work behind tools/prepare_data.py."""

from pathlib import Path

from megamoe.data.encoding import (
    SPLITS,
    SUBWORDS,
    RawText,
    encode,
    figure_names,
    train_tokenizer,
    words_per_token,
)
from megamoe.data.prepared import MANIFEST, Manifest, new_folder, write_tokenizer, write_tokens


def prepare(text: RawText, output: Path, tokenizer_kind: str, vocab_size: int = SUBWORDS) -> Manifest:
    """Tokenize `text` and write it to the new folder `output`, whole or not at all.

    With several `text.ranks`, all call this alike, and the folder is the same, byte for byte.

    Args:
        text: the corpus.
        output: folder to make; it must not exist, or be empty.
        tokenizer_kind: a key of `megamoe.data.tokenizers.TOKENIZERS`.
        vocab_size: subwords of a SentencePiece vocabulary; other tokenizers ignore it.

    Raises:
        DataError: the output exists or cannot be written, or the text cannot be read or tokenized.
    """
    ranks = text.ranks
    with new_folder(output, ranks) as folder:
        tokenizer = train_tokenizer(tokenizer_kind, text, vocab_size)
        splits = {
            split: write_tokens(folder / f"{split}.bin", encode(text, split, tokenizer), ranks)
            for split in SPLITS
        }
        n_tokens = {split: written.n_tokens for split, written in splits.items()}
        manifest = Manifest(
            dataset=text.dataset,
            tokenizer=tokenizer.kind,
            tokenizer_sha256=ranks.combine(None, lambda _: write_tokenizer(folder, tokenizer)),
            vocab_size=tokenizer.vocab_size,
            dtype=tokenizer.dtype.name,
            splits=splits,
            words_per_token=words_per_token(text, tokenizer, n_tokens),
            origin=list(text.origin),
            **figure_names(text, tokenizer),
        )
        ranks.combine(None, lambda _: (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8"))
    return manifest
