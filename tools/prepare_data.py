"""Turn text into the memory-mapped token folders that `megamoe train` reads through data.path."""

import argparse
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from megamoe.data.datasets import (
    DATASETS,
    TOKENIZER_CHOICES,
    choose_tokenizer,
    open_dataset,
    open_text,
)
from megamoe.data.encoding import SUBWORDS, RawText
from megamoe.data.prepare import prepare
from megamoe.data.prepared import Manifest, verify
from megamoe.data.ranks import Ranks, open_ranks
from megamoe.data.samples import BUNDLED, bundled_text
from megamoe.errors import ConfigError, DistributedError, MegaMoEError
from megamoe.launchers import rank_and_size

GRACE_SECONDS = 3
DEFAULT_SPLITS = (0.9, 0.05, 0.05)
MOST_SUBWORDS = 1_000_000

EXAMPLES = """\
examples:
  prepare_data.py enwik8 enwik8.zip --output data/enwik8
  prepare_data.py enwik8 enwik8.zip --output data/enwik8-symbols --tokenizer reference_symbols
  prepare_data.py wikitext103 wikitext-103-v1.zip --output data/wikitext103
  prepare_data.py wikitext2 --sample --output data/wikitext2-8k --tokenizer sentencepiece --vocab-size 8000
  prepare_data.py text book1.txt book2.txt --output data/books --splits 0.8,0.1,0.1
  prepare_data.py text train.txt --valid valid.txt --test test.txt --output data/mine
  prepare_data.py verify data/enwik8
  mpirun -n 8 python tools/prepare_data.py wikitext103 wikitext-103-v1.zip --output data/wikitext103

then: megamoe train --preset small_enwik8 data.path=data/enwik8
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool; the exit code is 0, 2 for a user's mistake, 130 on Ctrl-C, 143 on SIGTERM."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    rank, _ = rank_and_size()
    if rank:
        # Rank 0 speaks for all.
        sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 (until the end)
    args = _parser().parse_args(arguments)
    try:
        with open_ranks() as ranks:
            _run(args, ranks)
    except DistributedError as error:
        if rank:
            # Only where this node alone is at fault does the launcher leave time to say so.
            time.sleep(GRACE_SECONDS)
        print(f"error: {error}", file=sys.__stderr__)
        return 2
    except (MegaMoEError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    return 0


def _run(args: argparse.Namespace, ranks: Ranks) -> None:
    if args.command == "verify":
        manifest = verify(args.folder)
        print(f"{args.folder}: whole and unchanged")
    else:
        manifest = _prepare(args, ranks)
    _describe(manifest)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for dataset in DATASETS.values():
        command = _add_command(commands, dataset.name, f"{dataset.title}; {dataset.where}")
        command.add_argument(
            "paths", nargs="*", type=Path, metavar="PATH", help="archive, raw file(s), or a folder with them"
        )
        if dataset.name in BUNDLED:
            command.add_argument("--sample", action="store_true", help="read the text bundled with megamoe")
    command = _add_command(commands, "text", "any files, taken end to end")
    command.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="training text, or all of it")
    command.add_argument("--valid", nargs="+", type=Path, default=[], metavar="PATH", help="validation text")
    command.add_argument("--test", nargs="+", type=Path, default=[], metavar="PATH", help="test text")
    command.add_argument(
        "--splits",
        type=_fractions,
        metavar="A,B,C",
        help="shares of train, valid and test where no files are given for them (default:"
        f" {','.join(map(str, DEFAULT_SPLITS))})",
    )
    command.add_argument("--name", help="name of the corpus in figures (default: the name of the first file)")
    command = commands.add_parser("verify", help="compare a prepared folder with the hashes in its manifest")
    command.add_argument("folder", type=Path)
    return parser


def _add_command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]", dataset: str, summary: str
) -> argparse.ArgumentParser:
    command = commands.add_parser(dataset, help=summary, description=summary)
    command.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to make")
    choices = TOKENIZER_CHOICES[dataset]
    command.add_argument(
        "--tokenizer",
        choices=choices,
        default=choices[0],
        help="unit of text; docs/data.md explains them (default: %(default)s)",
    )
    if "sentencepiece" in choices:
        command.add_argument(
            "--vocab-size",
            type=int,
            metavar="N",
            help=f"subwords that sentencepiece learns (default: {SUBWORDS})",
        )
    return command


def _fractions(text: str) -> tuple[float, float, float]:
    try:
        train, valid, test = (float(share) for share in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: give three shares such as 0.9,0.05,0.05") from None
    return train, valid, test


def _prepare(args: argparse.Namespace, ranks: Ranks) -> Manifest:
    kind = choose_tokenizer(args.command, args.tokenizer, "--tokenizer")
    vocab_size = getattr(args, "vocab_size", None)
    if vocab_size is not None and kind != "sentencepiece":
        raise ConfigError(f"--vocab-size = {vocab_size}: is for --tokenizer sentencepiece; leave it out")
    if vocab_size is not None and not 0 < vocab_size <= MOST_SUBWORDS:
        raise ConfigError(f"--vocab-size = {vocab_size}: give 1 to {MOST_SUBWORDS:,}")
    return prepare(_open(args, kind, ranks), args.output, kind, vocab_size or SUBWORDS)


def _open(args: argparse.Namespace, kind: str, ranks: Ranks) -> RawText:
    if args.command == "text":
        if args.splits and (args.valid or args.test):
            raise ConfigError(
                "--splits: has nothing to divide where --valid or --test name files; leave it out"
            )
        return open_text(
            args.paths,
            args.name or args.paths[0].name,
            valid=args.valid,
            test=args.test,
            fractions=args.splits or DEFAULT_SPLITS,
            by_lines=kind != "bytes",
            track=_show_progress,
            ranks=ranks,
        )
    if getattr(args, "sample", False):
        if args.paths:
            raise ConfigError(f"--sample: reads the bundled text, so leave out {args.paths[0]}")
        return replace(bundled_text(args.command), track=_show_progress, ranks=ranks)
    return open_dataset(DATASETS[args.command], args.paths, _show_progress, ranks)


def _show_progress(purpose: str, n_bytes: int, blocks: Iterator[bytes]) -> Iterator[bytes]:
    """A bar on a terminal, one line elsewhere."""
    if not sys.stderr.isatty():
        print(f"{purpose} ({n_bytes:,} bytes)", file=sys.stderr, flush=True)
        yield from blocks
        return
    with tqdm(desc=purpose, total=n_bytes, unit="B", unit_scale=True) as bar:
        for block in blocks:
            yield block
            bar.update(len(block))


def _describe(manifest: Manifest) -> None:
    print(f"{manifest.name}: vocabulary {manifest.vocab_size:,}, {manifest.dtype}")
    for split, tokens in manifest.splits.items():
        print(f"  {split:5}  {tokens.n_tokens:>13,} {manifest.unit}s")
    if manifest.note:
        print(f"  {manifest.note}")


if __name__ == "__main__":
    sys.exit(main())
