"""Kernels that are foreseen, against those that torch dispatches."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megamoe.models.transformer_xl import TransformerXL
from megamoe.plan.inventory import inventory
from megamoe.plan.launches import PER_PARAMETER, launches
from megamoe.plan.workload import workload
from tests.plan.runs import one_rank, small_run

NO_KERNELS = {
    "_local_scalar_dense", "_reshape_alias", "_unsafe_view", "alias", "as_strided", "detach", "empty",
    "empty_like", "empty_strided", "expand", "lift_fresh", "new_empty", "permute", "resize_", "select",
    "slice", "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view",
}  # fmt: skip


class Kernels(TorchDispatchMode):
    """Counts operations that compute something."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function._schema.name.split("::")[1] not in NO_KERNELS
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "sections",
    [
        {"moe": {"layers": "none"}, "model": {"n_layers": 6}},
        {"moe": {"layers": "none"}, "model": {"n_layers": 6, "dropout": 0.0, "segment_len": 384}},
        {"moe": {"layers": "1,3"}, "model": {"n_layers": 6}},
        {"moe": {"layers": "none"}, "model": {"n_layers": 6}, "training": {"activation_checkpointing": True}},
    ],
    ids=range(4),
)
def test_kernels_are_those_that_torch_dispatches(sections: dict[str, Any]) -> None:
    run = small_run(**sections)
    model = TransformerXL(run.model, run.moe, seed=1)
    model.set_activation_checkpointing(run.training.activation_checkpointing)
    batch, width = run.training.batch_size, run.model.d_model
    ids_BN = torch.randint(run.model.vocab_size, (batch, run.model.segment_len + 1))
    memory = (torch.randn(batch, run.model.memory_len, width),) * run.model.n_layers
    with Kernels() as kernels:
        model(ids_BN[:, :-1], ids_BN[:, 1:], memory).loss_BS.mean().backward()
    load, known = workload(run, one_rank(run), on_gpu=False, top_k=2), inventory(run)
    update = PER_PARAMETER * sum(len(group.sizes) for group in known.groups)
    assert launches(load, known) - update == pytest.approx(kernels.count, rel=0.1)
