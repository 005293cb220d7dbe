"""The whole analysis: a series of checkpoints and labelled texts to plain values, modularity.json.

Shapes: C checkpoints, Q functions, L mixture layers, U neurons of a layer.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from megamoe.analyze.activations import Activations, record
from megamoe.analyze.experts import n_top_neurons, top_neurons
from megamoe.analyze.findings import Finding, find
from megamoe.analyze.functions import SampleGroup, sample_groups
from megamoe.analyze.perturbation import Disturbing
from megamoe.analyze.predictivity import Floats
from megamoe.analyze.series import Checkpoint, Series
from megamoe.analyze.settings import Settings
from megamoe.analyze.stability import stability
from megamoe.analyze.texts import LabelledTexts
from megamoe.errors import ConfigError
from megamoe.moe.randomness import hash_of
from megamoe.parallel.device import Device
from megamoe.training.evaluation import top_ks_to_score


def analyze(
    series: Series, wanted: Sequence[LabelledTexts], settings: Settings, tell: Callable[[str], None]
) -> dict[str, Any]:
    """Analyze every checkpoint, and disturb the last.

    Args:
        series: of one model.
        wanted: texts by class, from which functions are made.
        settings: how.
        tell: called with a line before each part of the work.

    Returns:
        what modularity.json holds; docs/modularity.md describes it.

    Raises:
        CheckpointError: a checkpoint is damaged.
        ConfigError: a setting does not fit the model.
        DataError: no function can be asked in its vocabulary.
    """
    top_k = _experts_per_token(series, settings)
    groups, skipped = sample_groups(wanted, series.tokenizer, settings)
    for name, reason in skipped.items():
        tell(f"skipped {name}: {reason}")
    looks: list[_Look] = []
    for i, checkpoint in enumerate(series.checkpoints, 1):
        tell(
            f"step {checkpoint.step} ({i} of {len(series.checkpoints)}): {', '.join(g.name for g in groups)}"
        )
        model = checkpoint.load().to(Device.detect().kind)
        looks.append(_Look.at(checkpoint, model, groups, settings, top_k))
    scores_CQLU = np.stack([look.scores_QLU for look in looks])
    rng = np.random.default_rng(hash_of(settings.seed, "stability"))
    moe = series.run.moe
    return {
        "settings": asdict(settings),
        "tokens": series.tokenizer.label,
        "top_k": top_k,
        "router": moe.router.name,
        "layers": list(moe.layer_indices(series.run.model.n_layers)),
        "n_experts": moe.n_experts,
        "d_expert": moe.d_expert,
        "samples": {group.name: len(group.tokens_WS) // len(group.classes) for group in groups},
        "skipped": skipped,
        "functions": list(looks[-1].findings),
        "checkpoints": [look.to_dict() for look in looks],
        "stability": {
            name: _plain(matrix)
            for name, matrix in stability(scores_CQLU, moe.n_experts, settings.partitions, rng).items()
        },
        "perturbation": _disturb(looks[-1], groups, model, settings, top_k, tell) if settings.draws else {},
    }


@dataclass(frozen=True)
class _Look:
    """What is found in one checkpoint.

    Attributes:
        findings: of each function, layer by layer.
        scores_QLU: predictivities.
        sizes: mean activation in each layer on the samples of each group.
    """

    checkpoint: Checkpoint
    findings: Mapping[str, Sequence[Finding]]
    scores_QLU: Floats
    sizes: Mapping[str, Sequence[float]]

    @classmethod
    def at(
        cls,
        checkpoint: Checkpoint,
        model: Any,
        groups: Sequence[SampleGroup],
        settings: Settings,
        top_k: int,
    ) -> "_Look":
        findings: dict[str, list[Finding]] = {}
        scores, sizes = [], {}
        for group in groups:
            seen = record(model, group.tokens_WS, settings, top_k=top_k, step=checkpoint.step)
            sizes[group.name] = seen.maxima_LUW.mean((1, 2)).tolist()
            for function in group.functions:
                found = [
                    find(maxima_UW, choices_WE, function, settings, _rng(settings, function.name, layer))
                    for layer, maxima_UW, choices_WE in _by_layer(seen)
                ]
                findings[function.name] = [finding for finding, _ in found]
                scores.append(np.stack([scores_U for _, scores_U in found]))
        return cls(checkpoint, findings, np.stack(scores), sizes)

    def to_dict(self) -> dict[str, Any]:
        findings = {name: list(map(asdict, found)) for name, found in self.findings.items()}
        return {"name": self.checkpoint.name, "step": self.checkpoint.step, "findings": findings}


def _by_layer(seen: Activations) -> list[tuple[int, Any, Any]]:
    return [(i, *of_layer) for i, of_layer in enumerate(zip(seen.maxima_LUW, seen.choices_LWE, strict=True))]


def _rng(settings: Settings, name: str, layer: int) -> np.random.Generator:
    """The same for every checkpoint, so that these are compared on the same draws."""
    return np.random.default_rng(hash_of(settings.seed, name, layer))


def _experts_per_token(series: Series, settings: Settings) -> int:
    """The k in force.

    Raises:
        ConfigError: the model has fewer experts, or its attention never saw so long a sample.
    """
    model, moe = series.run.model, series.run.moe
    longest = model.segment_len + model.memory_len
    if settings.window > longest:
        raise ConfigError(
            f"analysis.window = {settings.window}: give {longest} tokens or fewer; no further back has the"
            " model learned to look"
        )
    k = moe.top_k if settings.k is None else settings.k
    if k > moe.n_experts:
        raise ConfigError(f"analysis.k = {k}: give a number up to moe.n_experts = {moe.n_experts}")
    return top_ks_to_score(series.run, [k])[0]


def _disturb(
    look: _Look,
    groups: Sequence[SampleGroup],
    model: Any,
    settings: Settings,
    top_k: int,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    n_top = n_top_neurons(look.scores_QLU.shape[2], settings.top_share)
    scores = dict(zip(look.findings, look.scores_QLU, strict=True))
    effects = {}
    for group in groups:
        for function in group.functions:
            tell(f"disturbing {function.name}")
            disturbing = Disturbing(
                model, group.tokens_WS[function.rows], function, settings,
                {"top_k": top_k, "step": look.checkpoint.step},
            )  # fmt: skip
            effects[function.name] = disturbing.effects(
                [np.array(finding.functional, np.int64) for finding in look.findings[function.name]],
                [
                    top_neurons(scores_U, n_top, _rng(settings, function.name, layer))
                    for layer, scores_U in enumerate(scores[function.name])
                ],
                look.sizes[group.name],
            )
    return effects


def _plain(matrix: Floats) -> list[list[float | None]]:
    """For JSON, which has no word for numbers that are not finite."""
    return [[float(value) if np.isfinite(value) else None for value in row] for row in matrix]
