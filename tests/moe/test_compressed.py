"""Experts computed from a compressed form, against the dense experts of the restored weights."""

import pytest
import torch

from megamoe.moe.codings import Coding, LowRank, Pruned, Shared
from megamoe.moe.compressed import Compressed, CompressedExperts, FactoredExperts, OnTheFlyExperts
from megamoe.moe.exchange import Arrived, LocalExchange
from megamoe.moe.experts import Experts

E, F, D = 4, 8, 6
N, K = 11, 3


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def codings() -> dict[str, Coding]:
    residuals_EFC = randn(E, F, 2 * D + 1)
    shared = Shared((F, 2 * D + 1), matrices=residuals_EFC[:2].float(), groups=torch.tensor([0, 1, 1, 0]))
    return {
        "pruned": Pruned.of(residuals_EFC, 0.3),
        "low_rank": LowRank.of(residuals_EFC, 0.5),
        "shared": shared,
    }


def arrive(seed: int = 1) -> Arrived:
    """Some choices name no expert, and some tokens name one expert twice."""
    generator = torch.Generator().manual_seed(seed)
    ids_TK = torch.randint(-1, E, (N, K), generator=generator)
    return LocalExchange().dispatch(
        randn(N, D, seed=2).float(), ids_TK, torch.rand(N, K, generator=generator), E, None
    )


def compressed(coding: Coding, centred: bool) -> Compressed:
    b_out_ED = randn(E, D, seed=3).float()
    if isinstance(coding, Shared):
        b_out_ED = b_out_ED[coding.groups]
    return Compressed(randn(F, 2 * D + 1, seed=4).float() if centred else None, coding, b_out_ED)


def dense(form: Compressed) -> Experts:
    experts = Experts(E, D, F, dropout=0.0, init_std=1.0, seed=0, layer=0, local=range(E))
    experts.load_state_dict(form.weights()._asdict())
    return experts.eval()


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize(
    ("name", "computed"),
    [*((name, OnTheFlyExperts) for name in codings()), ("low_rank", FactoredExperts)],
)
def test_compressed_experts_compute_what_the_restored_ones_do(
    name: str, computed: type[CompressedExperts], centred: bool
) -> None:
    form = compressed(codings()[name], centred)
    ours, restored, arrived = computed(*form).eval(), dense(form), arrive()
    close = {"rtol": 1e-5, "atol": 1e-5}
    with torch.no_grad():
        torch.testing.assert_close(ours(arrived), restored(arrived), **close)
        torch.testing.assert_close(ours.outputs(arrived), restored.outputs(arrived), **close)
        x_ND = arrived.x_ND

        def norms(y_ND: torch.Tensor) -> torch.Tensor:
            return y_ND.norm(dim=1)

        torch.testing.assert_close(ours.responses(x_ND, norms), restored.responses(x_ND, norms), **close)


def test_centre_and_residual_are_not_two_networks_added() -> None:
    """What the factored form is not: the sum is far from it."""
    form = compressed(codings()["low_rank"], centred=True)
    x_ND = randn(N, D, seed=2).float()
    no_bias = torch.zeros_like(form.b_out_ED)
    residual_alone = FactoredExperts(None, form.coding, no_bias)
    centre_alone = FactoredExperts(
        form.centre_FC, LowRank.of(torch.zeros(E, F, 2 * D + 1), 0.5), form.b_out_ED
    )
    with torch.no_grad():
        exact = FactoredExperts(*form).one(0, x_ND)
        added = residual_alone.one(0, x_ND) + centre_alone.one(0, x_ND)
    assert (added - exact).norm() > 0.1 * exact.norm()


def test_choices_that_meet_in_one_group_count_once_with_their_weights_summed() -> None:
    class Counting(OnTheFlyExperts):
        rows = 0

        def one(self, expert: int, x_nD: torch.Tensor) -> torch.Tensor:
            self.rows += len(x_nD)
            return super().one(expert, x_nD)

    form = compressed(codings()["shared"], centred=False)
    experts = Counting(*form).eval()
    ids_TK = torch.tensor([[0, 3], [1, 2], [0, 1]])  # groups 0 0, 1 1, 0 1
    x_TD, weights_TK = randn(3, D).float(), torch.tensor([[0.25, 0.75], [0.5, 0.5], [0.4, 0.6]])
    with torch.no_grad():
        y_TD = experts(LocalExchange().dispatch(x_TD, ids_TK, weights_TK, E, None))
        assert experts.rows == 4
        torch.testing.assert_close(y_TD[0], experts.one(0, x_TD[:1])[0])


def test_only_the_compressed_form_is_held() -> None:
    form = compressed(codings()["low_rank"], centred=True)
    held = sum(t.nbytes for t in (*FactoredExperts(*form).parameters(), *FactoredExperts(*form).buffers()))
    assert held == 4 * (F * (2 * D + 1) + E * D) + sum(t.nbytes for t in form.coding.buffers())
