"""Tests of `ops.rotary`."""

import torch
from torch import Tensor

from halfbyte.ops import rotary

from ..helpers import Reference, random_tensor


def test_rotation_gradient():
    cos, sin = torch.randn(3, 6, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)

    def apply(x: Tensor) -> Tensor:
        return Reference.apply(
            lambda x: (rotary._rotate(x, cos, sin, False),),
            lambda dy, given, results: (rotary._rotate(dy, cos, sin, True),),
            x,
        )

    assert torch.autograd.gradcheck(apply, random_tensor(3, 2, 6))
