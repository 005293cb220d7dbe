"""Where a training step makes the host wait for the device: where its arithmetic or DeepSpeed has to."""

import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

import megamoe
from megamoe.config.schema import RouterConfig
from megamoe.models.model_of import model_of
from megamoe.moe import experts
from megamoe.moe.auxiliary import auxiliary_loss
from megamoe.moe.grouped import mix_grouped
from megamoe.moe.ranks import ONE_RANK
from megamoe.moe.routers.registry import BUILT_IN
from megamoe.moe.updates import update_routers
from megamoe.parallel.launch import read_launch, start
from megamoe.training.callbacks import Callback, StepRecord
from megamoe.training.trainer import Trainer
from tests.ranks import run_ranks
from tests.training.runs import BF16, FP32, build_trainer, toy_run

LOOKS = [
    *((torch.Tensor, name) for name in ("item", "tolist", "cpu", "numpy", "nonzero", "equal")),
    *((torch.Tensor, f"__{name}__") for name in ("bool", "float", "int", "index")),
    (torch, "nonzero"), (torch, "equal"),
]  # fmt: skip
ROOTS = {package.__name__: Path(package.__file__).parent for package in (megamoe, deepspeed)}

EXPERTS_ON_A_CPU = "megamoe/moe/mixture.py"
"""Expert by expert it must know how many tokens there are; GPUs compute all experts in one kernel."""

AMONG_RANKS = {"megamoe/parallel/exchange.py", "megamoe/parallel/launch.py"}
"""How many tokens travel, and whether a rank was told to stop."""
NORM = {"megamoe/parallel/engine.py"}
"""At stage 0 it decides whether there is a step."""
LOOKING = {
    "base": "assigns by an algorithm that runs on the host",
    "lms": "multiplies each sequence by matrices of its own",
    "similarity": "compares the pairs of experts that its table says are due",
    "stable": "asks whether its first stage is over",
}
"""Policies that have to look, with the reason."""
STAGE_0: dict[str, Any] = {"zero_optimization": {"stage": 0}}


class Looks:
    """Notes which files make the host look at a tensor, in forward and in backward passes."""

    def __init__(self) -> None:
        self.places: set[str] = set()
        self._patch = pytest.MonkeyPatch()

    def __enter__(self) -> "Looks":
        for owner, name in LOOKS:
            self._patch.setattr(owner, name, self._noting(getattr(owner, name)))
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.undo()

    def _noting(self, look: Callable[..., Any]) -> Callable[..., Any]:
        def noting(*args: Any, **kwargs: Any) -> Any:
            self.places.add(innermost_file())
            return look(*args, **kwargs)

        return noting


def innermost_file() -> str:
    """Of megamoe or DeepSpeed, whichever is deeper in the stack."""
    frame = sys._getframe(2)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        for name, root in ROOTS.items():
            if path.is_relative_to(root):
                return f"{name}/{path.relative_to(root)}"
        frame = frame.f_back
    return "elsewhere"


class Watch(Callback):
    """Looks on from the end of step 2 to the end of step 5."""

    def __init__(self) -> None:
        self.looks = Looks()

    def on_step_end(self, trainer: Trainer, record: StepRecord) -> None:
        if record.step == 2:
            self.looks.__enter__()
        if record.step == 5:
            self.looks.__exit__(None, None, None)


def places(folder: str, ds: dict[str, Any], router: str) -> set[str]:
    """Where a rank looks at tensors while it trains."""
    run = toy_run(
        Path(folder) / router, training={"max_steps": 6, "grad_clip": 0 if ds == STAGE_0 else 1},
        logging={"every": 100}, evaluation={"every": 0}, checkpoint={"every": 0},
    )  # fmt: skip
    run = replace(run, moe=replace(run.moe, router=RouterConfig(name=router)))
    watch = Watch()
    build_trainer(run, ds, start(read_launch()), [watch]).train()
    return watch.looks.places


def places_of_all(folder: str) -> dict[tuple[str, str], set[str]]:
    """By policy and precision."""
    return {
        (router, name): places(f"{folder}/{name}", ds, router)
        for router in ("hyper", "smoe", "switch", "noisy", "bias_balanced", "sigma", "omni")
        for name, ds in (("fp32", FP32), ("bf16", BF16), ("stage 0", STAGE_0))
    }


@pytest.mark.parametrize("n_ranks", [1, 2])
def test_nothing_waits_but_what_has_to(tmp_path: Path, n_ranks: int) -> None:
    needed = {EXPERTS_ON_A_CPU} | (AMONG_RANKS if n_ranks > 1 else set())
    for by_run in run_ranks(places_of_all, n_ranks, str(tmp_path)):
        for (router, name), found in by_run.items():
            ours = {place for place in found if not place.startswith("deepspeed/")}
            assert ours == needed | (NORM if name == "stage 0" else set()), (router, name)


def test_looking_is_noticed() -> None:
    x = torch.ones((), requires_grad=True)
    x.register_hook(lambda gradient: gradient * gradient.item())
    with Looks() as looks:
        x.backward()
        assert looks.places == {"elsewhere"}
        for look in (float, int, bool, torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.nonzero):
            looks.places.clear()
            look(torch.ones(()))
            assert looks.places == {"elsewhere"}, look


def step_of(model: Any, run: Any, input_ids_BS: torch.Tensor, step: int) -> None:
    """What a training step computes outside the optimizer."""
    output = model(input_ids_BS, input_ids_BS, top_k=2, step=step)
    auxiliary, _ = auxiliary_loss(output.routings, run.moe, ONE_RANK.mean)
    (output.loss_BS.mean() + auxiliary).backward()
    update_routers([layer.router for layer in model.moe_layers], [output.routings], ONE_RANK, step)


def empty(module: torch.nn.Module, mode: FakeTensorMode) -> None:
    """Leave the tensors of `module` their shapes and take their numbers."""
    for part in module.modules():
        for name, buffer in part._buffers.items():
            part._buffers[name] = buffer if buffer is None else mode.from_tensor(buffer)
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = torch.nn.Parameter(mode.from_tensor(parameter.data))


@pytest.mark.parametrize("name", BUILT_IN)
def test_models_on_gpus_look_at_no_number(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the experts in one kernel, on tensors without numbers: to look, or to count, is an error."""
    run = toy_run(tmp_path, model={"vocab_size": 11, "n_layers": 2}, moe={"balance_loss": "auto"})
    run = replace(run, moe=replace(run.moe, router=RouterConfig(name=name)))
    model = model_of(run).bfloat16()
    ids_BS = torch.arange(24).view(4, 6) % 11
    step_of(model, run, ids_BS, 0)  # what a policy draws on the host for many steps is drawn
    monkeypatch.setattr(experts, "choose_path", lambda x_ND, w_in: mix_grouped)
    mode = FakeTensorMode()
    empty(model, mode)
    ids_BS = mode.from_tensor(ids_BS)
    looks = pytest.raises((DataDependentOutputException, DynamicOutputShapeException))
    with mode, looks if name in LOOKING else nullcontext():
        step_of(model, run, ids_BS, 1)
