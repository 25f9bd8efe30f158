"""A network that is built without first weights."""

import pytest
import torch
from torch import nn

from zoo.nn.unfilled import Unfilled


@pytest.mark.parametrize("init", [nn.init.kaiming_normal_, nn.init.xavier_uniform_, nn.init.normal_])
def test_unfilled_leaves_weights_as_they_are(init):
    weight, other = nn.Parameter(torch.full((8, 8), 7.0), requires_grad=False), torch.full((8, 8), 7.0)
    state = torch.random.get_rng_state()
    with Unfilled():
        assert init(weight) is weight and init(tensor=weight) is weight
        weight.normal_(), weight.uniform_(-1, 1)
    assert torch.equal(weight, torch.full((8, 8), 7.0)) and torch.equal(state, torch.random.get_rng_state())
    with Unfilled():
        init(other)  # no weight, and maybe in no checkpoint
    assert not torch.equal(other, torch.full((8, 8), 7.0))


def test_unfilled_keeps_what_is_no_random_number():
    with Unfilled():
        norm, order = nn.BatchNorm2d(4), torch.randperm(100)
    assert torch.equal(norm.running_var, torch.ones(4)) and torch.equal(norm.weight, torch.ones(4))
    assert order.sort().values.equal(torch.arange(100))
