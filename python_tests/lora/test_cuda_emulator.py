"""The emulator finds what it is there to find; its tensor cores, clusters and routing are those of the documents."""

from __future__ import annotations

import ctypes
from ctypes import c_void_p

import cuda_emulator
import pytest
import torch

pytestmark = pytest.mark.skipif(cuda_emulator.COMPILER is None, reason="no g++ to compile the emulator with")


@pytest.fixture(scope="module")
def probes(compiled_once) -> ctypes.CDLL:
    folder = compiled_once("cuda_emulator")
    lib = ctypes.CDLL(str(cuda_emulator.library(folder, [cuda_emulator.HERE / "probes.cu"])))
    lib.probe_message.restype = ctypes.c_char_p
    lib.probe_spans.restype = ctypes.c_int64
    return lib


def pointer(tensor: torch.Tensor) -> c_void_p:
    return c_void_p(tensor.data_ptr())


def test_tensor_cores_multiply(probes) -> None:
    a, b, c = torch.randn(16, 16).half(), torch.randn(16, 8).half(), torch.empty(16, 8)
    probes.emulator_settings(1, 9, 132)
    assert probes.probe_multiply(pointer(c), pointer(a), pointer(b)) == 0
    assert torch.equal(c, (a.double() @ b.double()).float())  # one rounding, as the emulator promises


@pytest.mark.parametrize("size", [1, 2, 8])
def test_clusters_see_each_other(probes, size: int) -> None:
    got = torch.empty(8, 64)
    probes.emulator_settings(1, 9, 132)
    assert probes.probe_cluster(pointer(got), size) == 0
    mine = torch.arange(8)[:, None] * 100.0 + torch.arange(64)
    assert torch.equal(got, mine.view(-1, size, 64).sum(1).repeat_interleave(size, 0))
    probes.emulator_settings(1, 8, 132)
    assert (probes.probe_cluster(pointer(got), size) == 0) == (size == 1)  # sm_80 has no clusters


FAULTS = {
    1: "a missing barrier",
    2: "others do not",
    3: "wait at line",
    4: "outside shared memory",
    5: "outside global memory",
    6: "a copy not waited for",
    7: "a copy read by another thread without a barrier",
    8: "an order of blocks",
}


@pytest.mark.parametrize("fault", [0, *FAULTS], ids=["none", *FAULTS.values()])
def test_faults_are_found(probes, fault: int) -> None:
    seen = set()
    for seed in range(8):
        probes.emulator_settings(seed, 9, 132)
        data = cuda_emulator.guarded(torch.zeros(128))
        status = probes.probe_fault(pointer(data), fault)
        if fault in (2, 3, 4, 5):
            assert status != 0
            assert FAULTS[fault] in probes.probe_message().decode()
        else:
            assert status == 0
            seen.add(tuple(data.tolist()))
    if fault == 0:
        assert seen == {(1.0,) * 128}
    elif fault in (1, 6, 7):
        assert any(x != x for values in seen for x in values)  # poison came through
    elif fault == 8:
        assert len(seen) > 1  # the result depends on which block ran first


@pytest.mark.parametrize("height", [8, 16, 64])
@pytest.mark.parametrize("groups", [1, 5, 33, 75, 1100])
def test_tiles_cover_every_row_once_and_mix_no_groups(probes, height: int, groups: int) -> None:
    random = torch.Generator().manual_seed(groups)
    sizes = torch.randint(0, 50, (groups,), generator=random) * torch.randint(0, 2, (groups,), generator=random)
    sizes[groups // 2] = 3 * height
    offsets = torch.cat([torch.zeros(1), sizes.cumsum(0)]).to(torch.int32)
    rows = int(offsets[-1])
    spans = torch.full((rows // height + groups, 3), -1)
    args = (pointer(offsets), ctypes.c_int64(groups), ctypes.c_int64(rows), ctypes.c_int64(height))
    assert probes.probe_spans(*args, pointer(spans)) == len(spans)
    owner = torch.full((rows,), -1)
    for group, first, last in spans.tolist():
        if first < last:
            assert last - first <= height
            assert int(offsets[group]) <= first
            assert last <= int(offsets[group + 1])
            assert (owner[first:last] == -1).all()
            owner[first:last] = group
    assert torch.equal(owner, torch.repeat_interleave(torch.arange(groups), sizes))
    found = torch.full_like(spans, -1)
    assert probes.probe_find(*args, pointer(found)) == 0
    full = spans[:, 1] < spans[:, 2]
    assert torch.equal(found[full], spans[full])
    assert (found[~full, 1] >= found[~full, 2]).all()
