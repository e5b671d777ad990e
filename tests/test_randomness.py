"Draws are functions of their keys."
import random

import numpy as np
import torch
from scipy import stats

from fastrecipes.randomness import forked, key_of, stream, uniform


def splitmix64(seed: int, n: int) -> list[int]:
    "The published generator, in Python integers."
    state, out, mask = seed, [], 2**64 - 1
    for _ in range(n):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = state
        z = ((z ^ (z >> 30))*0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27))*0x94D049BB133111EB) & mask
        out.append(z ^ (z >> 31))
    return out


def test_the_reference_outputs_of_splitmix64():
    assert splitmix64(1234567, 3) == [6457827717110365317, 3203168211198807973, 9817491932198370423]     # prng.di.unimi.it, seed 1234567


def test_uniform_is_splitmix64_by_index():
    reference = [(v >> 11)/2**53 for v in splitmix64(key_of('a', 1), 100)]
    assert uniform(range(100), 'a', 1).tolist() == reference
    assert uniform([70, 3], 'a', 1).tolist() == [reference[70], reference[3]]       # no draw depends on the others


def test_uniform_is_uniform_and_its_keys_are_unrelated():
    a, b = uniform(range(20000), 1, 'x'), uniform(range(20000), 1, 'y')
    assert stats.kstest(a, 'uniform').pvalue > .001
    assert abs(np.corrcoef(a, b)[0, 1]) < .03 and abs(np.corrcoef(a[:-1], a[1:])[0, 1]) < .03


def test_a_key_is_the_same_in_every_process():
    assert key_of(42, 'order', 3) == 11000211855722390060        # changing it would change every seeded run
    assert stream(42, 'order', 3).permutation(5).tolist() == [2, 0, 3, 4, 1]
    assert key_of(1, 23) != key_of(12, 3)


def test_forked_seeds_all_three_and_gives_their_streams_back():
    def draws(): return random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(0); np.random.seed(0); torch.manual_seed(0)
    expected = [draws(), draws()]
    random.seed(0); np.random.seed(0); torch.manual_seed(0)
    first = draws()
    with forked('k'): inside = draws()
    with forked('k'): assert draws() == inside
    assert [first, draws()] == expected
    try:
        with forked('k'): raise KeyError
    except KeyError: pass
    assert inside not in expected


def test_seeding_torch_is_torchs_own_and_leaves_no_notes():
    import torch
    from fastrecipes.randomness import seed_torch
    torch.manual_seed(7)
    drawn, noted = torch.rand(5), len(torch.cuda._queued_calls)
    for _ in range(3): seed_torch(7 + 2**63)
    assert torch.equal(torch.rand(5), drawn) and torch.initial_seed() == 7
    if not torch.accelerator.is_available(): assert len(torch.cuda._queued_calls) == noted
