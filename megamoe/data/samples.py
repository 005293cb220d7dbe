"""The text bundled with megamoe, so that everything runs without a download."""

import hashlib
import lzma
from importlib import resources

from megamoe.data.encoding import SPLITS, RawText, split_at
from megamoe.data.sources import bytes_source, fingerprint
from megamoe.data.text8 import clean_wikipedia
from megamoe.errors import DataError

ENWIK8_HEAD = "enwik8-head"
# sha256 of the uncompressed contents; megamoe/data/samples/README.md says where they come from.
SHA256 = {
    ENWIK8_HEAD: "204482105f330f13c6490df36624bd9bc020dd24ba0854e005ada4d735ad6d7e",
    "wikitext-2.train.tokens": "728c77e87e176af4730f9a80fc6008bcaff421a7202c1c048877c0eec3685f89",
    "wikitext-2.valid.tokens": "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8",
    "wikitext-2.test.tokens": "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0",
    "sentence-polarity.train.tsv": "639da9e0327b2df9b0c97c357e9ac3b79b7e609f2cfedd979a6f759031c39181",
    "sentence-polarity.dev.tsv": "ef490bbe13cb37ee422457f6ed77daa72842cc84dab2c8f9b3aa6f25a1e624bb",
    "sentence-polarity.test.tsv": "0305d4cebbd2dc513c97e234de81da0a62e721634914958c49c74fb3a94568e5",
    "pud-parallel.tsv": "6988e554bb0cc950be62754108e4309ef95c74abee2c00b88ccb6c4b7a7ea5eb",
}
BUNDLED = ("enwik8", "text8", "wikitext2")


def bundled_text(dataset: str) -> RawText:
    """The bundled stand-in for `dataset`, named as what it is.

    Raises:
        DataError: nothing is bundled for that dataset, or the installed file is damaged.
    """
    if dataset == "enwik8":
        return _split_90_5_5(
            dataset,
            "enwik8-sample",
            read_sample(ENWIK8_HEAD),
            "first 4,150,000 bytes of enwik8 (4.15 %), split 90/5/5; not comparable with published figures",
        )
    if dataset == "text8":
        return _split_90_5_5(
            dataset,
            "text8-style sample derived from enwik8 head",
            clean_wikipedia(read_sample(ENWIK8_HEAD)),
            "made from the first 4.15 % of enwik8 by the rules of text8, split 90/5/5; not comparable with"
            " published figures",
        )
    if dataset == "wikitext2":
        return _wikitext2()
    raise DataError(
        f"data.dataset = {dataset!r}: no sample of it is bundled; give data.path, a folder written by"
        f" tools/prepare_data.py {dataset}, or take a bundled one: {', '.join(BUNDLED)}"
    )


def read_sample(name: str) -> bytes:
    """The uncompressed content of a bundled file.

    Raises:
        DataError: it is missing or damaged.
    """
    path = resources.files("megamoe.data") / "samples" / f"{name}.xz"
    try:
        content = lzma.decompress(path.read_bytes())
    except (OSError, lzma.LZMAError) as error:
        raise DataError(f"bundled sample {name}: cannot be read, reinstall megamoe ({error})") from None
    if hashlib.sha256(content).hexdigest() != SHA256[name]:
        raise DataError(f"bundled sample {name}: its content has changed, reinstall megamoe")
    return content


def _split_90_5_5(dataset: str, title: str, content: bytes, note: str) -> RawText:
    """Train, valid and test cut from one text in the proportions of enwik8 and text8."""
    n_bytes = len(content)
    splits = split_at([bytes_source(title, content)], n_bytes * 90 // 100, n_bytes * 95 // 100)
    origin = (fingerprint(title, [content]),)
    return RawText(dataset, title, splits, is_sample=True, note=note, origin=origin)


def _wikitext2() -> RawText:
    contents = {split: read_sample(f"wikitext-2.{split}.tokens") for split in SPLITS}
    sources = {split: bytes_source(f"wikitext-2.{split}", content) for split, content in contents.items()}
    return RawText(
        "wikitext2",
        "WikiText-2 with train articles in another order",
        {split: (source,) for split, source in sources.items()},
        is_sample=True,
        note="valid and test are the original files; train holds the original articles in another order",
        origin=tuple(fingerprint(sources[split].name, [contents[split]]) for split in SPLITS),
    )
