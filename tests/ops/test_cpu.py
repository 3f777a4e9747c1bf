"""The C++ library: equal to plain PyTorch, safe against any argument, and missing without harm."""

import ctypes
import multiprocessing
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte import AdamW8bit, codebooks, load, nf4, ops
from halfbyte.errors import UsageError
from halfbyte.ops import cpu, cpu_calls
from halfbyte.ops.cpu_library import call, open_library

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


SOURCES = ROOT / "src/halfbyte/ops/csrc"


needs_library = pytest.mark.skipif(cpu.active() is None, reason=f"no C++ library here: {cpu.why()}")


@pytest.fixture
def every_path():
    """Puts the best path back."""
    best = cpu.path_in_use()
    yield cpu.paths()
    cpu.choose_path(best)


def library_file() -> str:
    return cpu.active()._name


def cases(library: str, *arguments: str, **environment: str) -> str:
    """Run tests/kernels.py on a library; its output."""
    done = subprocess.run(
        [sys.executable, str(HERE.parent / "tools" / "kernels.py"), library, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stderr[-4000:]}"
    return done.stdout


@needs_library
def test_cases_behind_forbidden_pages():
    assert f"{9 * 12 * len(cpu.paths())} cases" in cases(library_file(), "--count", "12")


def build(where: Path, *options: str) -> str:
    for command in (
        ["cmake", "-S", str(SOURCES), "-B", str(where), *options],
        ["cmake", "--build", str(where), "-j2"],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode and "not find" in done.stderr + done.stdout:
            pytest.skip(f"cannot build here: {done.stderr[-300:]}")
        assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
    return str(where / "halfbyte_cpu.so")


def runtime(name: str) -> str:
    found = subprocess.run(
        ["gcc", f"-print-file-name={name}"], capture_output=True, text=True
    ).stdout.strip()
    if not Path(found).is_absolute():
        pytest.skip(f"no {name} here")
    return found


@pytest.mark.slow
def test_tiles_in_plain_cpp(tmp_path: Path):
    """The AMX path's logic, where there are no tiles."""
    assert "amx-emulated" in cases(
        build(tmp_path, "-DHB_EMULATE_TILES=ON"), "--count", "60", "--seed", "1"
    )


@pytest.mark.slow
def test_address_and_undefined_behaviour_sanitizers(tmp_path: Path):
    library = build(tmp_path, "-DHB_EMULATE_TILES=ON", "-DHB_SANITIZE=address,undefined")
    preload = {"LD_PRELOAD": runtime("libasan.so"), "ASAN_OPTIONS": "detect_leaks=0"}
    assert "cases on" in cases(library, "--count", "40", "--seed", "2", **preload)


@pytest.mark.slow
def test_thread_sanitizer(tmp_path: Path):
    library = build(
        tmp_path, "-DHB_EMULATE_TILES=ON", "-DHB_STD_THREADS=ON", "-DHB_SANITIZE=thread"
    )
    options = {
        "TSAN_OPTIONS": "ignore_noninstrumented_modules=1 exitcode=66",
        "OMP_NUM_THREADS": "1",
    }
    assert "cases on" in cases(
        library, "--count", "10", LD_PRELOAD=runtime("libtsan.so"), **options
    )


@pytest.mark.slow
@needs_library
def test_weights_past_two_to_the_31():
    assert "cases on" in cases(library_file(), "--huge")


@pytest.mark.slow
@needs_library
def test_many_more_cases():
    assert "cases on" in cases(library_file(), "--count", "600", "--seed", "3")


@pytest.mark.slow
def test_installs_without_a_compiler(tmp_path: Path):
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "-w",
        str(tmp_path),
        str(ROOT),
    ]
    for name, compiler in (
        ("with", {}),
        ("without", {"CC": "/nonexistent", "CXX": "/nonexistent"}),
    ):
        target = tmp_path / name
        command[command.index("-w") + 1] = str(target)
        subprocess.run(command, check=True, env={**os.environ, **compiler})
        (wheel,) = target.glob("*.whl")
        assert wheel.name.startswith("halfbyte-") and "py3-none-" in wheel.name
        assert wheel.name.endswith("any.whl") == (name == "without")


@needs_library
@settings(max_examples=80, deadline=None)
@given(
    shape=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    step=st.integers(1, 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    block_size=st.sampled_from([32, 64, 128, 1024]),
    quant_type=st.sampled_from(codebooks.QUANT_TYPES),
    double=st.booleans(),
    transposed=st.booleans(),
    seed=st.integers(0, 1 << 30),
)
def test_same_bits_for_any_layout(
    shape, step, dtype, block_size, quant_type, double, transposed, seed
):
    """Strided and transposed weights, every table; the path is the best here (kernels.py tries them
    all)."""
    base = torch.randn([n * step for n in shape], generator=torch.Generator().manual_seed(seed)).to(
        dtype
    )
    w = base[tuple(slice(None, None, step) for _ in shape)]
    w = w.transpose(0, -1) if transposed else w
    ours = nf4.quantize(w, block_size=block_size, quant_type=quant_type, double_quant=double)
    with cpu.using("torch"):
        plain = nf4.quantize(w, block_size=block_size, quant_type=quant_type, double_quant=double)
        expected = plain.dequantize()
    assert all(
        torch.equal(a, b)
        for a, b in zip(ours.stored_tensors(), plain.stored_tensors(), strict=True)
    )
    assert torch.equal(ours.dequantize(), expected)


@needs_library
def test_every_bf16_gets_the_same_code(every_path: list[str]):
    """All 65,280 finite bf16 values against block maxima over the whole range, also where products
    are subnormal."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    every = every[torch.isfinite(every)]
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(0))
    magnitudes = every.abs().sort(stable=True)
    for w in (every, every[order], every[magnitudes.indices]):  # sorted: blocks of one magnitude
        for quant_type in ("nf4", "fp4"):
            with cpu.using("torch"):
                plain = nf4.quantize(w, quant_type=quant_type, double_quant=False)
            for path in every_path:
                cpu.choose_path(path)
                ours = nf4.quantize(w, quant_type=quant_type, double_quant=False)
                assert torch.equal(ours.packed, plain.packed) and torch.equal(
                    ours.absmax, plain.absmax
                ), path


@needs_library
@pytest.mark.parametrize("threads", [1, 2, 7])
def test_same_bits_from_any_number_of_threads(threads: int):
    w = torch.randn(300, 640, generator=torch.Generator().manual_seed(0))
    x = torch.randn(70, 640, generator=torch.Generator().manual_seed(1)).bfloat16()
    before = torch.get_num_threads()

    def run() -> list[torch.Tensor]:
        q = nf4.quantize(w).with_dtype(torch.bfloat16)
        return [*q.stored_tensors(), q.dequantize(), ops.linear_4bit(x, q.parts, 300)]

    expected = run()
    try:
        torch.set_num_threads(threads)
        found = run()
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def quantize_arguments() -> dict[str, Any]:
    """A valid call of hb_quantize, by name."""
    w, table = torch.randn(130), torch.tensor(codebooks.levels("nf4"), dtype=torch.float32)
    packed, absmax = torch.empty(65, dtype=torch.uint8), torch.empty(3)
    return {
        "keep": (w, table, packed, absmax), "weight": w.data_ptr(), "dtype": 0, "numel": 130,
        "table": table.data_ptr(),
        "block_size": 64, "packed": packed.data_ptr(), "packed_count": 65,
        "absmax": absmax.data_ptr(),
        "absmax_count": 3, "threads": 2,
    }  # fmt: skip


@needs_library
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"weight": None}, "weight is a null pointer"),
        ({"table": None}, "quant_map is a null pointer"),
        ({"packed": None}, "packed is a null pointer"),
        ({"absmax": None}, "absmax is a null pointer"),
        ({"dtype": 3}, "unknown dtype 3"),
        ({"numel": -1}, "impossible size"),
        ({"numel": 2**62}, "impossible size"),
        ({"numel": 131}, "packed must have 66 elements"),
        ({"packed_count": 64}, "packed must have 65 elements, got 64"),
        ({"absmax_count": 4}, "absmax must have 3 elements, got 4"),
        ({"block_size": 0}, "block_size must be a power of two"),
        ({"block_size": 96}, "block_size must be a power of two"),
        ({"block_size": -64}, "block_size must be a power of two"),
        ({"threads": 0}, "threads must be 1 or more"),
        ({"weight": 2}, "weight is not aligned"),
        ({"absmax": lambda a: a["absmax"] + 1}, "absmax is not aligned"),
        ({"weight": 2**64 - 8}, "reaches past the address space"),
        ({"packed": lambda a: a["weight"] + 4}, "packed and weight overlap"),
        ({"absmax": lambda a: a["table"] + 8}, "absmax and quant_map overlap"),
    ],
)
def test_arguments_are_checked(change: dict[str, Any], message: str | None):
    arguments = quantize_arguments()
    arguments.update({k: v(arguments) if callable(v) else v for k, v in change.items()})
    arguments.pop("keep") if message else None
    given = [value for name, value in arguments.items() if name != "keep"]
    if message is None:
        call(cpu.active(), "hb_quantize", *given)
        return
    with pytest.raises(ValueError, match=message):
        call(cpu.active(), "hb_quantize", *given)


@needs_library
def test_linear_arguments_are_checked():
    q = nf4.quantize(torch.randn(8, 64)).parts
    x, y = torch.randn(3, 64), torch.empty(3, 8)

    def product(**change: Any) -> None:
        given: dict[str, Any] = {
            "x": x.data_ptr(), "tokens": 3, "in": 64, "out": 8,
            "weight": cpu_calls._weight(q, 512)[0], "bias": None,
            "u": None, "b": None, "rank": 0, "y": y.data_ptr(), "dtype": 0, "threads": 1,
        }  # fmt: skip
        call(cpu.active(), "hb_linear", *{**given, **change}.values())

    product()
    other = cpu_calls._weight(q, 512)[0]
    other.nested_count = 2
    short = cpu_calls._weight(q, 512)[0]
    short.packed_count = 255
    tableless = cpu_calls._weight(q, 512)[0]
    tableless.nested_quant_map = None
    for change, message in (
        ({"x": None}, "input is a null pointer"),
        ({"y": None}, "result is a null pointer"),
        ({"y": x.data_ptr() + 8}, "result and input overlap"),
        ({"weight": None}, "weight is a null pointer"),
        ({"weight": other}, "nested_absmax must have 1 elements"),
        ({"weight": short}, "packed must have 256 elements, got 255"),
        ({"weight": tableless}, "nested_quant_map is a null pointer"),
        ({"out": 9}, "weight must have 576 elements"),
        ({"in": 2**40, "out": 2**40}, "impossible size"),
        ({"tokens": 2**60}, "impossible size"),
        ({"tokens": -3}, "impossible size"),
        ({"rank": 4}, "low-rank part needs both"),
        ({"rank": -1}, "impossible size"),
        ({"dtype": 7}, "unknown dtype"),
    ):
        with pytest.raises(ValueError, match=message):
            product(**change)


@needs_library
@pytest.mark.parametrize("part", ["packed", "absmax", "quant_map", "nested_absmax"])
def test_dequantizing_over_its_own_storage_is_refused(part: str):
    def apart(t: torch.Tensor) -> torch.Tensor:
        """With so much room behind it that what is written from its start on overlaps nothing
        else."""
        space = torch.zeros(t.numel() + 2048, dtype=t.dtype)
        space[: t.numel()] = t
        return space[: t.numel()]

    q = nf4.quantize(torch.randn(8, 64)).parts
    q = q._replace(
        **{
            name: apart(getattr(q, name))
            for name in ("packed", "absmax", "quant_map", "nested_absmax")
        }
    )
    weight = cpu_calls._weight(q, 512)[0]
    with pytest.raises(ValueError, match=f"out and {part} overlap"):
        call(cpu.active(), "hb_dequantize", weight, getattr(q, part).data_ptr() // 4 * 4, 0, 512, 1)


@needs_library
def test_random_arguments_never_end_the_process():
    """Hostile counts, sizes and pointers in every place: a code comes back."""
    chance = random.Random(0)
    odd = [0, 1, -1, 3, 64, 2**31, 2**47, 2**63 - 1, -(2**63), 2**64 - 1]
    refused = 0
    for _ in range(3000):
        arguments = quantize_arguments()
        for name in chance.sample(sorted(arguments.keys() - {"keep"}), chance.randrange(1, 4)):
            value = chance.choice(odd)
            if name in ("dtype", "block_size", "threads"):
                value = ctypes.c_int32(value).value
            # a pointer that is neither null nor ours would be read: only sizes may lie about ours
            arguments[name] = (
                None
                if name in ("weight", "table", "packed", "absmax")
                else ctypes.c_int64(value).value
            )
        # a size larger than the buffers cannot be seen by the callee, unless the counts contradict
        # it
        if arguments["numel"] > 130 and arguments["packed_count"] == (arguments["numel"] + 1) // 2:
            continue
        try:
            call(cpu.active(), "hb_quantize", *[v for k, v in arguments.items() if k != "keep"])
        except ValueError:
            refused += 1
    assert refused > 2000


def test_plain_pytorch_without_the_library(monkeypatch: pytest.MonkeyPatch):
    expected = nf4.quantize(torch.randn(50, 64, generator=torch.Generator().manual_seed(0)))
    monkeypatch.setattr(cpu, "_library", None)
    monkeypatch.setattr(cpu, "_why", "the library was not built")
    assert cpu.active() is None and cpu.paths() == [] and cpu.path_in_use() == "torch"
    found = nf4.quantize(torch.randn(50, 64, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(found.packed, expected.packed)
    with pytest.raises(UsageError, match="there is no C\\+\\+ library"):
        cpu.use("cpp")
    cpu.use("auto")
    with pytest.raises(UsageError, match="no kernel path"):
        cpu.choose_path("avx2")


@needs_library
def test_the_choice_is_followed(stories: Path):
    try:
        load(str(stories), kernels="torch")
        assert cpu.active() is None and "asked for" in cpu.why()
        load(str(stories))  # says nothing of kernels: leaves the choice alone
        assert cpu.active() is None
    finally:
        cpu.use("auto")
    load(str(stories), kernels="cpp")
    assert cpu.active() is not None
    cpu.use("auto")
    with pytest.raises(UsageError, match="kernels must be one of"):
        cpu.use("fast")


def test_a_foreign_library_is_refused(tmp_path: Path):
    with pytest.raises(OSError, match="cannot open shared object file"):
        open_library(str(tmp_path / "absent.so"))
    with pytest.raises(OSError, match="belongs to another version"):
        open_library(torch._C.__file__)


@needs_library
def test_one_openmp_runtime():
    """The library shares torch's threads: two runtimes would fight for the cores."""
    loaded = {
        line.split()[-1]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if re.search(r"/lib[a-z]*omp[^/]*\.so", line)
    }
    assert len({Path(file).resolve() for file in loaded}) <= 1, loaded


@needs_library
@pytest.mark.parametrize(
    ("tokens", "width", "rows"), [(3, 0, 8), (0, 64, 8), (3, 64, 0), (9, 0, 8)]
)
def test_empty_products(tokens: int, width: int, rows: int):
    """Nothing to add up leaves the bias; nothing to fill is filled."""
    q = nf4.quantize(torch.randn(rows, width)).parts
    bias = torch.randn(rows)
    y = ops.linear_4bit(torch.randn(tokens, width), q, rows, bias)
    dx = ops.linear_4bit_input_grad(torch.randn(tokens, rows), q, width)
    with cpu.using("torch"):
        assert torch.equal(y, ops.linear_4bit(torch.randn(tokens, width), q, rows, bias)) or width
    assert (
        y.shape == (tokens, rows) and dx.shape == (tokens, width) and (rows or not bool(dx.any()))
    )
    if not width:
        assert torch.equal(y, bias.expand(tokens, rows))


SURROUNDED = """
import threading, torch
from halfbyte import codebooks, nf4, ops
from halfbyte.ops import cpu

generator = torch.Generator().manual_seed(0)
w = torch.randn(96, 640, generator=generator, dtype=torch.float32)
x = torch.randn(3, 640, generator=generator, dtype=torch.float32)
{change}

found = []
def work():
    {inside}
        q = nf4.quantize(w)
        found.append((cpu.path_in_use(), *q.stored_tensors(), ops.linear_4bit(x, q.parts, 96)))

threads = [threading.Thread(target=work) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert len(found) == 4 and len({{f[0] for f in found}}) == 1, [f[0] for f in found]
assert found[0][0] != "torch"
torch.set_default_dtype(torch.float32)
with cpu.using("torch"):
    expected = nf4.quantize(w)
for _, *stored, y in found:
    assert all(torch.equal(a, b) for a, b in zip(stored, expected.stored_tensors(), strict=True))
    assert torch.allclose(y, x @ expected.dequantize().T, atol=1e-4)
"""


@needs_library
@pytest.mark.parametrize(
    ("change", "inside"),
    [
        ("", "if True:"),
        ("torch.set_default_dtype(torch.bfloat16)", "if True:"),
        ("torch.set_default_dtype(torch.float64)", "if True:"),
        ("", "with torch.device('meta'):"),
        ("", "with torch.inference_mode():"),
    ],
)
def test_first_use_under_any_defaults_and_from_threads(change: str, inside: str):
    script = SURROUNDED.format(change=change, inside=inside)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@needs_library
def test_strided_tables():
    w = torch.randn(64, 128)
    levels = torch.tensor(codebooks.levels("nf4"), dtype=torch.float32)
    scales = torch.tensor(codebooks.dynamic_map(signed=True))
    packed, absmax = ops.quantize_4bit(w, levels, 64)
    strided = torch.stack([levels, levels], 1)[:, 0]
    assert torch.equal(ops.quantize_4bit(w, strided, 64)[0], packed)
    expected = ops.quantize_absmax(absmax, scales, 256)
    found = ops.quantize_absmax(absmax, torch.stack([scales, scales], 1)[:, 0], 256)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_wrong_tensors_are_refused_before_any_backend():
    q = nf4.quantize(torch.randn(64, 128)).parts
    for bias in (torch.ones(1), torch.ones(7)):
        with pytest.raises(ValueError, match="bias must be"):
            ops.linear_4bit(torch.randn(3, 128), q, 64, bias)
    p, maps = (
        torch.randn(4096),
        [torch.tensor(codebooks.dynamic_map(signed=s)) for s in (True, False)],
    )
    numbers: dict[str, Any] = {
        "lr": 1e-3,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0.0,
        "step": 1,
    }

    def step(
        grad: torch.Tensor = p, codes: torch.Tensor | None = None, table: torch.Tensor = maps[0]
    ) -> None:
        state = [torch.zeros(4096, dtype=torch.uint8) for _ in range(2)] + [
            torch.zeros(16) for _ in range(2)
        ]
        state[0] = state[0] if codes is None else codes
        ops.adamw_8bit_step([p.clone()], [grad], *state, table, maps[1], **numbers)

    step()
    for change, message in (
        ({"grad": p.bfloat16()}, "must be fp32"),
        ({"codes": torch.zeros(4096, 2, dtype=torch.uint8)[:, 0]}, "m_codes must be contiguous"),
        ({"table": maps[0].double()}, "m_map must be"),
    ):
        with pytest.raises(ValueError, match=message):
            step(**change)


def test_a_runs_own_choice_of_kernels_does_not_bind():
    from halfbyte.config.options import TrainConfig

    trained = TrainConfig(model="demo", data="x", kernels="cpp", bnb_4bit_blocksize=128)
    assert "kernels" not in trained.holding() and trained.holding()["bnb_4bit_blocksize"] == 128


def test_bytes_are_the_same_where_subnormal_numbers_are_flushed(every_path: list[str]):
    """By a process that set it, or by a library built with -ffast-math: blocks of zeros, subnormal
    ones in the library's paths, a short last block of zeros."""
    weights = torch.zeros(64 * 70 + 7)
    weights[64 * 3 : 64 * 40] = torch.randn(64 * 37, generator=torch.Generator().manual_seed(0))
    weights[64 * 41 : 64 * 42] = 3e-39
    moments = torch.zeros(4096)
    moments[:300] = 1e-3
    for kernels in [*every_path, "torch"]:
        values = weights.clone()
        if kernels == "torch":
            values[64 * 41 : 64 * 42] = 0
        found = []
        for flush in (False, True):
            torch.set_flush_denormal(flush)
            try:
                with cpu.using("torch" if kernels == "torch" else "cpp"):
                    if kernels != "torch":
                        cpu.choose_path(kernels)
                    made = nf4.quantize(values)
                    parameter = torch.nn.Parameter(torch.zeros(4096))
                    parameter.grad = moments.clone()
                    optimizer = AdamW8bit([parameter], lr=1e-3)
                    optimizer.step()
                found.append([*made.stored_tensors(), *optimizer.state_tensors().values()])
            finally:
                torch.set_flush_denormal(False)
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)), kernels
        assert float(made.dequantize()[:64].abs().max()) == 0


@needs_library
def test_what_the_build_left_out_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shutil.copy(library_file(), tmp_path / "halfbyte_cpu.so")
    (tmp_path / "halfbyte_cpu.txt").write_text("built\nwithout OpenMP: no runtime\n\n")
    monkeypatch.setattr(cpu.importlib.resources, "files", lambda package: tmp_path)
    for name in ("_library", "_why", "_tried"):
        monkeypatch.setattr(cpu, name, getattr(cpu, name))
    cpu._tried = False
    assert cpu.why().endswith("; without OpenMP: no runtime") and cpu.paths()


def test_no_more_threads_are_used_than_openmp_gives(monkeypatch: pytest.MonkeyPatch):
    before = torch.get_num_threads()
    try:
        for limit, threads in (("2", 2), ("0", 3), ("many", 3), ("8", 3)):
            torch.set_num_threads(3)
            monkeypatch.setenv("OMP_THREAD_LIMIT", limit)
            cpu.respect_limits()
            assert torch.get_num_threads() == threads, limit
    finally:
        torch.set_num_threads(before)


def _product_of(model: torch.nn.Linear, answers: Any) -> None:
    answers.send(model(torch.ones(64, 256)).sum().item())


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork")
def test_a_forked_worker_computes():
    """OpenMP's threads of a parent that has computed with several are not forked."""
    cpu.active()
    before = torch.get_num_threads()
    model = torch.nn.Linear(256, 256).requires_grad_(False)
    ours, theirs = multiprocessing.get_context("fork").Pipe()
    worker = multiprocessing.get_context("fork").Process(target=_product_of, args=(model, theirs))
    try:
        torch.set_num_threads(2)
        expected = model(torch.ones(64, 256)).sum().item()
        worker.start()
        theirs.close()
        assert ours.poll(20), "it waits"
        assert ours.recv() == pytest.approx(expected, rel=1e-5)
    finally:
        worker.kill()
        worker.join()
        torch.set_num_threads(before)
