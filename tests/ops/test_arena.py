"""Room for results: pieces never overlap, come back when nobody looks at them, and join."""

import gc
import random
import threading

import pytest
import torch

from halfbyte.ops.arena import SMALLEST, Arena, FreeList


@pytest.mark.parametrize("seed", range(20))
def test_pieces_never_overlap_and_all_come_back(seed: int):
    draw = random.Random(seed)
    pieces, taken, most = FreeList(), {}, 0
    for _ in range(400):
        if taken and draw.random() < 0.5:
            start = draw.choice(list(taken))
            del taken[start]
            pieces.give(start)
        else:
            size = draw.choice([1, 4096, 70_000, 1 << 20, 20 << 20])
            start = pieces.take(size)
            assert all(
                start + size <= other or other + length <= start for other, length in taken.items()
            )
            number = pieces.region(start)
            first, length = pieces.regions[number]
            assert first <= start and start + size <= first + length, "within one region"
            taken[start] = size
        most = max(most, sum(taken.values()))
        assert pieces.taken >= sum(taken.values()) and pieces.touched >= pieces.taken
    for start in list(taken):
        pieces.give(start)
    assert pieces.taken == 0
    assert len(pieces.regions) <= 1, "several regions became none, and the next will hold all"
    pieces.take(most)
    assert len(pieces.regions) == 1


def test_the_same_sequence_needs_no_more_the_second_time():
    pieces = FreeList()

    def step() -> None:
        held = [pieces.take(size) for size in (3 << 20, 1 << 20, 5 << 20, 1 << 20)]
        for start in held[::2] + held[1::2]:
            pieces.give(start)

    step()
    before = pieces.touched
    for _ in range(5):
        step()
    assert pieces.touched == before


def test_a_piece_is_used_again_only_when_no_tensor_looks_at_it():
    arena, count = Arena(), SMALLEST // 4 + 100
    first = arena.empty((2, count // 2), torch.float32)
    assert first.is_contiguous() and first.shape == (2, count // 2) and first.data_ptr() % 64 == 0
    first.fill_(1)
    view = first[1:]
    place = first.data_ptr()
    del first
    second = arena.empty((count,), torch.float32).fill_(2)
    assert second.data_ptr() != place and bool((view == 1).all()), "a view keeps the whole"
    del view
    gc.collect()
    assert arena.empty((2 * count,), torch.bfloat16).data_ptr() == place
    assert arena.empty((4,), torch.float32).numel() == 4, "small ones are the C library's"


def test_autograd_keeps_a_piece_and_gives_it_back():
    arena = Arena()
    x = torch.ones(300, 300, requires_grad=True)
    kept = arena.empty((300, 300), torch.float32).fill_(3)
    y = (x * kept).sum()
    del kept
    other = arena.empty((300, 300), torch.float32).fill_(7)
    y.backward()
    assert x.grad is not None and bool((x.grad == 3).all())
    del y, other
    gc.collect()
    arena.release()
    assert arena.pieces.regions == []


def test_results_may_be_changed_in_place_by_what_comes_after():
    """A view that an autograd function returns may not; a model that clamps its products (OLMo)
    does."""
    arena = Arena()

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return arena.empty(x.shape, x.dtype).copy_(2 * x)

        @staticmethod
        def backward(ctx, *grads):
            return 2 * grads[0]

    x = torch.linspace(-1, 1, 40_000, requires_grad=True)
    y = Double.apply(x)
    assert not y._is_view()
    y.clamp_(-1, 1)
    y.sum().backward()
    assert x.grad is not None and float(x.grad.sum()) == 2 * int(((2 * x).abs() <= 1).sum())


def test_no_memory_is_an_error_and_not_the_end(monkeypatch: pytest.MonkeyPatch):
    from halfbyte.ops import arena as module

    arena = Arena()
    held = arena.empty((40_000,), torch.float32).fill_(5)

    class Full:
        @staticmethod
        def mmap(*args: object, **more: object) -> None:
            raise OSError(12, "Cannot allocate memory")

    honest = module.mmap
    monkeypatch.setattr(module, "mmap", Full)
    with pytest.raises(MemoryError, match="no memory for a tensor"):
        arena.empty((1 << 23,), torch.float32)
    monkeypatch.setattr(module, "mmap", honest)
    again = arena.empty((1 << 23,), torch.float32).fill_(1)
    assert bool((held == 5).all()) and float(again[-1]) == 1
    del held, again
    arena.release()
    assert arena.pieces.regions == []


def test_threads_get_pieces_of_their_own():
    arena, wrong = Arena(), []

    def work(value: int) -> None:
        for _ in range(100):
            tensors = [arena.empty((40_000,), torch.int32).fill_(value + i) for i in range(3)]
            wrong.extend(i for i, t in enumerate(tensors) if not bool((t == value + i).all()))

    threads = [threading.Thread(target=work, args=(1000 * i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    arena.release()
    assert arena.pieces.regions == []
