"""The two-gather rank against torch.bucketize, on every table we use and at every bound's
neighbours."""

import pytest
import torch

from halfbyte import codebooks
from halfbyte.ops import nearest

TABLES = {
    **{name: sorted(codebooks.levels(name)) for name in codebooks.QUANT_TYPES},
    "signed": codebooks.dynamic_map(True),
    "unsigned": codebooks.dynamic_map(False),
}


@pytest.mark.parametrize("name", TABLES)
def test_rank_is_bucketize(name: str):
    levels = torch.tensor(TABLES[name])
    boundaries = (levels[1:] + levels[:-1]) / 2
    assert nearest._cells(boundaries) is not None, "the fast path applies to this table"
    infinity = torch.tensor(float("inf"))
    generator = torch.Generator().manual_seed(0)
    values = torch.cat(
        (
            boundaries,
            torch.nextafter(boundaries, infinity),
            torch.nextafter(boundaries, -infinity),
            torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1.0, -1.0, 1.0000001, -1.0000001, 3e38, -3e38]),
            torch.randn(100_000, generator=generator) * 0.3,
            torch.randn(100_000, generator=generator).exp2() ** 8 * 1e-4,
        )
    )
    assert torch.equal(
        nearest.rank(values, boundaries).int(), torch.bucketize(values, boundaries, out_int32=True)
    )


def test_coarse_cells_fall_back():
    boundaries = torch.tensor([1.0, 1.0001])
    assert nearest._cells(boundaries) is None
    assert nearest.rank(torch.tensor([1.00005]), boundaries).tolist() == [1]
