"""Randomness without a state: numbers that depend on a key and a counter alone, vectorised over numpy arrays.

The mixing function is the finaliser of splitmix64, and drawing number c of key k is `mix(k + c * GOLDEN)`:
the splitmix64 generator itself, entered at any place.
"""

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_WORD = 0xFFFFFFFFFFFFFFFF


def mix(x: np.ndarray) -> np.ndarray:
    """The splitmix64 finaliser, a bijection of the 64-bit words. uint64 array in, new uint64 array out."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def example_keys(seed: int, epochs: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """The key of each example's random numbers: uint64 `(batch,)`, from the seed, and the epochs and the examples'
    numbers, both uint64 `(batch,)`."""
    key = mix(np.array([seed & _WORD], dtype=np.uint64) + GOLDEN)
    return mix(mix(key + epochs * GOLDEN) + numbers * GOLDEN)


def draw(keys: np.ndarray, positions: np.ndarray, which: int, of: int) -> np.ndarray:
    """Random word number `which` (0-based, of `of` words a position) at each position: uint64, broadcast
    shape."""
    counter = positions.astype(np.uint64) * np.uint64(of) + np.uint64(which + 1)
    return mix(keys + counter * GOLDEN)


def uniform(words: np.ndarray) -> np.ndarray:
    """Random words as float64 in [0, 1), with 53 random bits."""
    return (words >> np.uint64(11)) * 2.0**-53


def below(words: np.ndarray, limit: int) -> np.ndarray:
    """Random words as int64 in [0, limit), limit < 2**32: uniform to within limit / 2**32."""
    return (((words >> np.uint64(32)) * np.uint64(limit)) >> np.uint64(32)).astype(np.int64)
