"""Masks of dropout: their definition, their statistics, and what is done with them."""

import itertools
import math

import pytest
import torch

from megamoe.moe import dropout
from megamoe.moe.dropout import Dropout, dropped_levels, keep_mask
from megamoe.moe.randomness import at_site, draw, token_keys
from tests.oracles import randomness as oracle

SITES = ("embedding", "layers.0.attention", "layers.0.moe.experts", "layers.11.moe.experts")


@pytest.mark.parametrize("p", [0.1, 0.5, 0.93, 2**-16])
@pytest.mark.parametrize("width", [1, 4, 7, 64])
def test_masks_equal_the_oracle(width, p):
    keys_BS = token_keys(7, 3, range(4), 6)
    expected = [oracle.keep(oracle.token_key(7, 3, b, s), width, p) for b in range(4) for s in range(6)]
    assert keep_mask(keys_BS, width, p).flatten(0, 1).tolist() == expected


def test_masks_do_not_depend_on_how_they_are_computed(monkeypatch):
    keys_BS = token_keys(7, 3, range(9), 11)
    whole = keep_mask(keys_BS, 30, 0.3)
    monkeypatch.setattr(dropout, "WORDS_AT_ONCE", {"cpu": 50})
    assert torch.equal(keep_mask(keys_BS, 30, 0.3), whole)
    assert torch.equal(keep_mask(keys_BS[2:5], 30, 0.3), whole[2:5])
    assert torch.equal(keep_mask(keys_BS, 13, 0.3), whole[..., :13])
    assert keep_mask(keys_BS[:0], 30, 0.3).shape == (0, 11, 30)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compares two kinds of devices")
def test_masks_are_the_same_on_a_gpu():
    on_gpu = keep_mask(token_keys(7, 3, range(9), 11, torch.device("cuda")), 515, 0.3)
    assert torch.equal(on_gpu.cpu(), keep_mask(token_keys(7, 3, range(9), 11), 515, 0.3))


def masks(p: float) -> torch.Tensor:
    """Drop masks [step, site, row, position, unit] in double, centred and scaled to unit variance."""
    dropped = []
    for step in range(4):
        keys_BS = token_keys(1111, step, range(16), 32)
        dropped.append(torch.stack([~keep_mask(at_site(keys_BS, site), 128, p) for site in SITES]))
    rate = dropped_levels(p) / 65536
    return (torch.stack(dropped).double() - rate) / math.sqrt(rate * (1 - rate))


PROBABILITIES = pytest.mark.parametrize("p", [0.1, 0.5])


def deviation(products: torch.Tensor) -> float:
    """How many standard deviations the mean of independent terms of variance 1 is from 0."""
    return abs(products.mean().item()) * math.sqrt(products.numel())


@PROBABILITIES
def test_the_rate_is_right_everywhere(p):
    x = masks(p)
    assert deviation(x) < 4
    for dim in range(x.dim()):
        means = x.movedim(dim, 0).flatten(1).mean(1) * math.sqrt(x.numel() / x.shape[dim])
        assert means.abs().max() < 4.5
        assert means.numel() < 30 or 0.6 < means.std() < 1.4


@PROBABILITIES
def test_neighbours_are_not_correlated(p):
    """Units, the four lanes of a word, positions, rows, sites and steps, at several distances."""
    x = masks(p)
    for dim in range(x.dim()):
        for distance in (1, 2, 3, 4, 8, 16, 64):
            if distance < x.shape[dim]:
                near = x.narrow(dim, 0, x.shape[dim] - distance)
                assert deviation(near * x.narrow(dim, distance, near.shape[dim])) < 4.5, (dim, distance)
    diagonal = x[:, :, 1:, :-1] * x[:, :, :-1, 1:]
    assert deviation(diagonal) < 4.5
    triples = x[..., :-2] * x[..., 1:-1] * x[..., 2:]
    assert deviation(triples) < 4.5


@PROBABILITIES
def test_experts_and_heads_of_a_token_are_not_correlated(p):
    """Both number the keys of their tokens, so that a token which meets several draws anew in each."""
    keys_NT = draw(token_keys(1111, 0, range(16), 32).flatten(), torch.arange(8)[:, None])
    rate = dropped_levels(p) / 65536
    dropped_NTU = (~keep_mask(at_site(keys_NT, SITES[2]), 128, p)).double()
    x_NTU = (dropped_NTU - rate) / math.sqrt(rate * (1 - rate))
    assert deviation(x_NTU) < 4
    for one, other in itertools.combinations(x_NTU, 2):
        assert deviation(one * other) < 4.5


@PROBABILITIES
def test_masks_show_no_structure(p):
    """Tokens against units, as a matrix of independent entries: no direction stands out.

    Its largest singular value is near sqrt(tokens) + sqrt(units), Marchenko and Pastur's edge.
    """
    tokens_by_units = masks(p).flatten(0, 3)[:4096]
    largest = torch.linalg.svdvals(tokens_by_units)[0].item()
    assert largest == pytest.approx(math.sqrt(4096) + math.sqrt(128), rel=0.02)
    spectrum = torch.fft.rfft2(masks(p).flatten(0, 2)).abs().square() / (32 * 128)
    power = spectrum.mean(0)[:, 1:-1]
    assert (power - 1).abs().max() < 5.5 / math.sqrt(len(spectrum))


def test_all_values_of_every_lane_are_equally_likely():
    """Chi-square over the upper and the lower byte of each lane: 255 degrees of freedom."""
    words = draw(token_keys(1111, 0, range(16), 64).flatten()[:, None], torch.arange(128))
    lanes = words.view(torch.int16).view(-1, 4).int() & 0xFFFF
    for lane in lanes.T:
        for byte in (lane >> 8, lane & 0xFF):
            counts = torch.bincount(byte, minlength=256).double()
            expected = len(byte) / 256
            chi_square = ((counts - expected) ** 2 / expected).sum().item()
            assert abs(chi_square - 255) < 4.5 * math.sqrt(2 * 255)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("width", [64, 30])
def test_units_are_zero_or_scaled_and_so_are_their_gradients(dtype, width):
    module, keys_BS = Dropout(0.25, "there"), token_keys(7, 3, range(4), 6)
    x = torch.rand(4, 6, width).add(1).to(dtype).requires_grad_()
    y = module(x, keys_BS)
    keep = keep_mask(at_site(keys_BS, "there"), width, 0.25)
    assert y.dtype == dtype
    expected = torch.where(keep, x.detach() * (4 / 3), 0)
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.where(keep, 4 / 3, 0.0).to(dtype))


def test_the_expectation_is_kept():
    y = Dropout(0.1, "there")(torch.ones(200, 5000), draw(3, torch.arange(200)))
    assert y.mean().item() == pytest.approx(1, abs=4 * math.sqrt(0.1 / 0.9 / 1e6))
    assert y.max().item() == pytest.approx(1 / (1 - 6554 / 65536))


def test_costs_nothing_in_evaluation_and_at_0():
    x = torch.rand(3, 5)
    assert Dropout(0.5, "there").eval()(x, None) is x
    assert Dropout(0.0, "there")(x, None) is x


def test_keys_are_demanded_where_units_are_dropped():
    with pytest.raises(AssertionError, match="dropout at there in training"):
        Dropout(0.5, "there")(torch.rand(3, 5), None)


def test_every_probability_between_0_and_1_drops_some_and_keeps_some():
    assert [dropped_levels(p) for p in (0, 1e-9, 0.1, 0.5, 1 - 1e-9)] == [0, 1, 6554, 32768, 65535]
