"""The number formats: tables of levels, derived here and pinned to the exact values everybody
stores.

A 4-bit format is a table of 16 levels in [-1, 1]. A block of weights is divided by a scale (its
absolute maximum) and each weight becomes the index of the nearest level. Only the table differs
between formats, so a kernel receives it as a tensor and the values exist once, in this file.

NF4 (Dettmers et al. 2023, "QLoRA", arXiv:2305.14314, appendix E) puts the levels at quantiles of
the normal distribution, eight of them positive, seven negative, and one exactly zero. The article
this project grew from gives a symmetric variant without an exact zero, inv_Phi((2i + 1) / 32); it
is kept as ``nf4-article`` so that its figures can be reproduced, and its files are readable by no
other tool.

FP4 is bitsandbytes' own (sign, two exponent bits, one mantissa bit, scaled by 1/12), in bit-pattern
order, so its table is not sorted and holds zero twice.

MXFP4 (OCP Microscaling Formats 1.0: E2M1 under a shared power of two) is held where a checkpoint
comes in it, and made of nothing here.

The 8-bit "dynamic" maps (Dettmers 2015, arXiv:1511.04561) store scales of scales and optimizer
moments: fewer fraction bits the smaller the number. Linear INT4 / INT8 with a zero point is here to
be compared with, not to be stored.
"""

import itertools
import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist

NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""The fp32 values stored in every NF4 checkpoint; `derive_nf4` reproduces them within 2e-7."""


MXFP4 = "mxfp4"
MXFP4_BLOCK = 32
MXFP4_LEVELS = (
    0.0,
    0.5,
    1.0,
    1.5,
    2.0,
    3.0,
    4.0,
    6.0,
    -0.0,
    -0.5,
    -1.0,
    -1.5,
    -2.0,
    -3.0,
    -4.0,
    -6.0,
)
"""E2M1 in bit-pattern order: sign, two exponent bits, one mantissa bit."""


def to_float32(value: float) -> float:
    """Round a Python float to the nearest fp32 value."""
    return struct.unpack("<f", struct.pack("<f", value))[0]


def _linspace(start: float, stop: float, count: int) -> list[float]:
    return [start + (stop - start) * i / (count - 1) for i in range(count)]


def derive_nf4() -> tuple[float, ...]:
    """NF4 from its construction (QLoRA appendix E): 16 levels in fp32, sorted, index 0..15."""
    offset = (29 / 30 + 31 / 32) / 2
    quantile = NormalDist().inv_cdf
    positive = [quantile(p) for p in _linspace(offset, 0.5, 9)[:-1]]
    negative = [-quantile(p) for p in _linspace(offset, 0.5, 8)[:-1]]
    levels = sorted([*positive, 0.0, *negative])
    return tuple(to_float32(level / max(levels)) for level in levels)


def derive_nf4_article() -> tuple[float, ...]:
    """The article's levels, inv_Phi((2i + 1) / 32) divided by the largest: symmetric, no exact
    zero."""
    levels = [NormalDist().inv_cdf((2 * i + 1) / 32) for i in range(16)]
    return tuple(to_float32(level / levels[-1]) for level in levels)


def derive_fp4() -> tuple[float, ...]:
    """bitsandbytes' FP4 in bit-pattern order: sign, then 0, 1/16, 8, 12, 4, 6, 2, 3, all over
    12."""
    magnitudes = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
    positive = [to_float32(value / 12) for value in magnitudes]
    return (*positive, *(-value for value in positive))


@cache
def levels(quant_type: str) -> tuple[float, ...]:
    """The 16 levels of a 4-bit format, in code order.

    Raises:
        ValueError: the format is not one of `QUANT_TYPES`.
    """
    if quant_type == "nf4":
        return NF4_LEVELS
    if quant_type == "fp4":
        return derive_fp4()
    if quant_type == "nf4-article":
        return derive_nf4_article()
    raise ValueError(f"unknown 4-bit format {quant_type!r}; known: {', '.join(QUANT_TYPES)}")


QUANT_TYPES = ("nf4", "fp4", "nf4-article")
BNB_QUANT_TYPES = ("nf4", "fp4")
"""The formats a bitsandbytes checkpoint can name."""
STORED_QUANT_TYPES = (*BNB_QUANT_TYPES, MXFP4)
"""The formats that are read from files; MXFP4 in bitsandbytes' layout from our own cache alone."""


@cache
def dynamic_map(signed: bool) -> tuple[float, ...]:
    """The 256 sorted fp32 levels of the 8-bit dynamic format; arithmetic in fp32 as bitsandbytes
    does it.

    For exponent i in 0..6 the means of neighbours in linspace(0.1, 1, 2^i + 1) (unsigned: 2^(i+1) +
    1) times 10^(i-6); signed maps hold both signs; 0 and 1 complete the table.
    """
    values: list[float] = []
    for i in range(7):
        count = 2 ** (i if signed else i + 1) + 1
        boundaries = _linspace_float32(0.1, 1.0, count)
        for low, high in itertools.pairwise(boundaries):
            mean = to_float32(to_float32(low + high) / 2.0)
            # the scalar is a double there, but the product is taken in fp32
            value = to_float32(to_float32(10 ** (i - 6)) * mean)
            values += [value, -value] if signed else [value]
    values += [0.0, 1.0]
    return tuple(sorted(values))


def _linspace_float32(start: float, stop: float, count: int) -> list[float]:
    """linspace as torch computes it in fp32: from both ends towards the middle, each value rounded
    once."""
    start, stop = to_float32(start), to_float32(stop)
    step = to_float32(to_float32(stop - start) / (count - 1))
    half = count // 2
    return [
        to_float32(start + step * i) if i < half else to_float32(stop - step * (count - 1 - i))
        for i in range(count)
    ]


@dataclass(frozen=True)
class LinearGrid:
    """Uniform b-bit quantization with a zero point, x ~ scale * (code - zero_point), as the article
    has it.

    What happens at the edges, where the article's formula breaks:

    - a range without zero is widened to hold it (``widened``), because a zero point outside
      0..2^b-1 is no code; the
      step grows accordingly and the bound s/2 holds on the wider range;
    - a constant block has no range: the step becomes the constant's magnitude, so it is reproduced
      exactly;
    - a value outside the range saturates to the nearest end, and its error is its distance to the
      last level, more
      than s/2 (`encode` counts them);
    - NaN and infinities are refused.
    """

    scale: float
    zero_point: int
    bits: int
    widened: bool = False

    @classmethod
    def from_range(cls, x_min: float, x_max: float, bits: int = 4) -> "LinearGrid":
        """Grid for the closed range [x_min, x_max].

        Raises:
            ValueError: a bound is not finite, the range is empty, or bits is not in 1..16.
        """
        if not (math.isfinite(x_min) and math.isfinite(x_max)):
            raise ValueError(f"the range [{x_min}, {x_max}] is not finite")
        if x_min > x_max:
            raise ValueError(f"the range [{x_min}, {x_max}] is empty")
        if not 1 <= bits <= 16:
            raise ValueError(f"bits must be in 1..16, got {bits}")
        top = 2**bits - 1
        if x_min == x_max:
            return cls(scale=abs(x_min) or 1.0, zero_point=1 if x_min < 0 else 0, bits=bits)
        widened = x_min > 0 or x_max < 0
        x_min, x_max = min(x_min, 0.0), max(x_max, 0.0)
        scale = (x_max - x_min) / top
        if scale == 0.0 or not math.isfinite(scale):
            raise ValueError(f"the range [{x_min}, {x_max}] has no usable step at {bits} bits")
        # round() is half to even, as in torch and numpy: [-1, 1] at 4 bits has zero point 8
        return cls(
            scale=scale,
            zero_point=min(max(round(-x_min / scale), 0), top),
            bits=bits,
            widened=widened,
        )

    @classmethod
    def fit(cls, values: Iterable[float], bits: int = 4) -> "LinearGrid":
        """Grid over the least and greatest of values (at least one)."""
        values = list(values)
        if not values:
            raise ValueError("no values to fit a grid to")
        if not all(math.isfinite(value) for value in values):
            raise ValueError("the values hold a NaN or an infinity")
        return cls.from_range(min(values), max(values), bits)

    @property
    def levels(self) -> tuple[float, ...]:
        """All 2^bits reconstruction values, ascending."""
        return tuple(self.decode(range(2**self.bits)))

    def encode(self, values: Sequence[float]) -> tuple[list[int], int]:
        """Codes of the values, and how many of them saturated."""
        top, codes, saturated = 2**self.bits - 1, [], 0
        for value in values:
            if not math.isfinite(value):
                raise ValueError(f"cannot quantize {value}")
            code = round(value / self.scale) + self.zero_point
            saturated += not 0 <= code <= top
            codes.append(min(max(code, 0), top))
        return codes, saturated

    def decode(self, codes: Iterable[int]) -> list[float]:
        """Reconstruction scale * (code - zero_point)."""
        return [self.scale * (code - self.zero_point) for code in codes]
