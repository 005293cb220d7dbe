"""Matrices in fewer numbers, and what of them cannot be."""

import pytest
import torch

from megamoe.errors import CheckpointError
from megamoe.moe.codings import LowRank, Pruned, Shared, pack, rank_of, unpack
from megamoe.moe.neurons import design, split

E, F, C = 3, 6, 9


@pytest.fixture(scope="module")
def matrices() -> torch.Tensor:
    return torch.randn(E, F, C, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_a_design_matrix_is_the_network_and_back() -> None:
    w_in, b_in, w_out = torch.randn(2, F, 4), torch.randn(2, F), torch.randn(2, 4, F)
    rows = design(w_in, b_in, w_out)
    assert rows.shape == (2, F, 9)
    assert torch.equal(rows[1, 2], torch.cat([w_in[1, 2], b_in[1, 2, None], w_out[1, :, 2]]))
    assert all(map(torch.equal, split(rows), (w_in, b_in, w_out)))


@pytest.mark.parametrize("n_bits", [1, 7, 8, 9, 54, 64])
def test_bitmaps_come_back(n_bits: int) -> None:
    bits = torch.rand(n_bits, generator=torch.Generator().manual_seed(n_bits)) < 0.3
    packed = pack(bits)
    assert packed.dtype == torch.uint8 and len(packed) == -(-n_bits // 8)
    assert torch.equal(unpack(packed, n_bits), bits)


def test_bits_stand_from_the_lowest_on() -> None:
    assert pack(torch.tensor([True, False, False, True, False, False, False, False, True])).tolist() == [9, 1]


@pytest.mark.parametrize("keep", [0.1, 0.25, 0.8])
def test_pruning_keeps_the_largest_entries_of_each_matrix(matrices: torch.Tensor, keep: float) -> None:
    coding = Pruned.of(matrices, keep)
    n_kept = round(keep * F * C)
    for expert, matrix_FC in enumerate(matrices):
        found = coding.matrix(expert)
        kept = found != 0
        assert kept.sum() == n_kept
        assert torch.equal(found[kept], matrix_FC[kept].float())
        assert matrix_FC[kept].abs().min() >= matrix_FC[~kept].abs().max()


def test_entries_of_one_size_are_pruned_to_the_number_all_the_same() -> None:
    coding = Pruned.of(torch.ones(1, 4, 4, dtype=torch.float64), 0.25)
    assert coding.matrix(0).flatten().nonzero().flatten().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("coding_class", [Pruned, LowRank])
def test_all_is_kept_at_1(matrices: torch.Tensor, coding_class: type[Pruned] | type[LowRank]) -> None:
    coding = coding_class.of(matrices, 1)
    for expert, matrix_FC in enumerate(matrices):
        torch.testing.assert_close(coding.matrix(expert), matrix_FC.float(), rtol=0, atol=2e-6)


def test_the_square_of_the_error_is_that_of_the_singular_values_left_out() -> None:
    matrix_FC = torch.randn(20, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    rank = rank_of(0.5, 20, 30)
    assert rank == 6
    coding = LowRank.of([matrix_FC], 0.5)
    error = (coding.matrix(0) - matrix_FC).square().sum()
    torch.testing.assert_close(error, torch.linalg.svdvals(matrix_FC)[rank:].square().sum())


@pytest.mark.parametrize(
    ("sizes", "rank"), [((14336, 12288), 1654), ((512, 705), 74), ((512, 513), 64), ((2048, 1025), 170)]
)
def test_factors_take_no_more_numbers_than_pruning_keeps(sizes: tuple[int, int], rank: int) -> None:
    assert rank_of(0.25, *sizes) == rank
    assert rank * sum(sizes) <= 0.25 * sizes[0] * sizes[1] < (rank + 1) * sum(sizes)


def test_experts_of_a_group_have_one_matrix(matrices: torch.Tensor) -> None:
    coding = Shared((F, C), matrices=matrices[:2].float(), groups=torch.tensor([1, 0, 1]))
    coding.require_sound(3)
    assert torch.equal(coding.matrix(2), matrices[1].float())
    assert coding.same_as(torch.tensor([0, 1, 2, 2])).tolist() == [0, 1, 0, 0]


def test_tensors_of_no_matrices_are_refused(matrices: torch.Tensor) -> None:
    pruned, low_rank = Pruned.of(matrices, 0.3), LowRank.of(matrices, 0.3)
    pruned.require_sound(E)
    low_rank.require_sound(E)
    flipped = pruned.bitmap.clone()
    flipped[1, 2] ^= 1
    broken = {
        "bitmap: has not 16 ones": Pruned((F, C), bitmap=flipped, values=pruned.values),
        "bitmap: .* of torch.int64": Pruned((F, C), bitmap=pruned.bitmap.long(), values=pruned.values),
        r"values: \[\]": Pruned((F, C), bitmap=pruned.bitmap, values=torch.tensor(1.0)),
        "left: ": LowRank((F + 1, C), left=low_rank.left, right=low_rank.right),
        "right: ": LowRank((F, C), left=low_rank.left[:, :, 1:], right=low_rank.right),
        "groups: name others": Shared((F, C), matrices=matrices.float(), groups=torch.tensor([0, 3, 1])),
        r"matrices: \[\]": Shared((F, C), matrices=torch.tensor(1.0), groups=torch.tensor([0, 0, 0])),
    }
    for problem, coding in broken.items():
        with pytest.raises(CheckpointError, match=problem):
            coding.require_sound(E)
