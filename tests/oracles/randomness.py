"""Random numbers of tokens as their definition reads, in Python's integers."""

import hashlib

MASK = 2**64 - 1


def splitmix64(seed: int, n: int) -> int:
    """Output n of the generator that starts at `seed`, after the reference implementation in C."""
    z = (seed + (n + 1) * 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def hash_of(*labels: str | int) -> int:
    text = "/".join(str(label) for label in labels)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def token_key(seed: int, step: int, row: int, position: int) -> int:
    return splitmix64(splitmix64(hash_of(seed, "tokens", step), row), position)


def at_site(key: int, site: str) -> int:
    return splitmix64(key, hash_of(site))


def keep(key: int, width: int, p: float) -> list[bool]:
    """Unit u has bits 16 (u mod 4) and up of word u div 4, and is dropped if they, signed, are below p."""
    kept = []
    for unit in range(width):
        lane = splitmix64(key, unit // 4) >> 16 * (unit % 4) & 0xFFFF
        signed = lane - 0x10000 if lane >= 0x8000 else lane
        kept.append(signed >= round(p * 65536) - 32768)
    return kept


def uniform(key: int, width: int) -> list[float]:
    return [(splitmix64(key, unit) >> 40) / 2**24 for unit in range(width)]
