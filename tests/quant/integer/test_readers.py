"""Who reads what a module gives."""

import torch
from torch import nn

from quant.integer.readers import OTHER, readers_of


class Net(nn.Module):
    """a is read by b and c; b, as a view, by d; c by d and by an addition; d by nobody."""

    def __init__(self):
        super().__init__()
        for name in "abcd":
            setattr(self, name, nn.Linear(4, 4))
        self.twice = nn.Identity()

    def forward(self, x, t):
        a = self.a(self.twice(x))
        b, c = self.b(a), self.c(a)
        self.d(b.unflatten(1, (2, 2)).transpose(1, 2).flatten(1).reshape(len(x), 4))
        self.d(c)
        return self.twice(c + 1)


def test_views_are_the_tensor_and_functions_are_others():
    given = torch.zeros(2, 4), torch.zeros(2)
    found = readers_of(Net(), ["a", "b", "c"], ["a", "b", "c", "d"], given)
    assert found == {"a": ["b", "c"], "b": ["d"], "c": ["d", OTHER]}


def test_a_module_that_runs_twice_is_left_out():
    given = torch.zeros(2, 4), torch.zeros(2)
    assert readers_of(Net(), ["twice", "d"], ["a"], given) == {}
