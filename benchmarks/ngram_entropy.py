"""What n-gram counts alone know of a corpus: the figures that a trained model has to beat.

Two figures per order, in bits per token, both on the test split: its conditional entropy under its own
counts, and the cross-entropy of a Witten-Bell model fitted on the training split. The second is the fair
baseline: like a trained model, it has not seen the test split.

    python benchmarks/ngram_entropy.py data.dataset=enwik8 --output benchmarks/results/ngram-entropy.json
"""

import argparse
import json
import shlex
import sys
from datetime import date
from pathlib import Path
from typing import Any

from megamoe.config import load_config
from megamoe.data import Corpus, load_corpus
from megamoe.data.ngrams import conditional_entropy, cross_entropy
from megamoe.errors import MegaMoEError


def main() -> int:
    """Print the table, write it as JSON where asked; the exit code is 2 for a user's mistake."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="data.KEY=VALUE", help="which corpus, as in training")
    parser.add_argument("--max-order", type=int, default=3, help="longest context (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args()
    rows = []
    try:
        corpus = load_corpus(load_config(overrides=args.overrides).data)
        print(f"{corpus.name}, bits per {corpus.unit} of the test split")
        print("order  its own counts  Witten-Bell from train")
        for order in range(args.max_order + 1):
            rows.append(row := _row(corpus, order))
            own, fitted = row["test_conditional_entropy"], row["witten_bell_cross_entropy"]
            print(f"{order:5}  {own:14.4f}  {fitted:22.4f}", flush=True)
    except MegaMoEError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.output:
        args.output.write_text(json.dumps(_result(corpus, rows), indent=2) + "\n", encoding="utf-8")
    return 0


def _row(corpus: Corpus, order: int) -> dict[str, Any]:
    train, test = corpus.tokens["train"], corpus.tokens["test"]
    return {
        "order": order,
        "test_conditional_entropy": round(conditional_entropy(test, corpus.vocab_size, order), 4),
        "witten_bell_cross_entropy": round(cross_entropy(train, test, corpus.vocab_size, order), 4),
    }


def _result(corpus: Corpus, rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "command": shlex.join(["python", *sys.argv]),
        "date": date.today().isoformat(),
        "corpus": corpus.name,
        "unit": f"bits per {corpus.unit}",
        "vocab_size": corpus.vocab_size,
        "tokens": {split: len(tokens) for split, tokens in corpus.tokens.items()},
        "orders": rows,
    }


if __name__ == "__main__":
    sys.exit(main())
