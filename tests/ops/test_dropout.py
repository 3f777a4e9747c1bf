"""Tests of `ops.dropout`."""

import torch

from halfbyte import ops


def philox_in_python(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-7 as the paper writes it, in Python integers."""
    for _ in range(7):
        p0, p1 = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [
            (p1 >> 32) ^ counter[1] ^ key[0],
            p1 & 0xFFFFFFFF,
            (p0 >> 32) ^ counter[3] ^ key[1],
            p0 & 0xFFFFFFFF,
        ]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return counter


def test_masks_are_philox():
    seed, step, micro, layer, threshold = 0x1234_5678_9ABC, 17, 3, 250, 20000
    n = 100
    expected = []
    for block in range(13):
        words = philox_in_python([block, layer, micro, step], [seed & 0xFFFFFFFF, seed >> 32])
        expected += [half >= threshold for word in words for half in (word & 0xFFFF, word >> 16)]
    mask = ops.dropout_mask(
        n, ops.Dropout(threshold, seed, step, micro, layer), torch.device("cpu")
    )
    assert mask.tolist() == expected[:n]


def test_masks_do_not_depend_on_how_much_is_asked_for():
    long = ops.dropout_mask(600_000, ops.Dropout(3277, 1, 2, 3, 4), torch.device("cpu"))
    assert torch.equal(
        ops.dropout_mask(1000, ops.Dropout(3277, 1, 2, 3, 4), torch.device("cpu")), long[:1000]
    )
    share = 1 - 3277 / 65536
    # five standard deviations of a binomial of 600,000
    assert abs(float(long.float().mean()) - share) < 5 * (share * (1 - share) / 600_000) ** 0.5
    for first in (8, 8 * 1000, 13, 65_537 * 8 + 3):  # a part's mask is that part of the whole's
        part = ops.dropout_mask(70_000, ops.Dropout(3277, 1, 2, 3, 4, first), torch.device("cpu"))
        assert torch.equal(part, long[first : first + 70_000])
    other = ops.dropout_mask(600_000, ops.Dropout(3277, 1, 2, 3, 5), torch.device("cpu"))
    both = float((long & other).float().mean())
    assert abs(both - share**2) < 0.002, "layers are independent"
