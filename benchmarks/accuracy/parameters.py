"""Numbers in the models of all presets under all policies, as they are built."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from megamoe.config import RunConfig, load_config
from megamoe.config.schema import RouterConfig
from megamoe.models.transformer_xl import TransformerXL
from megamoe.moe.experts import Experts
from megamoe.parallel.placement import saved_buffers

VOCABULARIES = {"enwik8": 256, "text8": 27, "wikitext2": 33_278, "wikitext103": 267_735}
"""Symbols of the presets' corpora."""

Counts = dict[str, int]


def run_of(preset: str, policy: str) -> RunConfig:
    """A preset, complete with its vocabulary, under a policy with its default options or the preset's."""
    run = load_config(preset=preset)
    model = replace(run.model, vocab_size=VOCABULARIES[run.data.dataset])
    router = run.moe.router if run.moe.router.name == policy else RouterConfig(name=policy)
    return replace(run, model=model, moe=replace(run.moe, router=router))


def count_built(run: RunConfig) -> Counts:
    """Build the model without memory for its numbers, and count them."""
    with torch.device("meta"):
        model = TransformerXL(run.model, run.moe, seed=run.training.seed)
    experts = [module for module in model.modules() if isinstance(module, Experts)]
    frozen = sum(buffer.numel() for buffer in saved_buffers(model).values())
    frozen += sum(p.numel() for p in model.parameters() if not p.requires_grad)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    in_experts = sum(p.numel() for stack in experts for p in stack.parameters())
    return {"all": trained + frozen, "frozen": frozen, "in experts": in_experts}


def built(presets: Sequence[str], policies: Sequence[str]) -> Iterator[tuple[str, str, RunConfig, Counts]]:
    """Every policy in every preset."""
    for policy in policies:
        for preset in presets:
            run = run_of(preset, policy)
            yield policy, preset, run, count_built(run)
