"""Level tables against their sources, and the article's linear grid at its edges."""

import math

import pytest
import torch
from bitsandbytes import functional as bnb
from hypothesis import given
from hypothesis import strategies as st

from halfbyte import codebooks
from halfbyte.codebooks import LinearGrid


def test_nf4_is_derived_and_pinned():
    derived = codebooks.derive_nf4()
    assert max(abs(a - b) for a, b in zip(derived, codebooks.NF4_LEVELS, strict=True)) < 2e-7
    assert torch.equal(torch.tensor(codebooks.NF4_LEVELS), bnb.get_4bit_type("nf4", device="cpu"))


def test_fp4_is_bitsandbytes():
    assert torch.equal(torch.tensor(codebooks.derive_fp4()), bnb.get_4bit_type("fp4", device="cpu"))


@pytest.mark.parametrize("signed", [True, False])
def test_dynamic_map_is_bitsandbytes(signed: bool):
    assert torch.equal(
        torch.tensor(codebooks.dynamic_map(signed)), bnb.create_dynamic_map(signed=signed)
    )


def test_article_levels_are_symmetric_without_zero():
    levels = codebooks.levels("nf4-article")
    assert all(
        math.isclose(a, -b, abs_tol=1e-7) for a, b in zip(levels, reversed(levels), strict=True)
    )
    assert 0.0 not in levels and math.isclose(levels[1], -0.7076, abs_tol=1e-4)


def test_the_articles_example():
    """[-1, 1] at 4 bits: step 2/15, zero point 8 (half to even), so -1 reconstructs to -1.0667."""
    grid = LinearGrid.from_range(-1.0, 1.0)
    assert math.isclose(grid.scale, 2 / 15) and grid.zero_point == 8
    codes, saturated = grid.encode([-1.0, 0.0, 1.0])
    assert codes == [0, 8, 15] and saturated == 1
    assert math.isclose(grid.decode([0])[0], -1.0667, abs_tol=1e-4)


def test_linear_grid_edges():
    constant = LinearGrid.fit([-2.5, -2.5])
    assert constant.decode(constant.encode([-2.5])[0]) == [-2.5]
    assert LinearGrid.fit([0.0]).decode([0]) == [0.0]
    widened = LinearGrid.from_range(0.5, 1.0)
    assert widened.widened and widened.zero_point == 0
    (code,), saturated = widened.encode([7.0])
    assert (code, saturated) == (15, 1)
    for bad in ([math.nan], [math.inf], []):
        with pytest.raises(ValueError):
            LinearGrid.fit(bad)
    with pytest.raises(ValueError):
        LinearGrid.from_range(1.0, 0.0)


@given(
    st.lists(st.floats(-1e6, 1e6, width=32).filter(lambda x: x == 0 or abs(x) > 1e-6), min_size=1),
    st.sampled_from([4, 8]),
)
def test_error_is_bounded_by_one_step(values: list[float], bits: int):
    """Rounding costs s/2, the rounded zero point at an end of the range another s/2 at most."""
    grid = LinearGrid.fit(values, bits)
    restored = grid.decode(grid.encode(values)[0])
    assert all(abs(a - b) <= grid.scale * (1 + 1e-9) for a, b in zip(values, restored, strict=True))
    codes, _ = grid.encode([0.0])
    assert min(values) == max(values) or grid.decode(codes) == [0.0]
