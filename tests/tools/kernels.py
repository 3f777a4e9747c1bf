"""Cases for the C++ library, run in a process of its own: python kernels.py LIBRARY [--count N]
[--huge].

Every buffer ends, or begins, exactly at a page that may not be touched, so a single byte too far
ends the process; a sanitized build of the library finds what a page does not. Results are held to
plain PyTorch: equal bits where an operation is exact, the derived tolerance where it is not. Prints
how many cases ran.
"""

import argparse
import ctypes
import mmap
import random
import sys
from typing import Any

import torch

from halfbyte import codebooks, ops
from halfbyte.ops import cpu, cpu_calls
from halfbyte.ops.cpu_library import _DTYPES, call, open_library

PAGE = mmap.PAGESIZE
LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Largest relative error of one rounding to nearest."""


class Fence:
    """Tensors next to forbidden pages; keeps the mappings alive."""

    def __init__(self, chance: random.Random) -> None:
        self.chance, self.maps = chance, []

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        size = dtype.itemsize
        for n in shape:
            size *= n
        if size == 0:
            return torch.empty(shape, dtype=dtype)
        pages = -(-size // PAGE)
        area = mmap.mmap(-1, (pages + 2) * PAGE)
        base = ctypes.addressof(ctypes.c_char.from_buffer(area))
        for page in (base, base + (pages + 1) * PAGE):
            assert LIBC.mprotect(page, PAGE, 0) == 0
        self.maps.append(area)
        offset = PAGE if self.chance.random() < 0.3 else PAGE + pages * PAGE - size
        count = size // dtype.itemsize
        return torch.frombuffer(area, dtype=dtype, count=count, offset=offset).view(shape)

    def put(self, values: torch.Tensor) -> torch.Tensor:
        out = self.empty(tuple(values.shape), values.dtype)
        return out.copy_(values)


class Fenced:
    """Where operations lay their results."""

    def __init__(self, fence: Fence) -> None:
        self.fence = fence

    def empty(self, shape: Any, dtype: torch.dtype) -> torch.Tensor:
        return self.fence.empty(tuple(shape), dtype)


def weight(
    fence: Fence,
    chance: random.Random,
    numel: int,
    dtype: torch.dtype,
    scales: tuple[int, ...] = (-39, -30, -3, 0, 4),
) -> tuple[torch.Tensor, ops.FourBit]:
    """A random weight and its stored parts, each behind a fence; the parts are compared with plain
    PyTorch's."""
    block_size = chance.choice((32, 64, 64, 128, 512, 4096))
    levels = torch.tensor(
        codebooks.levels(chance.choice(("nf4", "fp4", "nf4-article"))), dtype=torch.float32
    )
    w = torch.randn(numel, generator=torch.Generator().manual_seed(chance.randrange(1 << 30)))
    w *= 10.0 ** chance.choice(scales)
    if chance.random() < 0.3:
        w[torch.rand(numel) < 0.7] = 0
    w = fence.put(w.to(dtype))
    table = fence.put(levels)
    packed, absmax = (
        fence.empty(((numel + 1) // 2,), torch.uint8),
        fence.empty((-(-numel // block_size),), torch.float32),
    )
    call(
        cpu.active(), "hb_quantize", w.data_ptr(), _DTYPES[dtype], numel, table.data_ptr(),
        block_size, packed.data_ptr(), packed.numel(), absmax.data_ptr(), absmax.numel(),
        chance.choice((1, 2, 3)),
    )  # fmt: skip
    with cpu.using("torch"):
        expected = ops.quantize_4bit(w, table, block_size)
    same("packed", packed, expected[0])
    same("absmax", absmax, expected[1])
    parts = ops.FourBit(
        packed, absmax, table, None, None, None, block_size, chance.choice((256, 256, 3))
    )
    if chance.random() < 0.6:
        scale_table = fence.put(torch.tensor(codebooks.dynamic_map(signed=True)))
        groups = -(-absmax.numel() // parts.nested_block_size)
        codes, nested, offset = (
            fence.empty((absmax.numel(),), torch.uint8),
            fence.empty((groups,), torch.float32),
            fence.empty((1,), torch.float32),
        )
        call(
            cpu.active(), "hb_quantize_absmax", absmax.data_ptr(), absmax.numel(),
            scale_table.data_ptr(),
            parts.nested_block_size, codes.data_ptr(), nested.data_ptr(), groups, offset.data_ptr(),
            chance.choice((1, 2)),
        )  # fmt: skip
        with cpu.using("torch"):
            expected = ops.quantize_absmax(absmax, scale_table, parts.nested_block_size)
        for name, mine, theirs in zip(
            ("codes", "nested_absmax", "offset"), (codes, nested, offset), expected, strict=True
        ):
            same(name, mine.view(theirs.shape), theirs)
        parts = parts._replace(
            absmax=codes,
            nested_absmax=nested,
            nested_quant_map=scale_table,
            nested_offset=offset.view(()),
        )
    return w, parts


def same(name: str, mine: torch.Tensor, theirs: torch.Tensor) -> None:
    if not torch.equal(mine, theirs):
        raise AssertionError(
            f"{name}: {int((mine != theirs).sum())} of {mine.numel()} differ on {cpu.path_in_use()}"
        )


def dequantize(fence: Fence, chance: random.Random, parts: ops.FourBit, numel: int) -> None:
    for dtype in DTYPES:
        out = fence.empty((numel,), dtype)
        ops.dequantize_4bit(parts, numel, dtype, out)
        with cpu.using("torch"):
            expected = ops.dequantize_4bit(parts, numel, dtype)
        same(f"dequantized {dtype}", out, expected)


def random_dropout(chance: random.Random) -> ops.Dropout:
    if chance.random() < 0.3:
        return ops.NO_DROPOUT
    return ops.Dropout(chance.choice((1, 3277, 32768, 65535)), *random_counters(chance))


def random_counters(chance: random.Random) -> tuple[int, ...]:
    """Seed, step, micro-batch, layer, and the first element."""
    first = chance.choice((0, 0, 5, 8, chance.randrange(1 << 34)))
    return (chance.randrange(1 << 63), *(chance.randrange(1 << 32) for _ in range(3)), first)


def kept(like: torch.Tensor, drop: ops.Dropout) -> torch.Tensor:
    """1 where an element is kept, by plain PyTorch."""
    with cpu.using("torch"):
        return ops.dropout_mask(like.numel(), drop, like.device).view(like.shape).double()


def product(fence: Fence, chance: random.Random, backward: bool) -> None:
    dtype = chance.choice(DTYPES)
    ragged = chance.random() < 0.5
    rows, width = (chance.randrange(1, 150), chance.randrange(1, 700)) if ragged else (
        chance.choice((16, 48, 64, 100, 130, 192)), 64 * chance.randrange(1, 20)
    )  # fmt: skip
    tokens, rank = (
        chance.choice((1, 2, 3, 4, 5, 6, 7, 13, 33, 70, 600, 1100)),
        chance.choice((0, 0, 1, 4, 16, 33)),
    )
    _, parts = weight(fence, chance, rows * width, torch.bfloat16, (-30, -2, 0))
    generator = torch.Generator().manual_seed(chance.randrange(1 << 30))

    def values(*shape: int) -> torch.Tensor:
        return fence.put(torch.randn(shape, generator=generator).to(dtype))

    depth, columns = (rows, width) if backward else (width, rows)
    x, bias = (
        values(tokens, depth),
        values(columns) if chance.random() < 0.4 and not backward else None,
    )
    u = values(tokens, rank) if rank else None
    low = (values(rank, columns) if backward else values(columns, rank)) if rank else None
    if backward:
        drop = random_dropout(chance) if u is not None else ops.NO_DROPOUT
        got = ops.linear_4bit_input_grad(x, parts, width, u, low, drop)
    else:
        got = ops.linear_4bit(x, parts, rows, bias, u, low)
    with cpu.using("torch"):
        w = ops.dequantize_4bit(parts, rows * width, dtype).view(rows, width).double()
    b = w if backward else w.t()
    exact, size = x.double() @ b, x.double().abs() @ b.abs()
    if u is not None and low is not None:
        right = low.double() if backward else low.double().t()
        seen = kept(exact, drop) if backward else torch.ones_like(exact)
        exact, size = exact + u.double() @ right * seen, size + u.double().abs() @ right.abs()
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    # fp32 sums of n products: n roundings of at most the sum of sizes (Higham, (3.5)); then one to
    # the result's type; subnormal products are flushed by the bf16 instructions
    n = depth + rank + 2
    bound = (
        n * 2.0**-24 * size
        + UNIT[dtype] * exact.abs() * 1.01
        + (n * 2.0**-126 if dtype != torch.float16 else 2.0**-25)
    )
    worst = ((got.double() - exact).abs() / bound).max().item() if got.numel() else 0
    if not worst <= 1:
        raise AssertionError(
            f"{'dx' if backward else 'y'} off by {worst:.3g} bounds on {cpu.path_in_use()}: "
            f"{dtype}, {tokens} tokens, [{rows}, {width}], rank {rank}, block {parts.block_size}"
        )


def within(name: str, got: torch.Tensor, exact: torch.Tensor, bound: torch.Tensor) -> None:
    worst = ((got.double() - exact).abs() / bound).max().item() if got.numel() else 0
    if not worst <= 1:
        raise AssertionError(
            f"{name} off by {worst:.3g} bounds on {cpu.path_in_use()}: {got.dtype}, "
            f"{list(got.shape)}"
        )


def summed(n: int, size: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Bound of a sum of n products in fp32, rounded to dtype (as in `product`)."""
    tiny = n * 2.0**-126 if dtype != torch.float16 else 2.0**-25
    return (n + 2) * 2.0**-24 * size + UNIT[dtype] * exact.abs() * 1.01 + tiny


def lora(fence: Fence, chance: random.Random) -> None:
    dtype, drop = chance.choice(DTYPES), random_dropout(chance)
    tokens, rank = chance.choice((1, 2, 5, 13, 70, 131)), chance.choice((1, 4, 16, 17, 40))
    width, rows = (
        chance.choice((1, 7, 64, 100, 256, 300, chance.randrange(1, 600))) for _ in range(2)
    )
    generator = torch.Generator().manual_seed(chance.randrange(1 << 30))

    def values(*shape: int) -> torch.Tensor:
        return fence.put(torch.randn(shape, generator=generator).to(dtype))

    x, a, dy, b = (
        values(tokens, width),
        values(rank, width),
        values(tokens, rows),
        values(rows, rank),
    )
    seen = x.double() * kept(x, drop)
    u = ops.lora_input(x, a, drop)
    exact = seen @ a.double().t()
    within("u", u, exact, summed(width, seen.abs() @ a.double().abs().t(), exact, dtype))
    u = fence.put(u)
    du, da, db = ops.lora_grads(dy, x, u, b, 0.5, drop)
    exact = dy.double() @ b.double()
    within("du", du, exact, summed(rows, dy.double().abs() @ b.double().abs(), exact, dtype))
    exact = du.double().t() @ seen
    within(
        "dA", da, exact, summed(tokens, du.double().abs().t() @ seen.abs(), exact, torch.float32)
    )
    exact = dy.double().t() @ u.double() * 0.5
    within(
        "dB",
        db,
        exact,
        summed(tokens, dy.double().abs().t() @ u.double().abs(), exact, torch.float32),
    )


def passes(fence: Fence, chance: random.Random) -> None:
    """Norms, gated activations, rotations and cross-entropy against their meaning in fp64."""
    dtype = chance.choice(DTYPES)
    rows, width = chance.choice((1, 3, 17)), chance.choice((1, 7, 16, 33, 64, 100, 257, 1000))
    generator = torch.Generator().manual_seed(chance.randrange(1 << 30))

    def values(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return fence.put((torch.randn(shape, generator=generator) * scale).to(dtype))

    tiny = 2.0**-24 if dtype == torch.float16 else 2.0**-125

    def near(
        name: str,
        got: torch.Tensor,
        exact: torch.Tensor,
        roundings: float,
        size: torch.Tensor | float,
    ) -> None:
        within(
            name,
            got,
            exact,
            roundings * UNIT[dtype] * (exact.abs() + size * 2.0**-10) + 2e-6 * size + tiny,
        )

    x, w, dy = (
        values(rows, width, scale=chance.choice((1e-2, 1, 30))),
        values(width),
        values(rows, width),
    )
    offset, cast_first = chance.choice(((0.0, True), (0.0, False), (1.0, False)))
    y, inverse = ops.rms_norm(x, w, 1e-6, offset, cast_first)
    wide, factor = x.double(), w.double() + offset
    scale = (wide.square().mean(1, keepdim=True) + 1e-6).rsqrt()
    near("norm", y, wide * scale * factor, 2.1, (wide * scale * factor).abs())
    g = dy.double() * factor
    exact = scale * (g - wide * scale * (g * wide * scale).mean(1, keepdim=True))
    near(
        "norm's gradient",
        ops.rms_norm_grad(dy, x, w, inverse, offset),
        exact,
        1.1,
        scale * (g.abs() + 4 * g.norm()),
    )

    both = values(rows, 2 * width, scale=chance.choice((0.1, 3, 20)))
    gate, up = (
        both.chunk(2, 1)
        if chance.random() < 0.5
        else (fence.put(t.contiguous()) for t in both.chunk(2, 1))
    )
    kind = chance.choice(ops.ACTIVATIONS)
    g, wide = gate.double().requires_grad_(), up.double()
    params = {"silu": torch.nn.functional.silu, "gelu": torch.nn.functional.gelu}.get(
        kind, lambda t: torch.nn.functional.gelu(t, approximate="tanh")
    )
    f = params(g)
    (grad_logits,) = torch.autograd.grad(f.sum(), g)
    f, g = f.detach(), g.detach()
    near("gated", ops.gated(gate, up, kind), f * wide, 1.1, g.abs() * wide.abs())
    dgate, dup = ops.gated_grad(dy, gate, up, kind)
    near(
        "gate's gradient",
        dgate,
        dy.double() * wide * grad_logits,
        1.1,
        (dy.double() * wide).abs() * (1 + g.abs()),
    )
    near("up's gradient", dup, dy.double() * f, 1.1, (dy.double() * g).abs())

    heads, dim = chance.choice((1, 3, 8)), 2 * chance.choice((1, 3, 16, 32, 37))
    x, back = values(rows, heads, dim), chance.random() < 0.5
    angles = torch.randn(2, rows, dim, generator=generator)
    cos, sin = fence.put(angles[0].cos().to(dtype)), fence.put(angles[1].sin().to(dtype))
    (a, b), (c1, c2), (s1, s2) = (
        t.double().chunk(2, -1) for t in (x, cos.unsqueeze(1), sin.unsqueeze(1))
    )
    exact = torch.cat(
        (a * c1 + b * s2, b * c2 - a * s1) if back else (a * c1 - b * s1, b * c2 + a * s2), 2
    )
    near("rotation", ops.rotate(x, cos, sin, back), exact, 1.1, x.double().abs().amax())

    logits = values(rows, width, scale=chance.choice((0.1, 3, 40)))
    labels = fence.put(torch.tensor([chance.choice((-100, *range(width))) for _ in range(rows)]))
    grad = fence.empty((rows, width), dtype)
    losses, _ = ops.cross_entropy(logits, labels, grad)
    wide = logits.double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(wide, labels, reduction="none")
    (grad_logits,) = (
        torch.autograd.grad(expected.sum(), wide)
        if bool((labels >= 0).any())
        else (torch.zeros_like(wide),)
    )
    size = logits.double().abs().amax(1) + 1
    within("losses", losses, expected.detach(), 4e-6 * size)
    within(
        "loss's gradient",
        grad,
        grad_logits,
        UNIT[dtype] * grad_logits.abs() * 1.01 + 4e-6 * size[:, None] + UNIT[dtype] * 2.0**-14,
    )


def attention(fence: Fence, chance: random.Random) -> None:
    """Against the meaning in fp64: the norm of a row's error against the row's largest possible
    one."""
    from halfbyte.ops.attention import _attention, _attention_grad

    dtype, kv = chance.choice(DTYPES), chance.choice((1, 2))
    heads, dim = kv * chance.choice((1, 3)), chance.choice((1, 16, 33, 64, 80))
    lengths = [chance.choice((0, 1, 2, 7, 16, 65, 130)) for _ in range(chance.randrange(1, 4))]
    tokens = sum(lengths)
    if not tokens:
        return
    cu_seqlens = fence.put(
        torch.tensor([0, *(sum(lengths[: i + 1]) for i in range(len(lengths)))], dtype=torch.int32)
    )
    params = ops.AttentionParams(
        dim**-0.5, chance.choice((0, 0, 1, 5, 40)), chance.choice((0.0, 0.0, 3.0))
    )
    generator = torch.Generator().manual_seed(chance.randrange(1 << 30))

    def values(n: int) -> torch.Tensor:
        if chance.random() < 0.5:  # heads outside tokens, as a transposed view
            return fence.put(
                torch.randn((n, tokens, dim), generator=generator).to(dtype)
            ).transpose(0, 1)
        return fence.put(torch.randn((tokens, n, dim), generator=generator).to(dtype))

    q, dout, k, v = values(heads), values(heads), values(kv), values(kv)
    out, lse = ops.attention(q, k, v, cu_seqlens, params)
    wide = [t.double() for t in (q, k, v)]
    exact, exact_lse = _attention(*wide, cu_seqlens, *params)
    # weights are rounded to bf16 on some paths: each then is off by one unit, and so is their sum;
    # then the result's
    unit = UNIT[dtype] if dtype == torch.bfloat16 else 2.0**-20
    size = wide[2].abs().amax((0, 1))
    within("attention", out, exact, 2 * unit * size + UNIT[dtype] * exact.abs() + 2.0**-24)
    within("lse", lse, exact_lse, torch.full_like(exact_lse, 1e-5))
    out, lse = fence.put(out), fence.put(lse)
    found = ops.attention_grad(dout, q, k, v, cu_seqlens, out, lse, params)
    expected = _attention_grad(dout.double(), *wide, cu_seqlens, exact, exact_lse, *params)
    for name, mine, theirs in zip(("dq", "dk", "dv"), found, expected, strict=True):
        # each term of the sums is a product of a few rounded factors: judged by norm, with room for
        # cancellation
        error, whole = (mine.double() - theirs).norm(), sum(t.norm() for t in expected) + 1e-3
        if not error <= 8 * max(unit, UNIT[dtype]) * whole + 1e-6:
            raise AssertionError(
                f"{name} off by {error / whole:.2g} on {cpu.path_in_use()}: {dtype}, {lengths}, "
                f"{params}"
            )


def threads_agree(fence: Fence, chance: random.Random) -> None:
    """The same bits from any number of threads."""
    rows, width, tokens = (
        64 * chance.randrange(1, 9),
        64 * chance.randrange(1, 9),
        chance.choice((1, 3, 40)),
    )
    _, parts = weight(fence, chance, rows * width, torch.bfloat16, (0,))
    x, dy = (torch.randn(tokens, n).to(chance.choice(DTYPES)) for n in (width, rows))
    drop, params = random_dropout(chance), ops.AttentionParams(0.1, chance.choice((0, 9)))
    a, b, dim = torch.randn(16, width), torch.randn(rows, 16).to(x.dtype), 16
    q, k, v = (torch.randn(tokens, n, dim).to(x.dtype) for n in (4, 2, 2))
    cu_seqlens = torch.tensor([0, tokens // 2, tokens], dtype=torch.int32)
    logits, labels = torch.randn(tokens, rows).to(x.dtype), torch.zeros(tokens, dtype=torch.int64)

    def everything() -> list[torch.Tensor]:
        u = ops.lora_input(x, a, drop)
        du, da, db = ops.lora_grads(dy.to(x.dtype), x, u, b, 2.0, drop)
        dx = ops.linear_4bit_input_grad(dy.to(x.dtype), parts, width, du, a, drop)
        out, lse = ops.attention(q, k, v, cu_seqlens, params)
        grads = ops.attention_grad(out, q, k, v, cu_seqlens, out, lse, params)
        y, losses = ops.linear_4bit(x, parts, rows), ops.cross_entropy(logits, labels)
        return [
            y,
            ops.linear_4bit_input_grad(dy, parts, width),
            u,
            du,
            da,
            db,
            dx,
            out,
            lse,
            *grads,
            *losses,
        ]

    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(everything())
    torch.set_num_threads(before)
    for other in results[1:]:
        for number, (mine, theirs) in enumerate(zip(other, results[0], strict=True)):
            same(f"result {number}", mine, theirs)


def adamw(fence: Fence, chance: random.Random) -> None:
    sizes = [chance.choice((1, 255, 256, 257, 5000, 70001)) for _ in range(chance.randrange(1, 5))]
    arena = sum(-(-n // 256) * 256 for n in sizes)
    generator = torch.Generator().manual_seed(chance.randrange(1 << 30))
    maps = [torch.tensor(codebooks.dynamic_map(signed=s)) for s in (True, False)]
    start = [torch.randn(n, generator=generator) for n in sizes]
    steps = [
        [torch.randn(n, generator=generator) * 10.0 ** chance.choice((-6, 0, 2)) for n in sizes]
        for _ in range(3)
    ]
    decay = chance.choice((0.0, 0.1))

    def run(kernels: str) -> list[torch.Tensor]:
        params = [fence.put(p) for p in start]
        state = [fence.empty((arena,), torch.uint8).zero_() for _ in range(2)]
        state += [fence.empty((arena // 256,), torch.float32).zero_() for _ in range(2)]
        with cpu.using(kernels):
            for number, grads in enumerate(steps, 1):
                ops.adamw_8bit_step(
                    params, [fence.put(g) for g in grads], *state, *maps,
                    lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=decay, step=number,
                )  # fmt: skip
        return [*params, *state]

    for mine, theirs in zip(run("cpp"), run("torch"), strict=True):
        same("optimizer", mine, theirs)


def dropout(fence: Fence, chance: random.Random) -> None:
    numel, threshold = (
        chance.choice((1, 7, 8, 9, 513, chance.randrange(1, 70000))),
        chance.choice((0, 1, 3277, 65535)),
    )
    numbers = ops.Dropout(threshold, *random_counters(chance))
    out = fence.empty((numel,), torch.uint8)
    torch.ops.halfbyte.dropout_mask(out.view(torch.bool), list(numbers))
    with cpu.using("torch"):
        same("mask", out.bool(), ops.dropout_mask(numel, numbers, out.device))


def huge() -> None:
    """Weights past 2^31 elements, in sparse memory: nearly all of it is the system's one page of
    zeros."""
    rows, width = 40_000, 65_536
    numel = rows * width
    assert numel > 2**31
    area = mmap.mmap(-1, numel // 2)
    scales = mmap.mmap(-1, numel // 64 * 4)
    packed = torch.frombuffer(area, dtype=torch.uint8)
    absmax = torch.frombuffer(scales, dtype=torch.float32)
    levels = torch.tensor(codebooks.levels("nf4"), dtype=torch.float32)
    last = numel - 64  # the last block of all; everything else has scale zero
    absmax[last // 64] = 2.0
    packed[last // 2 :] = 0xF7  # levels 1 and 0
    parts = ops.FourBit(packed, absmax, levels, None, None, None, 64, 256)
    for tokens in (1, 7):
        x = torch.zeros(tokens, width, dtype=torch.bfloat16)
        x[:, -64:] = 1
        y = ops.linear_4bit(x, parts, rows)
        assert float(y[0, -1]) == 64.0 and not bool(y[:, :-1].any())
        dy = torch.zeros(tokens, rows, dtype=torch.bfloat16)
        dy[:, -1] = 1
        dx = ops.linear_4bit_input_grad(dy, parts, width)
        assert dx[0, -64:].tolist() == [2.0, 0.0] * 32 and not bool(dx[:, :-64].any())
    source = torch.frombuffer(mmap.mmap(-1, numel * 2), dtype=torch.bfloat16)
    source[-1] = -3.0
    codes, found = ops.quantize_4bit(source, levels, 64)
    assert float(found[-1]) == 3.0 and not bool(found[:-1].any())
    assert int(codes[-1]) == 0x70 and bool((codes[: 1 << 20] == 0x77).all())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("library")
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--huge", action="store_true")
    arguments = parser.parse_args()
    cpu._library, cpu._tried, cpu._why = open_library(arguments.library), True, "a test's"
    chance = random.Random(arguments.seed)
    ran = 0
    for path in cpu.paths():
        cpu.choose_path(path)
        if arguments.huge:
            huge()
            ran += 1
            continue
        for _ in range(arguments.count):
            fence = Fence(chance)
            cpu_calls.ARENA = Fenced(fence)  # results, too, lie behind forbidden pages
            numel = chance.choice(
                (1, 2, 63, 64, 65, chance.randrange(1, 5000), chance.randrange(1, 40000))
            )
            _, parts = weight(fence, chance, numel, chance.choice(DTYPES))
            dequantize(fence, chance, parts, numel)
            product(fence, chance, backward=False)
            product(fence, chance, backward=True)
            threads_agree(fence, chance)
            adamw(fence, chance)
            dropout(fence, chance)
            lora(fence, chance)
            passes(fence, chance)
            attention(fence, chance)
            ran += 9
        print(path, "passed", file=sys.stderr, flush=True)
    print(f"{ran} cases on {' '.join(cpu.paths())}")


if __name__ == "__main__":
    main()
