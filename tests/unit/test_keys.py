"""Keyed randomness: pinned numbers, and nothing but the key decides them."""

import itertools

import pytest
import torch

from vidit import keys


class TestKey:
    def test_golden(self):
        """Pinned: a change here changes every run, and no run resumes on its own curve."""
        assert keys.key(0, "train/noise", 0) == 5375931026801599611
        assert keys.key(3, "init", "blocks.0.attn.query.weight") == 4616093429143779401
        assert keys.key(0, "a", 1, 2) == 2105950641277072855

    def test_every_argument_counts(self):
        calls = [(0, "a"), (1, "a"), (0, "b"), (0, "a", 0), (0, "a", 1), (0, "a", 0, 0), (0, "a", 0, 1), (0, "a", 1, 0)]
        calls += [(0, "a", 10), (0, "a1", 0), (10, "a"), (0, "a", "x"), (0, "a", -1)]
        assert len({keys.key(*call) for call in calls}) == len(calls)

    def test_63_bits(self):
        drawn = [keys.key(0, "a", n) for n in range(2000)]
        assert len(set(drawn)) == 2000
        assert all(0 <= k < 2**63 for k in drawn)
        for bit in (0, 31, 32, 62):
            assert 850 < sum(k >> bit & 1 for k in drawn) < 1150


class TestNumbers:
    def test_golden(self):
        normal = keys.normal((3,), 0, "train/noise", [0, 7])
        expected = [
            [0.38632750511169434, -0.3413485884666443, -0.424891859292984],
            [0.925278902053833, -3.204124927520752, 1.747517704963684],
        ]
        torch.testing.assert_close(normal, torch.tensor(expected), rtol=0, atol=1e-6)
        uniform = keys.uniform(0, "train/time", [0, 1, 10**12])
        expected = [0.3824190704929685, 0.311866262617557, 0.5860913768380243]
        assert torch.equal(uniform, torch.tensor(expected, dtype=torch.float64))

    def test_a_row_is_the_same_in_any_batch(self):
        whole = keys.normal((2, 3), 5, "p", [4, 9, 2, 7])
        assert whole.dtype == torch.float32
        assert whole.shape == (4, 2, 3)
        for order in ([9], [7, 2], [2, 4, 9, 7]):
            rows = keys.normal((2, 3), 5, "p", order)
            assert torch.equal(rows, torch.stack([whole[[4, 9, 2, 7].index(n)] for n in order]))
        assert torch.equal(keys.uniform(5, "p", [9, 4]), keys.uniform(5, "p", [4, 9]).flip(0))

    def test_nothing_global_is_read_or_moved(self):
        torch.manual_seed(1)
        state = torch.get_rng_state()
        first = keys.normal((4,), 0, "p", [1])
        keys.uniform(0, "p", [1])
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(2)
        torch.rand(3)
        assert torch.equal(keys.normal((4,), 0, "p", [1]), first)

    @pytest.mark.parametrize("other", [(1, "p", [3]), (0, "q", [3]), (0, "p", [4])])
    def test_seed_purpose_and_counter_make_another_draw(self, other):
        assert not torch.equal(keys.normal((8,), 0, "p", [3]), keys.normal((8,), *other))
        assert not torch.equal(keys.uniform(0, "p", [3]), keys.uniform(*other))

    def test_neighbours_are_independent(self):
        x = keys.normal((64,), 0, "p", list(range(200)))
        assert x.mean().abs() < 0.03
        assert (x.std() - 1).abs() < 0.03
        correlation = (x @ x.T / 64).fill_diagonal_(0)
        assert correlation.abs().max() < 0.75
        assert correlation.mean().abs() < 0.01
        shifted = keys.normal((64,), 1, "p", list(range(200)))
        assert ((x * shifted).mean(1)).abs().max() < 0.6

    def test_uniform_is_uniform(self):
        u = keys.uniform(0, "p", list(range(4000)))
        assert u.dtype == torch.float64
        assert u.min() >= 0
        assert u.max() < 1
        counts = torch.histc(u, 10, 0, 1)
        assert ((counts - 400) ** 2 / 400).sum() < 30  # chi-square of 9 degrees: 27.9 at p = 0.001

    def test_generators_are_separate(self):
        one, two = keys.generator(0, "p", 1), keys.generator(0, "p", 1)
        first = one.random(3).tolist()
        one.random(5)
        assert two.random(3).tolist() == first

    def test_all_63_bits_reach_the_numbers(self, monkeypatch):
        drawn = []
        for key, bit in itertools.product([12345], [None, 32, 45, 62]):
            monkeypatch.setattr(keys, "key", lambda *_, k=key, b=bit: k if b is None else k ^ (1 << b))
            drawn.append(tuple(keys.normal((4,), 0, "p", [0])[0].tolist()))
        assert len(set(drawn)) == len(drawn)
