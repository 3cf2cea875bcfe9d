"""What the tests of learning share: a lesson of few samples, a quantizer with a table of scales."""

import torch

from quant.quantizer import Quantizer
from quant.reconstruction.learn import Lesson
from quant.reconstruction.settings import Objective, Schedule
from quant.spec import QuantSpec
from quant.timeline import Timeline

TABLE = torch.tensor([[0.1], [0.11], [0.4], [0.42], [1.0]])


def lesson_of(unit, inputs=(), target=None, generator=None, objective=None, **schedule):
    return Lesson(
        unit,
        inputs,
        target,
        generator or torch.Generator(),
        objective or Objective(round_weight=0.1),
        Schedule(**{"batch_size": 4} | schedule),
    )


def quantizer(table=TABLE, bits=4):
    q = Quantizer(
        QuantSpec(bits=bits), torch.tensor(0), Timeline([1.5, 2.5, 3.5, 4.5][: len(table) - 1])
    )
    q.scale.data, q.zero_point = table.clone(), torch.full_like(table, 7.0)
    return q
