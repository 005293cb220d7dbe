"""The README of an exported model."""

from collections.abc import Sequence

from megamoe.checkpoint.state import TrainingState
from megamoe.config.schema import RunConfig
from megamoe.convert.tensors import LazyTensor, total_bytes

_CARD = """\
---
library_name: megamoe
tags:
- transformer-xl
- mixture-of-experts
- {tag}
---

# {title}

{sentence}

| | |
|---|---|
{rows}

```python
import megamoe

model = megamoe.load_model("THIS_FOLDER")
```

`model.safetensors` holds every tensor under the path it has in the model. Experts are stacked: `w_in` is
[experts, hidden, width]. Where a hypernetwork generates
the router, `layers.N.moe.router.weight` and `.bias` are what it generates.
"""


def model_card(tensors: Sequence[LazyTensor], config: RunConfig, state: TrainingState) -> str:
    """Markdown: what the model is, what it was trained on, what it scored, and how it is loaded."""
    model, moe = config.model, config.moe
    layers = moe.layer_indices(model.n_layers)
    trained = sum(tensor.numel for tensor in tensors if tensor.kind == "weight")
    rows = {
        "Parameters": f"{trained:,}",
        "Layers": f"{model.n_layers}, width {model.d_model}, {model.n_heads} heads of {model.d_head}",
        "Vocabulary": f"{model.vocab_size:,}",
        "Training steps": f"{state.step:,}",
        "Bytes": f"{total_bytes(tensors):,}",
    }
    if config.task.name:
        rows["Classes"] = ", ".join(config.task.labels)
    if layers:
        rows["Experts"] = f"{moe.n_experts} of hidden width {moe.d_expert} in each of {len(layers)} layers"
        rows["Router"] = f"{moe.router.name}, {moe.top_k} experts per token"
    if corpus := state.corpus.get("name"):
        sample = ", a sample: its figures do not compare with those of the benchmark"
        rows["Text"] = f"{corpus}{sample if state.corpus.get('is_sample') else ''}"
    if state.best_metric is not None and state.best_step is not None:
        metric = state.corpus.get("metric", "figure")
        rows["Best validation"] = f"{state.best_metric:.4f} {metric} at step {state.best_step:,}"
    kind = "mixture-of-experts Transformer-XL" if layers else "Transformer-XL"
    purpose = "sentence classifier" if config.task.name else "language model"
    return _CARD.format(
        title=config.name or f"{kind} by megamoe",
        tag="text-classification" if config.task.name else "causal-lm",
        sentence=f"A {kind} {purpose}, exported by megamoe.",
        rows="\n".join(f"| {name} | {value} |" for name, value in rows.items()),
    )
