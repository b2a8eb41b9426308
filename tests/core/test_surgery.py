"""Baking: what a parametrization computed stays, as a parameter that learns where its originals did."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from effkit.core.surgery import bake


@pytest.mark.parametrize("context", [nullcontext, torch.no_grad])
@pytest.mark.parametrize("learns", [True, False])
def test_a_baked_weight_is_a_parameter_that_learns_as_its_originals_did(context, learns):
    layer = weight_norm(nn.Linear(4, 3)).requires_grad_(learns)
    wanted = layer.weight.detach().clone()
    with context():
        baked = bake(layer)
    assert torch.equal(baked.get_parameter("weight"), wanted) and baked.weight.is_leaf
    assert baked.weight.requires_grad == learns and not dict(baked.named_buffers())
    assert type(baked) is nn.Linear and baked.state_dict().keys() == nn.Linear(4, 3).state_dict().keys()
