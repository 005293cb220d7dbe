"""Random numbers of tokens: the generator, and what they depend on."""

import pytest
import torch

from megamoe.moe.randomness import at_site, draw, hash_of, position_keys, token_keys, uniform
from megamoe.moe.routing import LayerSpec, RouterContext
from tests.oracles import randomness as oracle


def unsigned(x: torch.Tensor) -> list[int]:
    return [value & oracle.MASK for value in x.flatten().tolist()]


def test_the_generator_gives_the_published_numbers():
    """The first outputs of the reference implementation in C from seed 1234567."""
    outputs = [
        6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431,
        16408922859458223821,
    ]  # fmt: skip
    assert unsigned(draw(1234567, torch.arange(5))) == outputs


def test_draws_equal_the_oracle_over_the_whole_range_of_integers():
    edges = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 2**32, -(2**31)])
    drawn = draw(edges[:, None], edges)
    expected = [oracle.splitmix64(key, n) for key in unsigned(edges) for n in unsigned(edges)]
    assert unsigned(drawn) == expected


def test_keys_equal_the_oracle():
    keys_BS = token_keys(7, 3, range(4, 7), 5)
    expected = [oracle.token_key(7, 3, row, position) for row in range(4, 7) for position in range(5)]
    assert unsigned(keys_BS) == expected
    assert unsigned(at_site(keys_BS, "there")) == [oracle.at_site(key, "there") for key in expected]
    positions = torch.tensor([9, 0])
    seed = oracle.hash_of(7, "positions", 3)
    assert unsigned(position_keys(7, 3, positions)) == [oracle.splitmix64(seed, n) for n in (9, 0)]


def test_a_token_has_its_key_in_any_batch():
    whole = token_keys(7, 3, range(8), 6)
    assert torch.equal(token_keys(7, 3, range(2, 5), 6), whole[2:5])
    assert torch.equal(token_keys(7, 3, range(8), 4), whole[:, :4])


def test_everything_named_changes_every_key():
    keys = [
        token_keys(seed, step, range(first, first + 4), 9)
        for seed, step, first in [(7, 3, 0), (8, 3, 0), (7, 4, 0), (7, 3, 4)]
    ]
    keys += [at_site(keys[0], "a"), at_site(keys[0], "b"), position_keys(7, 3, torch.arange(36))]
    assert len(set(torch.cat([k.flatten() for k in keys]).tolist())) == 7 * 36


def test_uniform_noise_equals_the_oracle_and_is_uniform():
    keys = draw(5, torch.arange(20_000))
    noise = uniform(keys, 3)
    assert noise.dtype == torch.float32
    assert noise[:50].tolist() == [oracle.uniform(key, 3) for key in unsigned(keys[:50])]
    assert 0 <= noise.min() and noise.max() < 1
    # 60,000 numbers in 50 bins: chi-square of 49 degrees of freedom, mean 49, deviation 10.
    counts = torch.histc(noise, 50, 0, 1)
    assert ((counts - 1200) ** 2 / 1200).sum() < 49 + 5 * 10


def test_noise_of_a_policy_belongs_to_layer_name_and_token():
    def noise(layer: int, name: str, rows: range) -> torch.Tensor:
        spec = LayerSpec(d_model=4, n_experts=3, layer=layer, seed=7, init_std=0.1)
        keys_T = token_keys(7, 3, rows, 5).flatten()
        return spec.uniform(name, RouterContext(step=3, seed=7, top_k=1, token_keys_T=keys_T), 3)

    whole = noise(1, "jitter", range(4))
    assert whole.shape == (20, 3)
    assert torch.equal(noise(1, "jitter", range(2, 4)), whole[10:])
    for other in (noise(2, "jitter", range(4)), noise(1, "other", range(4))):
        assert not torch.any(other == whole)


def test_noise_is_refused_outside_training():
    spec = LayerSpec(d_model=4, n_experts=3, layer=0, seed=7, init_std=0.1)
    with pytest.raises(AssertionError, match="noise is for training"):
        spec.uniform("jitter", RouterContext(step=0, seed=7, top_k=1), 3)


def test_hashes_fit_into_a_signed_integer():
    hashes = [hash_of("label", i) for i in range(500)]
    assert hashes == [oracle.hash_of("label", i) for i in range(500)]
    assert 0 <= min(hashes) and 2**62 < max(hashes) < 2**63
