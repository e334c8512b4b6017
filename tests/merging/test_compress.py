"""From merged updates to output factors: rank, energy, and the energy given up."""

from __future__ import annotations

import pytest
import torch
from test_lowrank import close, random_stack

from merging import compress as module
from merging.compress import RankRule, compress
from merging.kernels import Merged
from merging.lowrank import thin_svd
from merging.updates import LowRank


def update(seed: int = 0, m: int = 20, n: int = 14, r: int = 6) -> LowRank:
    stack = random_stack(seed, m, n, [r], G=2)
    return LowRank(stack.B[0], stack.A[0])


FORMS = {
    "factors": lambda u: u,
    "svd": thin_svd,
    "dense": lambda u: LowRank(None, u.dense()),
    "dense-tall": lambda u: LowRank(u.dense(), None),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rank", [1, 3, 6, 9])
def test_truncation_is_the_best_approximation_and_knows_its_error(form: str, rank: int) -> None:
    u = update()
    done = compress(Merged(FORMS[form](u)), RankRule(rank=rank), seed=0, names=("a", "b"))
    U, S, Vh = torch.linalg.svd(u.dense(), full_matrices=False)
    best = (U[..., :rank] * S[..., :rank].unsqueeze(-2)) @ Vh[..., :rank, :]
    assert close(done.update.dense(), best, 1e-9)
    assert close(done.discarded, (S[..., rank:] ** 2).sum(-1), 1e-9)
    assert done.ranks.tolist() == [min(rank, 6)] * 2


@pytest.mark.parametrize("form", FORMS)
def test_exact_means_exact(form: str) -> None:
    u = update()
    done = compress(Merged(FORMS[form](u)), RankRule(), seed=0, names=("a", "b"))
    assert close(done.update.dense(), u.dense(), 1e-9)
    assert close(done.discarded, torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize("form", ["factors", "svd", "dense"])
def test_energy_keeps_the_smallest_rank_that_reaches_it(form: str) -> None:
    u = update()
    done = compress(Merged(FORMS[form](u)), RankRule(energy=0.8), seed=0, names=("a", "b"))
    S2 = torch.linalg.svdvals(u.dense()) ** 2
    for g, rank in enumerate(done.ranks.tolist()):
        total = S2[g].sum()
        assert S2[g, :rank].sum() >= 0.8 * total * (1 - 1e-9)
        assert S2[g, : rank - 1].sum() < 0.8 * total
        assert float(done.discarded[g]) == pytest.approx(float(S2[g, rank:].sum()))


def test_max_rank_is_a_ceiling_on_the_energy_rule() -> None:
    done = compress(Merged(update()), RankRule(energy=0.999, max_rank=2), seed=0, names=("a", "b"))
    assert done.ranks.tolist() == [2, 2]


def test_a_product_of_more_than_full_rank_comes_back_at_full_rank() -> None:
    u = update(m=5, n=7, r=12)
    done = compress(Merged(u), RankRule(), seed=0, names=("a", "b"))
    assert done.ranks.tolist() == [5, 5]
    assert close(done.update.dense(), u.dense(), 1e-10)


def test_a_zero_update_has_rank_one() -> None:
    zero = LowRank(torch.zeros(1, 4, 9), torch.zeros(1, 9, 4))
    done = compress(Merged(zero), RankRule(energy=0.9), seed=0, names=("a",))
    assert done.ranks.tolist() == [1]
    assert not done.update.dense().any()


@pytest.mark.parametrize("rule", [RankRule(rank=8), RankRule(energy=0.6)])
def test_large_dense_updates_use_a_keyed_range_finder(
    monkeypatch: pytest.MonkeyPatch, rule: RankRule
) -> None:
    monkeypatch.setattr(module, "EXACT_SVD_SIZE", 64)
    g = torch.Generator().manual_seed(0)
    decay = torch.logspace(0, -3, 400, dtype=torch.float64)
    Q1, _ = torch.linalg.qr(torch.randn(500, 400, generator=g, dtype=torch.float64))
    Q2, _ = torch.linalg.qr(torch.randn(400, 400, generator=g, dtype=torch.float64))
    D = ((Q1 * decay) @ Q2.mT).unsqueeze(0)
    done = compress(Merged(LowRank(D, None)), rule, seed=3, names=("a",))
    again = compress(Merged(LowRank(D, None)), rule, seed=3, names=("a",))
    other = compress(Merged(LowRank(D, None)), rule, seed=4, names=("a",))
    assert torch.equal(done.update.dense(), again.update.dense())
    assert not torch.equal(done.update.dense(), other.update.dense())
    rank = int(done.ranks[0])
    optimum = float((decay[rank:] ** 2).sum())
    error = float(((D - done.update.dense()) ** 2).sum())
    assert optimum <= error * (1 + 1e-9)
    assert error <= 1.02 * optimum
    assert float(done.discarded[0]) == pytest.approx(error, rel=1e-6)
    if rule.energy is not None:
        assert float((decay[:rank] ** 2).sum()) >= 0.6 * float((decay**2).sum())


def test_what_a_kernel_discarded_is_added() -> None:
    before = torch.tensor([1.0, 2.0], dtype=torch.float64)
    done = compress(Merged(update(), before), RankRule(), seed=0, names=("a", "b"))
    assert done.discarded.tolist() == [1.0, 2.0]
