"""Triton kernels: each operation in one pass over memory, for GPUs of any vendor Triton compiles
for.

The arithmetic is the plain-PyTorch reference's, operation by operation, so the results are the same
bits where that is exact: quotients and roots are IEEE's (``div_rn``, ``sqrt_rn``), products and
sums are not contracted (`gpu_calls._launch` says so to the compiler). Indices are 64 bits wide:
weights may have more than 2^31 elements.

The functions here see pointers and sizes only; `gpu_calls` checks shapes and chooses grids.

One file because Triton reads these functions as a language of its own, which the type checker
leaves out as a whole.
"""

import triton
import triton.language as tl


@triton.jit
def rank_of(values, bounds_ptr, COUNT: tl.constexpr, STEPS: tl.constexpr):
    """How many of COUNT ascending bounds lie strictly below each value (int32): STEPS halvings."""
    low = tl.zeros_like(values).to(tl.int32)
    high = low + COUNT
    for _ in tl.static_range(STEPS):
        middle = (low + high) // 2
        inside = low < high
        bound = tl.load(bounds_ptr + tl.minimum(middle, COUNT - 1))
        below = bound < values
        low = tl.where(inside & below, middle + 1, low)
        high = tl.where(inside & ~below, middle, high)
    return low


@triton.jit
def quantize(
    weight_ptr,
    bounds_ptr,
    codes_ptr,
    packed_ptr,
    absmax_ptr,
    n,
    blocks,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    TINY: tl.constexpr,
):
    """ROWS blocks of BLOCK weights: absolute maxima, and codes packed two to a byte, the even
    weight's high."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    index = row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    w = tl.load(weight_ptr + index, mask=index < n, other=0.0).to(tl.float32)
    absmax = tl.max(tl.abs(w), 1)
    # a comparison may drop a NaN, which the caller has to see
    broken = tl.max((w != w).to(tl.int32), 1) > 0
    absmax = tl.where(broken, float("nan"), absmax)
    short = (row + 1) * BLOCK > n
    floor = tl.maximum(absmax, tl.cast(TINY, tl.float32))  # so small a literal would be fp64
    absmax = tl.where(short & ~broken, floor, absmax)
    tl.store(absmax_ptr + row, absmax, mask=row < blocks)
    one = tl.full([ROWS], 1.0, tl.float32)
    whole = w * tl.div_rn(one, floor)[:, None]
    tail = tl.div_rn(w, tl.broadcast_to(floor[:, None], [ROWS, BLOCK]))
    scaled = tl.where(short[:, None], tail, whole)
    rank = rank_of(scaled, bounds_ptr, 15, 4)
    code = tl.load(codes_ptr + rank).to(tl.int32)
    high, low = tl.split(tl.reshape(code, [ROWS, BLOCK // 2, 2]))
    byte = row[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    tl.store(packed_ptr + byte, ((high << 4) | low).to(tl.uint8), mask=byte < (n + 1) // 2)


@triton.jit
def quantize_scales(
    absmax_ptr,
    offset_ptr,
    bounds_ptr,
    codes_ptr,
    nested_ptr,
    blocks,
    GROUP: tl.constexpr,
    TINY: tl.constexpr,
):
    """One group of GROUP scales, less their mean: its absolute maximum, and 8-bit codes."""
    group = tl.program_id(0).to(tl.int64)
    index = group * GROUP + tl.arange(0, GROUP)
    inside = index < blocks
    centred = tl.load(absmax_ptr + index, mask=inside, other=0.0) - tl.load(offset_ptr)
    centred = tl.where(inside, centred, 0.0)
    nested = tl.max(tl.abs(centred), 0)
    tl.store(nested_ptr + group, nested)
    one = tl.full([GROUP], 1.0, tl.float32)
    scaled = centred * tl.div_rn(
        one, tl.zeros_like(one) + tl.maximum(nested, tl.cast(TINY, tl.float32))
    )
    tl.store(codes_ptr + index, rank_of(scaled, bounds_ptr, 255, 8).to(tl.uint8), mask=inside)


@triton.jit
def scales_of(
    block,
    inside,
    absmax_ptr,
    map_ptr,
    nested_ptr,
    offset_ptr,
    GROUP: tl.constexpr,
    NESTED: tl.constexpr,
):
    """fp32 scales of these blocks."""
    if NESTED:
        code = tl.load(absmax_ptr + block, mask=inside, other=0).to(tl.int32)
        value = tl.load(map_ptr + code, mask=inside, other=0.0)
        value = value * tl.load(nested_ptr + block // GROUP, mask=inside, other=0.0)
        return value + tl.load(offset_ptr)
    else:  # noqa: RET505 - the compiler would compile what follows a return, too
        return tl.load(absmax_ptr + block, mask=inside, other=0.0)


@triton.jit
def dequantize(
    packed_ptr,
    absmax_ptr,
    levels_ptr,
    map_ptr,
    nested_ptr,
    offset_ptr,
    out_ptr,
    n,
    blocks,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    WHOLE: tl.constexpr,
    GROUP: tl.constexpr,
    NESTED: tl.constexpr,
):
    """ROWS blocks: level times scale, scales decoded on the way, each weight written once.

    WHOLE: no block is short, so that masks are the same along a block and accesses are wide.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    byte = row[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    index = row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    if WHOLE:
        has_byte, has_weight = (row < blocks)[:, None], (row < blocks)[:, None]
    else:
        has_byte, has_weight = byte < (n + 1) // 2, index < n
    pair = tl.load(packed_ptr + byte, mask=has_byte, other=0).to(tl.int32)
    scale = scales_of(
        row, row < blocks, absmax_ptr, map_ptr, nested_ptr, offset_ptr, GROUP, NESTED
    )[:, None]
    even = tl.load(levels_ptr + (pair >> 4)) * scale
    odd = tl.load(levels_ptr + (pair & 15)) * scale
    values = tl.reshape(tl.join(even, odd), [ROWS, BLOCK])
    tl.store(out_ptr + index, values.to(out_ptr.dtype.element_ty), mask=has_weight)


@triton.jit
def matvec(
    x_ptr,
    packed_ptr,
    absmax_ptr,
    levels_ptr,
    map_ptr,
    nested_ptr,
    offset_ptr,
    y_ptr,
    rows,
    columns,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    BYTES: tl.constexpr,
    ALIGNED: tl.constexpr,
    GROUP: tl.constexpr,
    NESTED: tl.constexpr,
):
    """ROWS outputs of one token: the weights go from memory into the sum, in fp32, and are written
    nowhere.

    ALIGNED: rows are whole blocks, and so are BYTES: a block's scale is read once, and multiplies
    the block's sum.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1).to(tl.int64)
    total = tl.zeros([ROWS], tl.float32)
    for start in range(0, columns // 2, BYTES):
        within = start + tl.arange(0, BYTES)
        there = within < columns // 2
        inside = (row < rows)[:, None] & there[None, :]
        byte = row[:, None] * (columns // 2) + within[None, :]
        pair = tl.load(packed_ptr + byte, mask=inside, other=0).to(tl.int32)
        x_even = tl.load(x_ptr + token * columns + 2 * within, mask=there, other=0.0).to(tl.float32)
        x_odd = tl.load(x_ptr + token * columns + 2 * within + 1, mask=there, other=0.0).to(
            tl.float32
        )
        even, odd = tl.load(levels_ptr + (pair >> 4)), tl.load(levels_ptr + (pair & 15))
        products = even * x_even[None, :] + odd * x_odd[None, :]
        if ALIGNED:
            block = (2 * start) // BLOCK + tl.arange(0, 2 * BYTES // BLOCK)
            has = (row < rows)[:, None] & (block < columns // BLOCK)[None, :]
            block = row[:, None] * (columns // BLOCK) + block[None, :]
            scale = scales_of(
                block, has, absmax_ptr, map_ptr, nested_ptr, offset_ptr, GROUP, NESTED
            )
            sums = tl.sum(tl.reshape(products, [ROWS, 2 * BYTES // BLOCK, BLOCK // 2]), 2)
            total += tl.sum(tl.where(has, sums * scale, 0.0), 1)
        else:
            block = (2 * byte) // BLOCK
            scale = scales_of(
                block, inside, absmax_ptr, map_ptr, nested_ptr, offset_ptr, GROUP, NESTED
            )
            total += tl.sum(products * scale, 1)
    tl.store(y_ptr + token * rows + row, total.to(y_ptr.dtype.element_ty), mask=row < rows)


@triton.jit
def adamw_8bit(
    params_ptr,
    grads_ptr,
    counts_ptr,
    m_codes_ptr,
    v_codes_ptr,
    m_absmax_ptr,
    v_absmax_ptr,
    m_map_ptr,
    v_map_ptr,
    m_bounds_ptr,
    v_bounds_ptr,
    beta1,
    rest1,
    beta2,
    rest2,
    decay,
    size,
    eps,
    BLOCK: tl.constexpr,
    TINY: tl.constexpr,
):
    """One block of one tensor: moments decoded, updated and encoded, the parameter updated, all in
    one pass.

    params, grads: addresses of the block's first elements; counts: elements of it that exist.
    rest1, rest2: 1 - beta1, 1 - beta2; decay: 1 - lr * weight decay; size: of the step; eps:
    corrected.
    """
    block = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    exists = lane < tl.load(counts_ptr + block)
    p_ptr = tl.load(params_ptr + block).to(tl.pointer_type(tl.float32)) + lane
    g_ptr = tl.load(grads_ptr + block).to(tl.pointer_type(tl.float32)) + lane
    p = tl.load(p_ptr, mask=exists, other=0.0)
    g = tl.load(g_ptr, mask=exists, other=0.0)
    place = block * BLOCK + lane
    m = tl.load(m_map_ptr + tl.load(m_codes_ptr + place).to(tl.int32)) * tl.load(
        m_absmax_ptr + block
    )
    v = tl.load(v_map_ptr + tl.load(v_codes_ptr + place).to(tl.int32)) * tl.load(
        v_absmax_ptr + block
    )
    m = m * beta1 + g * rest1
    v = v * beta2 + (g * g) * rest2
    step = tl.div_rn(m * size, tl.sqrt_rn(v) + eps)
    p = p * decay - step
    tl.store(p_ptr, p, mask=exists)
    store_moment(m, m_codes_ptr + place, m_absmax_ptr + block, m_bounds_ptr, BLOCK, TINY, 0)
    store_moment(v, v_codes_ptr + place, v_absmax_ptr + block, v_bounds_ptr, BLOCK, TINY, 1)


@triton.jit
def store_moment(
    values,
    codes_ptr,
    absmax_ptr,
    bounds_ptr,
    BLOCK: tl.constexpr,
    TINY: tl.constexpr,
    LEAST: tl.constexpr,
):
    """A block of a moment as its absolute maximum and the nearest codes; of values that are not
    zero at least LEAST."""
    absmax = tl.max(tl.abs(values), 0)
    tl.store(absmax_ptr, absmax)
    one = tl.full([BLOCK], 1.0, tl.float32)
    scaled = values * tl.div_rn(
        one, tl.zeros_like(one) + tl.maximum(absmax, tl.cast(TINY, tl.float32))
    )
    codes = rank_of(scaled, bounds_ptr, 255, 8).to(tl.int32)
    tl.store(codes_ptr, tl.where(values == 0.0, codes, tl.maximum(codes, LEAST)).to(tl.uint8))


@triton.jit
def philox(counter, layer, micro_batch, step, key0, key1):
    """Four 32-bit words of Philox4x32-7."""
    c0 = counter
    c1 = tl.zeros_like(counter) + layer
    c2 = tl.zeros_like(counter) + micro_batch
    c3 = tl.zeros_like(counter) + step
    k0 = tl.zeros_like(counter) + key0
    k1 = tl.zeros_like(counter) + key1
    for _ in tl.static_range(7):
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        n0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        n2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1, c3 = p1.to(tl.uint32), p0.to(tl.uint32)
        c0, c2 = n0, n2
        k0 = k0 + tl.full([1], 0x9E3779B9, tl.uint32)
        k1 = k1 + tl.full([1], 0xBB67AE85, tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def kept_elements(
    begin, before, threshold, layer, micro_batch, step, key0, key1, COUNTERS: tl.constexpr
):
    """This program's 8 COUNTERS elements: their indices, and which are kept. Two elements come from
    each 32-bit word, the low half first. begin: the first counter; before: so many of its elements
    come before index 0."""
    counter = tl.program_id(0).to(tl.int64) * COUNTERS + tl.arange(0, COUNTERS) + begin
    zero = tl.zeros([COUNTERS], tl.uint32)
    w0, w1, w2, w3 = philox(
        counter.to(tl.uint32),
        zero + layer.to(tl.uint32),
        zero + micro_batch.to(tl.uint32),
        zero + step.to(tl.uint32),
        zero + key0.to(tl.uint32),
        zero + key1.to(tl.uint32),
    )
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    halves = tl.reshape(tl.join(words & 0xFFFF, words >> 16), [8 * COUNTERS])
    index = tl.program_id(0).to(tl.int64) * COUNTERS * 8 + tl.arange(0, 8 * COUNTERS) - before
    return index, halves.to(tl.int32) >= threshold


@triton.jit(
    do_not_specialize=["begin", "threshold", "layer", "micro_batch", "step", "key0", "key1"]
)
def dropout_mask(
    out_ptr,
    n,
    begin,
    before,
    threshold,
    layer,
    micro_batch,
    step,
    key0,
    key1,
    COUNTERS: tl.constexpr,
):
    """True where an element is kept."""
    index, kept = kept_elements(
        begin, before, threshold, layer, micro_batch, step, key0, key1, COUNTERS
    )
    tl.store(out_ptr + index, kept.to(tl.int8), mask=(index >= 0) & (index < n))


@triton.jit(
    do_not_specialize=["begin", "threshold", "layer", "micro_batch", "step", "key0", "key1"]
)
def drop(
    x_ptr,
    out_ptr,
    n,
    begin,
    before,
    threshold,
    layer,
    micro_batch,
    step,
    key0,
    key1,
    ADD: tl.constexpr,
    COUNTERS: tl.constexpr,
):
    """x times its mask, which is written nowhere: stored, or with ADD added to what is there."""
    index, kept = kept_elements(
        begin, before, threshold, layer, micro_batch, step, key0, key1, COUNTERS
    )
    inside = (index >= 0) & (index < n)
    x = tl.load(x_ptr + index, mask=inside, other=0.0).to(tl.float32) * kept.to(tl.float32)
    if ADD:
        x += tl.load(out_ptr + index, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + index, x.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def rms_norm(
    x_ptr,
    weight_ptr,
    y_ptr,
    inverse_ptr,
    width,
    eps,
    offset,
    CAST_FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One row: x / rms(x) * (offset + weight), rounded where the model rounds."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, WIDTH)
    inside = lane < width
    x = tl.load(x_ptr + row * width + lane, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight_ptr + lane, mask=inside, other=0.0).to(tl.float32) + offset
    mean = tl.sum(x * x, 0) / width
    inverse = tl.div_rn(
        tl.full([1], 1.0, tl.float32), tl.sqrt_rn(tl.zeros([1], tl.float32) + mean + eps)
    )
    tl.store(inverse_ptr + row + tl.zeros([1], tl.int32), inverse)
    normed = x * inverse
    if CAST_FIRST:
        normed = normed.to(y_ptr.dtype.element_ty).to(tl.float32)
    tl.store(y_ptr + row * width + lane, (normed * w).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def rms_norm_grad(
    dy_ptr, x_ptr, weight_ptr, inverse_ptr, dx_ptr, width, offset, WIDTH: tl.constexpr
):
    """One row of the gradient with respect to x: r (g - x r^2 mean(g x)) with g = dy (offset +
    w)."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, WIDTH)
    inside = lane < width
    x = tl.load(x_ptr + row * width + lane, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight_ptr + lane, mask=inside, other=0.0).to(tl.float32) + offset
    g = tl.load(dy_ptr + row * width + lane, mask=inside, other=0.0).to(tl.float32) * w
    inverse = tl.load(inverse_ptr + row)
    mean = tl.sum(g * x, 0) / width
    dx = (g - x * (inverse * inverse * mean)) * inverse
    tl.store(dx_ptr + row * width + lane, dx.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """silu, gelu by tanh, or gelu of x (`passes.ACTIVATIONS`), and its derivative."""
    if ACTIVATION == 0:
        s = 1 / (1 + tl.exp(-x))
        return x * s, s * (1 + x * (1 - s))
    if ACTIVATION == 1:
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        t = 2 / (1 + tl.exp(-2 * inner)) - 1
        grad_logits = 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * 0.7978845608028654 * (
            1 + 3 * 0.044715 * x * x
        )
        return 0.5 * x * (1 + t), grad_logits
    half = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
    return x * half, half + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)


@triton.jit
def gated(
    gate_ptr,
    up_ptr,
    y_ptr,
    width,
    gate_stride,
    up_stride,
    ACTIVATION: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """activation(gate) * up of a piece of one row."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = lane < width
    gate = tl.load(gate_ptr + row * gate_stride + lane, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + lane, mask=inside, other=0.0).to(tl.float32)
    value, _ = activate(gate, ACTIVATION)
    tl.store(y_ptr + row * width + lane, (value * up).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def gated_grad(
    dy_ptr,
    gate_ptr,
    up_ptr,
    dgate_ptr,
    dup_ptr,
    width,
    gate_stride,
    up_stride,
    ACTIVATION: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Both gradients of a piece of one row."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = lane < width
    dy = tl.load(dy_ptr + row * width + lane, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + lane, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + lane, mask=inside, other=0.0).to(tl.float32)
    value, grad_logits = activate(gate, ACTIVATION)
    tl.store(
        dgate_ptr + row * width + lane,
        (dy * up * grad_logits).to(dgate_ptr.dtype.element_ty),
        mask=inside,
    )
    tl.store(dup_ptr + row * width + lane, (dy * value).to(dup_ptr.dtype.element_ty), mask=inside)


@triton.jit
def cross_entropy(
    logits_ptr, labels_ptr, losses_ptr, grad_ptr, vocabulary, stride, PIECE: tl.constexpr
):
    """One row: its loss and softmax(logits) - onehot(label); logits are read twice, nothing else is
    written."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, PIECE)
    label = tl.load(labels_ptr + row)
    counted = (label >= 0) & (label < vocabulary)
    most = tl.full([PIECE], float("-inf"), tl.float32)
    total = tl.zeros([PIECE], tl.float32)
    for start in range(0, vocabulary, PIECE):
        inside = start + lane < vocabulary
        x = tl.load(logits_ptr + row * stride + start + lane, mask=inside, other=float("-inf")).to(
            tl.float32
        )
        higher = tl.maximum(most, x)
        # a lane that has seen nothing yet stays at zero
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(tl.where(most == float("-inf"), shift, most) - shift) + tl.exp(
            x - shift
        )
        most = higher
    top = tl.max(most, 0)
    log_sum = top + tl.log(tl.sum(total * tl.exp(most - top), 0))
    own = tl.load(logits_ptr + row * stride + tl.where(counted, label, 0)).to(tl.float32)
    tl.store(losses_ptr + row, tl.where(counted, log_sum - own, 0.0))
    for start in range(0, vocabulary, PIECE):
        inside = start + lane < vocabulary
        x = tl.load(logits_ptr + row * stride + start + lane, mask=inside, other=float("-inf")).to(
            tl.float32
        )
        grad_logits = tl.exp(x - log_sum) - tl.where(start + lane == label, 1.0, 0.0)
        grad_logits = tl.where(counted, grad_logits, 0.0)
        tl.store(
            grad_ptr + row * vocabulary + start + lane,
            grad_logits.to(grad_ptr.dtype.element_ty),
            mask=inside,
        )


@triton.jit
def rotate(
    x_ptr,
    cos_ptr,
    sin_ptr,
    y_ptr,
    heads,
    half,
    token_stride,
    head_stride,
    BACK: tl.constexpr,
    HALF: tl.constexpr,
):
    """One head of one token: its halves rotated."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    lane = tl.arange(0, HALF)
    inside = lane < half
    x = x_ptr + token * token_stride + head * head_stride + lane
    a = tl.load(x, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x + half, mask=inside, other=0.0).to(tl.float32)
    angle = token * 2 * half + lane
    c1 = tl.load(cos_ptr + angle, mask=inside, other=0.0).to(tl.float32)
    c2 = tl.load(cos_ptr + angle + half, mask=inside, other=0.0).to(tl.float32)
    s1 = tl.load(sin_ptr + angle, mask=inside, other=0.0).to(tl.float32)
    s2 = tl.load(sin_ptr + angle + half, mask=inside, other=0.0).to(tl.float32)
    if BACK:
        first, second = a * c1 + b * s2, b * c2 - a * s1
    else:
        first, second = a * c1 - b * s1, b * c2 + a * s2
    y = y_ptr + (token * heads + head) * 2 * half + lane
    tl.store(y, first.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(y + half, second.to(y_ptr.dtype.element_ty), mask=inside)
