"""Losses, memories, mixture layers and gradients of the published implementation."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from megamoe.models.reference_names import from_reference, to_reference
from megamoe.models.transformer_xl import ModelOutput, TransformerXL
from megamoe.moe.layer import MoELayer
from megamoe.moe.routers.hyper import HyperRouter
from tests.models.goldens import Golden, golden_names

CASES = [
    pytest.param(name, k, id=f"{name}-k{k}")
    for name in golden_names("forward")
    for k in Golden("forward", name).config["k_list"]
]


def close(actual: torch.Tensor, golden: torch.Tensor, tolerance: float = 1e-5, relative: float = 0.0) -> None:
    assert_close(actual.detach(), golden, atol=tolerance, rtol=relative)


def time_first(x_BS: torch.Tensor) -> torch.Tensor:
    return x_BS.transpose(0, 1)


@dataclass
class Run:
    """What a model gave on the segments of a case."""

    outputs: list[ModelOutput] = field(default_factory=list)
    moe_in: list[torch.Tensor] = field(default_factory=list)
    moe_out: list[torch.Tensor] = field(default_factory=list)

    @property
    def loss(self) -> torch.Tensor:
        """[segments, T, B], as in the goldens."""
        return torch.stack([time_first(output.loss_BS) for output in self.outputs])


def run(model: TransformerXL, golden: Golden, k: int) -> Run:
    result = Run()

    def keep(module: MoELayer, arguments: tuple[Any, ...], output: tuple[torch.Tensor, Any]) -> None:
        result.moe_in.append(arguments[0])
        result.moe_out.append(output[0])

    hooks = [layer.register_forward_hook(keep) for layer in model.moe_layers]
    memory = None
    for data, target in zip(golden.arrays["data"], golden.arrays["target"], strict=True):
        output = model(data.t(), target.t(), memory, top_k=k or None)
        memory = output.memory
        result.outputs.append(output)
    for hook in hooks:
        hook.remove()
    return result


@pytest.mark.parametrize(("name", "k"), CASES)
def test_published_numbers(name: str, k: int) -> None:
    golden = Golden("forward", name)
    model = golden.model("param/")
    hypernets = {key: buffer.requires_grad_() for key, buffer in model.named_buffers()}
    result = run(model, golden, k)
    left = golden.group(f"k{k}/")

    check_losses(result, left, n_clusters=len(golden.config["cutoffs"]) + 1)
    check_memories(result, left, golden.config["mem_len"])
    check_mixture_layers(model, result, left, golden)
    if k in golden.config["grad_k"]:
        result.loss.mean((1, 2)).sum().backward()
        check_gradients(dict(model.named_parameters()), left, "grad/", golden)
        check_gradients(hypernets, left, "grad_hypernet/", golden)
    left.pop("loss64", None)  # test_published_numbers_in_double
    assert not left, "golden arrays that nothing was compared with"


def check_losses(result: Run, left: dict[str, torch.Tensor], n_clusters: int) -> None:
    published = left.pop("loss")
    if n_clusters == 1:
        close(result.loss, published)
    else:  # grouped by cluster there, in token order here
        close(result.loss.mean((1, 2)), published.mean((1, 2)))
        close(result.loss, left.pop("loss_keep_order"))


def check_memories(result: Run, left: dict[str, torch.Tensor], memory_len: int) -> None:
    hidden = torch.zeros(result.outputs[0].hidden_BSD[:, :0].shape)
    for segment, output in enumerate(result.outputs):
        hidden = torch.cat([hidden, output.hidden_BSD.detach()], dim=1)
        last = hidden[:, max(0, hidden.shape[1] - memory_len) :]  # the published model keeps its output too
        published = left.pop(f"mems_seg{segment}", None)
        if memory_len == 0:
            assert published is None or published.numel() == 0
            assert all(memory.shape[1] == 0 for memory in output.memory)
        else:
            close(torch.stack([time_first(memory) for memory in (*output.memory, last)]), published)


def check_mixture_layers(
    model: TransformerXL, result: Run, left: dict[str, torch.Tensor], golden: Golden
) -> None:
    for i, layer in enumerate(model.moe_layers):
        routing = result.outputs[0].routings[i]
        n_rows = len(routing.weights_TK)
        # Rows of the goldens run through the batch first.
        order = torch.arange(n_rows).view(golden.config["batch"], -1).t().flatten()
        combine = torch.zeros(n_rows, golden.moe_config.n_experts)
        combine = combine.scatter(1, routing.expert_ids_TK, routing.weights_TK.detach())
        close(result.moe_in[i].flatten(0, 1)[order], left.pop(f"layer{layer.layer}/moe_in"))
        close(result.moe_out[i].flatten(0, 1)[order], left.pop(f"layer{layer.layer}/moe_out"))
        close(routing.logits_TE[order], left.pop(f"layer{layer.layer}/gate_logits"), relative=1e-5)
        close(combine[order], left.pop(f"layer{layer.layer}/combine"))
        router = layer.router
        weight, bias = router.generate() if isinstance(router, HyperRouter) else (router.weight, router.bias)
        close(weight, golden.arrays[f"router/layer{layer.layer}/weight"])
        close(bias, golden.arrays[f"router/layer{layer.layer}/bias"])


def check_gradients(
    tensors: dict[str, torch.Tensor], left: dict[str, torch.Tensor], prefix: str, golden: Golden
) -> None:
    names = [key for key in left if key.startswith(prefix)]
    published = from_reference(
        {key.removeprefix(prefix): left.pop(key) for key in names}, golden.model_config
    )
    if prefix == "grad/":
        assert set(published) == set(tensors)
    for name, gradient in published.items():
        close(tensors[name].grad, gradient)


@pytest.mark.parametrize(("name", "k"), [case for case in CASES if "adaptive" not in case.id])
def test_published_numbers_in_double(name: str, k: int) -> None:
    golden = Golden("forward", name)
    result = run(golden.model("param/").double(), golden, k)
    close(result.loss, golden.arrays[f"k{k}/loss64"], tolerance=1e-12)


def test_no_router_trains_at_one_expert_per_token() -> None:
    golden = Golden("forward", "hyperrouter_h6")
    model = golden.model("param/")
    run(model, golden, k=1).loss.mean().backward()
    assert all(torch.all(layer.router.embedding.grad == 0) for layer in model.moe_layers)


@pytest.mark.parametrize("name", golden_names("forward"))
def test_published_names_are_recovered(name: str) -> None:
    golden = Golden("forward", name)
    published = golden.group("param/")
    state = to_reference(golden.model("param/").state_dict(), golden.model_config)
    unused = {key for key in published if ".gate.gate." in key and golden.moe_config.router.name == "hyper"}
    assert set(published) - unused == set(state)
    for key, tensor in state.items():
        torch.testing.assert_close(tensor, published[key], rtol=0, atol=0)
