"""Random numbers as functions of what they are for, never of who computes them, when, or after what.

Every token has a key, mixed from (seed, step, row of the global batch, position in the segment); what is
drawn for the token is a function of its key and the place in the model. So a token draws the same
numbers on any rank, in any micro-batch and in a recomputed forward pass, with no state to keep.

The generator is SplitMix64: output n of the generator with seed s is mix(s + (n + 1) g) mod 2^64. It is
int64 arithmetic alone, so that all devices agree to the bit. Outputs serve as seeds of further ones.

Paper: Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014, with the
constants of its authors' Java class (Stafford's variant 13 of the mixer).
"""

import hashlib

import torch


def _signed(constant: int) -> int:
    return constant - (1 << 64) if constant >> 63 else constant


INCREMENT = _signed(0x9E3779B97F4A7C15)
ROUNDS = ((30, _signed(0xBF58476D1CE4E5B9)), (27, _signed(0x94D049BB133111EB)))
LAST_SHIFT = 31


def hash_of(*labels: str | int) -> int:
    """63 bits that depend on nothing but the labels."""
    digest = hashlib.sha256("/".join(map(str, labels)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def draw(keys: torch.Tensor | int, counters: torch.Tensor) -> torch.Tensor:
    """Output number `counters` of the SplitMix64 generators seeded with `keys`, int64, broadcast."""
    x = keys + (counters + 1) * INCREMENT
    for shift, factor in ROUNDS:
        x.bitwise_xor_(_shifted(x, shift)).mul_(factor)
    return x.bitwise_xor_(_shifted(x, LAST_SHIFT))


def _shifted(x: torch.Tensor, n_bits: int) -> torch.Tensor:
    """Right shift that fills up with zeros, which torch has for no 64-bit type."""
    return (x >> n_bits).bitwise_and_((1 << (64 - n_bits)) - 1)


def token_keys(
    seed: int, step: int, rows: range, segment_len: int, device: torch.device | None = None
) -> torch.Tensor:
    """Keys of the tokens of one batch at `step`, int64 [B, S].

    Args:
        rows: rows of the global batch that these B are.
    """
    rows_B = torch.arange(rows.start, rows.stop, device=device)
    row_keys_B = draw(hash_of(seed, "tokens", step), rows_B)
    return draw(row_keys_B[:, None], torch.arange(segment_len, device=device))


def position_keys(seed: int, step: int, positions: torch.Tensor) -> torch.Tensor:
    """Keys of what all rows share and only `positions` tell apart, in their shape."""
    return draw(hash_of(seed, "positions", step), positions)


def at_site(keys: torch.Tensor, site: str) -> torch.Tensor:
    """Keys for one place in the model: different names draw independently."""
    return draw(keys, torch.full_like(keys, hash_of(site)))


def uniform(keys: torch.Tensor, width: int) -> torch.Tensor:
    """fp32 [..., width], uniform over the multiples of 2^-24 in [0, 1)."""
    words = draw(keys[..., None], torch.arange(width, device=keys.device))
    return _shifted(words, 40) * 2.0**-24
