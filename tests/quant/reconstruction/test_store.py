"""Where captured tensors lie, in closed form; what bfloat16 keeps of them."""

import pytest
import torch

from quant.reconstruction.store import Account, Halved, Store


def test_account_fills_memory_first_and_remembers_the_most():
    account = Account(100)
    first, second, third = account.take(60), account.take(50), account.take(40)
    assert (first, second, third) == ((60, 0), (0, 50), (40, 0))
    account.give_back(first)
    account.give_back(second)
    assert (account.memory, account.disk) == (40, 0)
    assert (account.peak_memory, account.peak_disk) == (100, 50)


def test_store_spills_only_what_is_over_its_budget(tmp_path):
    store = Store(100 / 2**30, tmp_path)
    first, second = store.empty((5, 4)), store.empty((2, 3))
    assert (store.account.memory, store.account.disk) == (80, 24)
    assert first.shape == (5, 4) and second.shape == (2, 3) and list(tmp_path.iterdir()) == []
    store.free(second)
    store.free(torch.empty(3))  # not its own
    assert (store.account.memory, store.account.disk) == (80, 0)
    store.free(first)
    assert store.empty((25,)).shape == (25,)
    assert (store.account.peak_memory, store.account.peak_disk) == (100, 24)


@pytest.mark.parametrize("memory_gb", [1, 0])
def test_bfloat16_takes_half_and_is_read_in_float32(memory_gb, tmp_path):
    store = Store(memory_gb, tmp_path, torch.bfloat16)
    rows = store.empty((4, 2))
    assert isinstance(rows, Halved) and len(rows) == 4
    assert store.account.memory + store.account.disk == 16
    rows[slice(0, 2)] = torch.tensor([[1.0, -0.5], [1 + 2**-9, 3.0]])
    rows[slice(2, 4)] = torch.ones(2, 2)
    found = rows[torch.tensor([1, 0, 3])]
    assert found.dtype == torch.float32
    # 1 + 2^-9 lies beyond the 8 bits of a bfloat16
    assert found.tolist() == [[1.0, 3.0], [1.0, -0.5], [1.0, 1.0]]
    store.free(rows)
    assert store.account.memory == store.account.disk == 0


def test_a_full_disk_is_told_at_once_and_leaves_no_file(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        Store(0, tmp_path).empty((3,))
    assert list(tmp_path.iterdir()) == []
