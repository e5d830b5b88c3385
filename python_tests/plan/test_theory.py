"""The closed forms against simulation and the published figures."""

import numpy as np
import pytest

from s3t_ext.plan import build, first_death, last_death


def test_cost_figures_of_the_paper_setting():
    assert [(tree.stages, tree.slice_passes) for tree in (build("subsets", 4), build("rotation", 4))] == [
        (15, 32),
        (16, 40),
    ]
    ratio = {n: build("subsets", n).slice_passes / build("rotation", n).slice_passes for n in (5, 6, 8)}
    assert ratio == pytest.approx({5: 1.07, 6: 1.5, 8: 3.6}, abs=0.05)


def deaths(shards, slices, heads, runs, seed):
    """Simulate uniform hits; return the requests until the 1st, 2nd, ... shard has all its heads hit, (runs, m)."""
    generator = np.random.default_rng(seed)
    times = np.zeros((runs, shards))
    for run in range(runs):
        order, now, left = [], 0, np.full(shards, heads)
        hit = np.zeros((shards, slices), dtype=bool)
        while len(order) < shards:
            now += 1
            shard, slice_ = divmod(int(generator.integers(shards * slices)), slices)
            if not hit[shard, slice_] and slice_ < heads:
                left[shard] -= 1
                order += [now] if left[shard] == 0 else []
            hit[shard, slice_] = True
        times[run] = order
    return times


@pytest.mark.parametrize(("shards", "slices", "heads"), [(5, 4, 4), (5, 4, 1), (3, 5, 2), (1, 3, 3)])
def test_deaths_against_simulation(shards, slices, heads):
    times = deaths(shards, slices, heads, runs=1500, seed=7)
    error = 4 * times.std(axis=0) / np.sqrt(len(times))
    for j in range(1, shards + 1):
        assert abs(times[:, j - 1].mean() - first_death(shards, slices, heads, j)) <= error[j - 1]
    assert abs(times[:, -1].mean() - last_death(shards, slices, heads)) <= error[-1]


def test_death_figures_of_the_paper_setting():
    assert first_death(5, 4, 1) == pytest.approx(4.0, abs=1e-12)
    assert first_death(5, 4, 4) == pytest.approx(19.3, abs=0.05)
    assert last_death(5, 4, 1) == pytest.approx(20 * (1 + 1 / 2 + 1 / 3 + 1 / 4 + 1 / 5))


@pytest.mark.parametrize(("shards", "slices", "heads"), [(1, 1, 1), (5, 4, 4), (64, 16, 16), (20000, 16, 16)])
def test_death_of_all_shards_is_the_last_death(shards, slices, heads):
    assert first_death(shards, slices, heads, shards) == pytest.approx(last_death(shards, slices, heads), rel=1e-10)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="heads"):
        last_death(5, 4, 5)
    with pytest.raises(ValueError, match=r"j: wanted 1\.\.5, got 6"):
        first_death(5, 4, 4, 6)
