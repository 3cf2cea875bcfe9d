"""Workers: one alone changes nothing; shares of two; what two processes exchange, and how they
end."""

import multiprocessing
import os
import socket
import time

import pytest
import torch
from torch import nn

from base import devices, workers
from base.workers import Share, agreed, align, first_only, joined, part_of, share_of, summed, wait

PROCESSES = multiprocessing.get_context("fork")


@pytest.fixture
def as_worker(monkeypatch):
    """-> as_worker(number, count): asked from now on, this process is that one of so many."""

    def become(number, count):
        monkeypatch.setattr(workers, "number", lambda: number)
        monkeypatch.setattr(workers, "count", lambda: count)

    return become


def test_one_alone_exchanges_nothing():
    value, tensors, net = object(), [torch.ones(2)], nn.Linear(2, 1)
    with joined(False):
        assert (workers.count(), workers.number(), workers.is_first()) == (1, 0, True)
        assert agreed(value) is value and summed(tensors) is tensors and part_of("abc") == "abc"
        assert align(net) is wait() is None
        assert share_of(5) == Share(0, 5, 5, 1.0)


@pytest.mark.parametrize(
    "size, count, expected",
    [
        (5, 2, [(0, 2, 0.4), (2, 5, 0.6)]),
        (4, 4, [(0, 1, 0.25), (1, 2, 0.25), (2, 3, 0.25), (3, 4, 0.25)]),
        (1, 3, [(0, 1, 0.0), (0, 1, 0.0), (0, 1, 1.0)]),  # more workers than samples
    ],
)
def test_shares_of_a_batch_by_hand(as_worker, size, count, expected):
    found = []
    for number in range(count):
        as_worker(number, count)
        share = share_of(size)
        found.append((share.start, share.stop, share.weight))
    assert found == expected


def test_a_share_holds_its_samples_entries():
    share, batch = Share(1, 3, 4), torch.arange(8)  # two entries for each sample
    assert share.of(batch).tolist() == [2, 3, 4, 5]
    assert share.whole((4, 7)) == (8, 7) and share.whole((2,)) == (4,)


def test_every_nth_thing_to_do_and_what_the_first_alone_does(as_worker):
    done = []
    for number in range(3):
        as_worker(number, 3)
        first_only(done.append)(part_of([0, 1, 2, 3, 4, 5, 6]))
    assert done == [[0, 3, 6]]


@pytest.mark.parametrize(
    "word, number, found",
    [("cpu", 1, "cpu"), ("auto", 1, "cuda:1"), ("cuda", 0, "cuda:0")]
    + [("cuda:1", 0, "'cuda:1' is one GPU, and there are 3"), ("auto", 2, "number 3 on 2 CUDA")],
)
def test_every_worker_takes_a_gpu(monkeypatch, word, number, found):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(devices, "count", lambda: 3)
    monkeypatch.setattr(devices, "local_number", lambda: number)
    if found in ("cpu", "cuda:0", "cuda:1"):
        assert devices.resolve_device(word) == torch.device(found)
    else:
        with pytest.raises(ValueError, match=found):
            devices.resolve_device(word)


def test_what_workers_cannot_share_is_refused_by_the_first(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="WORLD_SIZE is 2, but RANK is not set"), joined(True):
        pass
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match="2 workers .* works alone"), joined(False):
        pass
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit), joined(False):
        pass


def run_two(work):
    """work(rank) in two joined processes -> what each returned or raised."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def process(rank, end):
        torch.set_num_threads(1)
        names = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in names.items()}
        try:
            with joined(True):
                result = work(rank)
        except BaseException as error:
            result = repr(error)
        end.send(result)
        time.sleep(0.2)  # the first one holds what they share

    pipes = [PROCESSES.Pipe(duplex=False) for _ in range(2)]
    started = [PROCESSES.Process(target=process, args=(i, pipes[i][1])) for i in range(2)]
    for one in started:
        one.start()
    for _, end in pipes:
        end.close()
    try:
        assert all(mine.poll(60) for mine, _ in pipes), "a worker hangs"
        return [mine.recv() for mine, _ in pipes]
    finally:
        for one in started:
            one.kill()
            one.join()


class Net(nn.Module):
    """Tensors of several types, a parameter that belongs to two modules."""

    def __init__(self, value):
        super().__init__()
        self.a = nn.Linear(2, 1, bias=False)
        self.b, self.own = self.a, nn.Parameter(torch.tensor(value + 0.5))
        self.register_buffer("codes", torch.tensor([value, -value, 3], dtype=torch.int8))
        self.register_buffer("flag", torch.tensor(value > 1))
        self.register_buffer("nothing", torch.empty(0, dtype=torch.int16))
        self.a.weight.data.fill_(value)


def test_what_two_workers_exchange():
    def work(rank):
        net = Net(rank + 1)
        align(net)
        sums = summed([torch.tensor([[1.0, 2.0]]) * (rank + 1), torch.tensor(10.0 * rank)])
        print("not seen of the second")
        return (
            [agreed({"worker": rank}), part_of("abcd")],
            [value.tolist() for value in sums],
            [value.tolist() for value in net.state_dict().values()],
        )

    state = [1.5, [1, -1, 3], False, [], [[1.0, 1.0]], [[1.0, 1.0]]]
    first, second = run_two(work)
    assert first[0] == [{"worker": 0}, "ac"] and second[0] == [{"worker": 0}, "bd"]
    assert first[1] == second[1] == [[[3.0, 6.0]], 10.0]
    assert sorted(map(str, first[2])) == sorted(map(str, second[2])) == sorted(map(str, state))


def test_one_that_fails_ends_the_other_and_alone_says_why():
    def work(rank):
        if rank == 1:
            raise ValueError("no such file")
        wait()

    assert run_two(work) == ["SystemExit(1)", "ValueError('no such file')"]


def test_workers_that_have_drifted_apart_are_told():
    first, second = run_two(lambda rank: align(nn.Linear(2, 1 + rank)))
    assert "worker 1 has come to another network than the first one (weight differs)" in second
    assert first == "SystemExit(1)"
