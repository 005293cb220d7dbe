"""An analysis for people: modularity.md."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from megamoe.training.report import markdown_table

Values = dict[str, Any]


def markdown(found: Values, images: Sequence[Path], command: str, where: str) -> str:
    """The report.

    Args:
        found: what `analyze` gives.
        images: beside the report.
        command: that made it.
        where: on which machine, with which versions.
    """
    last = found["checkpoints"][-1]
    parts = [
        f"# Modularity of {last['name']}",
        _setting(found),
        f"    {command}",
        where,
        *(f"Skipped: {reason}" for reason in found["skipped"].values()),
        f"## Neurons at step {last['step']:,}",
        markdown_table(*_neuron_rows(found)),
        _NEURON_NOTES,
        f"## Experts at step {last['step']:,}",
        markdown_table(*_expert_rows(found)),
        _EXPERT_NOTES.format(**found["settings"]),
    ]
    if len(found["checkpoints"]) > 1:
        parts += ["## Over training", markdown_table(*_training_rows(found)), _TRAINING_NOTES]
    if found["perturbation"]:
        parts += ["## Disturbed", markdown_table(*_perturbation_rows(found)), _PERTURBATION_NOTES]
    parts += [f"![{image.stem}]({image.name})" for image in images]
    return "\n\n".join(parts) + "\n"


_NEURON_NOTES = """\
Best: predictivity of the best neuron, 0.5 to 1. Chance: the same under shuffled labels, mean; p: share of
labellings, the true one among them, with at least as good a neuron. Above: neurons better than the best one
under 95 % of the shuffled labellings. Information: bits that a token's expert tells of the label, with
chance and p as before."""

_EXPERT_NOTES = """\
Functional: experts that hold more of the function's neurons than a random placement would at the level
{alpha:g}. Shuffled: how many there are under shuffled labels; partitions: how many if the neurons are
dealt out to experts at random; means. Degree: share of a functional expert's neurons that are the
function's; chance: of any expert's."""

_TRAINING_NOTES = """\
Best minus chance, mean over functions and layers; functional experts of all functions and layers; rank
correlation of the scores of neurons, experts and random groups of neurons with those of the last checkpoint.
Experts settle before neurons only where they are above the random groups."""

_PERTURBATION_NOTES = """\
Bits per token before, and their rise while functional experts are masked or the function's neurons give
noise, on samples of the function and on the others; random: as many others of the same layers, mean and
range over draws."""


def _setting(found: Values) -> str:
    s = found["settings"]
    layers = ", ".join(map(str, found["layers"]))
    samples = ", ".join(f"{name} {n}" for name, n in found["samples"].items())
    return (
        f"Router {found['router']}, {found['n_experts']} experts x {found['d_expert']} neurons in layers"
        f" {layers}, k = {found['top_k']}. Activations are {s['mode']}, on samples of {s['window']} tokens"
        f" ({found['tokens']}), so many of each class: {samples}. The best {100 * s['top_share']:g} % of a"
        f" layer's neurons are a function's; {s['shuffles']} shuffled labellings, {s['partitions']} random"
        f" partitions, seed {s['seed']}."
    )


def _neuron_rows(found: Values) -> tuple[list[str], list[list[str]]]:
    first = found["checkpoints"][0]
    at_first = f"best at step {first['step']:,}"
    header = ["function", "layer", at_first, "best", "chance", "p", "above", "information", "chance", "p"]
    rows = [
        [
            name,
            str(layer),
            f"{first['findings'][name][found['layers'].index(layer)]['best']:.3f}",
            f"{f['best']:.3f}",
            f"{f['best_chance']:.3f}",
            f"{f['best_p']:.3f}",
            str(f["above"]),
            f"{f['information']:.4f}",
            f"{f['information_chance']:.4f}",
            f"{f['information_p']:.3f}",
        ]
        for name, layer, f in last_findings(found)
    ]
    return header, rows


def _expert_rows(found: Values) -> tuple[list[str], list[list[str]]]:
    header = ["function", "layer", "functional", "shuffled", "partitions", "degree", "chance", "which"]
    n_neurons = found["n_experts"] * found["d_expert"]
    rows = [
        [
            name,
            str(layer),
            str(len(f["functional"])),
            f"{f['functional_chance']:.2f}",
            f"{f['functional_random']:.2f}",
            "" if f["degree"] is None else f"{f['degree']:.3f}",
            f"{f['n_top'] / n_neurons:.3f}",
            " ".join(map(str, f["functional"])),
        ]
        for name, layer, f in last_findings(found)
    ]
    return header, rows


def _training_rows(found: Values) -> tuple[list[str], list[list[str]]]:
    header = ["step", "best minus chance", "functional", "neurons", "experts", "random"]
    rows = []
    for i, checkpoint in enumerate(found["checkpoints"]):
        all_found = [f for of_layers in checkpoint["findings"].values() for f in of_layers]
        rows.append(
            [
                f"{checkpoint['step']:,}",
                f"{fmean(f['best'] - f['best_chance'] for f in all_found):.3f}",
                str(sum(len(f["functional"]) for f in all_found)),
                *(_number(found["stability"][kind][i][-1]) for kind in ("neurons", "experts", "random")),
            ]
        )
    return header, rows


def _perturbation_rows(found: Values) -> tuple[list[str], list[list[str]]]:
    header = ["function", "text", "before", "experts", "random experts", "neurons", "random neurons"]
    rows = []
    for name, effects in found["perturbation"].items():
        for text in ("own", "others"):
            cells = [_spread([effect[text] for effect in effects.get(kind, [])]) for kind in header[3:]]
            rows.append([name, text, f"{effects['before'][text]:.3f}", *cells])
    return header, rows


def last_findings(found: Values) -> list[tuple[str, int, Values]]:
    """Function, layer and finding of the last checkpoint."""
    return [
        (name, layer, finding)
        for name, of_layers in found["checkpoints"][-1]["findings"].items()
        for layer, finding in zip(found["layers"], of_layers, strict=True)
    ]


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    text = f"{fmean(values):+.3f}"
    return text if len(values) == 1 else f"{text} ({min(values):+.3f} to {max(values):+.3f})"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
