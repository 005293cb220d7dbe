"""Generated texts on the terminal: one while it comes, several when they are done, or JSON."""

import json
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from megamoe.serve.generation import TextGenerator
from megamoe.training.evaluation import NO_EXPERTS


@dataclass
class _Text:
    prompt: str
    sample: int
    text: str = ""


def print_texts(generator: TextGenerator, prompts: Sequence[bytes], *, as_json: bool = False) -> None:
    """Generate, and print each prompt with its text; what is no text goes to stderr.

    Interrupted, it prints what there is so far.

    Args:
        generator: the model.
        prompts: as `TextGenerator.stream` takes them.
        as_json: print a JSON object for each text instead, one a line.

    Raises:
        DataError: a prompt does not fit the tokenizer.
    """
    stream, asked = generator.stream(prompts), generator.settings.k
    if asked not in (None, generator.top_k):
        print(f"megamoe: k = {asked}: this model does not follow it, {_experts(generator)}", file=sys.stderr)
    # A terminal that lacks a character shows a question mark.
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    samples = range(generator.settings.samples)
    texts = [_Text(prompt.decode(errors="replace"), sample) for prompt in prompts for sample in samples]
    at_once = len(texts) == 1 and not as_json
    if at_once:
        print(texts[0].prompt, end="", flush=True)
    n_tokens, begin = 0, time.perf_counter()
    try:
        for pieces in stream:
            n_tokens += 1
            for text, piece in zip(texts, pieces, strict=True):
                text.text += piece
            if at_once:
                print(pieces[0], end="", flush=True)
    finally:
        seconds = time.perf_counter() - begin
        if as_json:
            _print_json(texts, n_tokens, seconds, generator)
        else:
            _print_rest([] if at_once else texts)
            print(_summary(len(texts), n_tokens, seconds, generator), file=sys.stderr)


def _print_json(texts: Iterable[_Text], n_tokens: int, seconds: float, generator: TextGenerator) -> None:
    settings = generator.settings
    common: dict[str, Any] = {
        "tokens": n_tokens,
        "k": None if generator.top_k == NO_EXPERTS else generator.top_k,
        "temperature": settings.temperature, "top_p": settings.top_p, "seed": settings.seed,
        "seconds": round(seconds, 3), "tokens_per_second": round(n_tokens / seconds, 1),
    }  # fmt: skip
    if generator.offloaded is not None:
        traffic = generator.offloaded.traffic
        common |= {"experts_in_slots": round(traffic.hit_rate, 4), "bytes_moved": traffic.n_bytes}
    for text in texts:
        print(json.dumps(vars(text) | common))


def _print_rest(texts: Sequence[_Text]) -> None:
    """The texts that are not on the terminal yet, or the line end that the one there lacks."""
    for number, text in enumerate(texts, start=1):
        print(f"--- {number} of {len(texts)}\n{text.prompt}{text.text}")
    if not texts:
        print()


def _summary(n_texts: int, n_tokens: int, seconds: float, generator: TextGenerator) -> str:
    each = f" in each of {n_texts} texts" if n_texts > 1 else ""
    rate = n_tokens * n_texts / seconds
    unit = generator.tokenizer.unit
    return f"{n_tokens:,} {unit}s{each}, {seconds:.1f} s, {rate:,.0f} {unit}s/s, {_experts(generator)}"


def _experts(generator: TextGenerator) -> str:
    if generator.top_k == NO_EXPERTS:
        return "no experts"
    return f"k = {generator.top_k} of {generator.run.moe.n_experts}{_slots(generator)}"


def _slots(generator: TextGenerator) -> str:
    if generator.offloaded is None:
        return ""
    traffic, slots = generator.offloaded.traffic, generator.offloaded.slots
    return (
        f", {slots[0].n_slots} in memory, {100 * traffic.hit_rate:.1f} % of the needed ones there,"
        f" {traffic.n_bytes / 2**20:,.1f} MiB loaded"
    )
