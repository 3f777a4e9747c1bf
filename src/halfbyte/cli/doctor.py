"""``halfbyte doctor``: this machine, the versions, and every fast path with the reason it is on or
off."""

import contextlib
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from ..config.verbs import DoctorConfig
from . import console
from .options import Verb

MINIMUM = {"torch": "2.11", "transformers": "5.17"}
PACKAGES = (
    "torch",
    "transformers",
    "safetensors",
    "tokenizers",
    "huggingface_hub",
    "datasets",
    "pyarrow",
)
OPTIONAL = {
    "bitsandbytes": "not needed; its files are read and written here",
    "peft": "not needed; its files too",
}
INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")


def doctor(record: DoctorConfig) -> dict[str, Any]:
    """What this machine can do, and why a fast path is off."""
    machine, versions = _machine(), _versions()
    paths = _fast_paths(machine)
    checks = _checks()
    console.table("machine", ["", ""], [[key, _shown(value)] for key, value in machine.items()])
    console.table("versions", ["", ""], [[name, note] for name, note in versions.items()])
    console.table(
        "fast paths",
        ["", "", "why"],
        [[p["path"], "on" if p["on"] else "off", p["why"]] for p in paths],
    )
    console.table(
        "checks",
        ["", "", ""],
        [[c["check"], "ok" if c["ok"] else "FAILS", c["note"]] for c in checks],
    )
    wrong = [c["check"] for c in checks if not c["ok"]]
    console.say(
        f"{len(wrong)} checks fail: {', '.join(wrong)}"
        if wrong
        else "everything that is needed is here"
    )
    console.say("next: halfbyte demo")
    return {"machine": machine, "versions": versions, "fast_paths": paths, "checks": checks}


def _machine() -> dict[str, Any]:
    import torch

    from ..memory.process import available, cpu_affinity, cpu_quota, limit_in_force

    (total, free), flags = _memory(), _cpu_flags()
    left = available()
    # which a user without a home leaves as it is
    home = Path(os.path.expanduser(os.environ.get("HF_HOME", "~/.cache/huggingface")))  # noqa: PTH111
    home = home.absolute()
    place = next(p for p in (home, *home.parents) if p.exists())
    found: dict[str, Any] = {
        "system": platform.platform(),
        "python": platform.python_version(),
        "processor": _cpu_name(),
        "cores": os.cpu_count() or 1,
        **({"cores by affinity": allowed} if (allowed := cpu_affinity()) else {}),
        **({"cores by quota": quota} if (quota := cpu_quota()) else {}),
        "threads torch uses": torch.get_num_threads(),
        "instructions": [flag for flag in INSTRUCTIONS if flag in flags],
        "memory GiB": round(total / 2**30, 1),
        "memory available GiB": round((free if left is None else left) / 2**30, 2),
        **({"memory limit": limit} if (limit := limit_in_force()) else {}),
        "disk free here GiB": _disk(Path()),
        "disk free for the Hub cache GiB": _disk(place),
    }
    for number in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(number)
        found[f"cuda:{number}"] = (
            f"{card.name}, {card.total_memory / 2**30:.1f} GiB, capability "
            f"{card.major}.{card.minor}"
        )
    return found


def _disk(place: Path) -> float | str:
    from ..files.atomic import free_bytes

    try:
        free = free_bytes(place)
    except OSError as error:
        return str(error.strerror)
    return "unknown" if free is None else round(free / 2**30, 1)


def _memory() -> tuple[int, int]:
    """(total, available) bytes of main memory; zeros where the system does not tell."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return tuple(int(lines[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))  # pyright: ignore[reportReturnType]
    with contextlib.suppress(ValueError, OSError, AttributeError):
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return total, total
    return 0, 0


def _cpu_lines() -> dict[str, str]:
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return {
            key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)
        }
    return {}


def _cpu_flags() -> set[str]:
    lines = _cpu_lines()
    return set((lines.get("flags") or lines.get("Features") or "").split())


def _cpu_name() -> str:
    return _cpu_lines().get("model name") or platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    found = {}
    for name in (*PACKAGES, *OPTIONAL):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = f"absent ({OPTIONAL.get(name, 'needed')})"
    return found


def _fast_paths(machine: dict[str, Any]) -> list[dict[str, Any]]:
    import torch

    from ..model.architecture import choose_device, choose_dtype
    from ..ops import cpu, gpu

    device = choose_device("auto")
    dtype = str(choose_dtype("auto", device)).removeprefix("torch.")
    fast = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if device.type == "cuda":
        why = (
            "compute capability 8.0 or more"
            if dtype == "bfloat16"
            else "compute capability below 8.0 has no bf16 units"
        )
    else:
        why = (
            "the processor multiplies bf16"
            if fast
            else "the processor has no bf16 instructions: fp32 is used instead"
        )
    return [
        {
            "path": "GPU",
            "on": device.type == "cuda",
            "why": "PyTorch sees one" if device.type == "cuda" else _why_no_gpu(),
        },
        {"path": f"16-bit products ({dtype})", "on": dtype != "float32", "why": why},
        {"path": "C++ kernels", "on": cpu.active() is not None, "why": cpu.why()},
        {
            "path": "fused passes",
            "on": gpu.wanted() if device.type == "cuda" else cpu.active() is not None,
            "why": "norms, gated MLPs, rotary embeddings, cross-entropy; on CPUs also attention "
            "and LoRA: where a "
            "model's own are of a known form (a training says which)",
        },
        {
            "path": "Triton kernels",
            "on": device.type == "cuda" and gpu.wanted(),
            "why": gpu.try_all() if device.type == "cuda" else "there is no GPU",
        },
    ]


def _why_no_gpu() -> str:
    import torch

    if torch.version.cuda is None and getattr(torch.version, "hip", None) is None:
        return f"torch {torch.__version__} is built for the CPU"
    return "PyTorch finds no device: see nvidia-smi or rocm-smi"


def _checks() -> list[dict[str, Any]]:
    from packaging.version import Version

    checks = []
    for name, least in MINIMUM.items():
        version = metadata.version(name)
        ok = Version(version.partition("+")[0]) >= Version(least)
        checks.append(
            {"check": f"{name} is new enough", "ok": ok, "note": f"{version}, at least {least}"}
        )
    checks.append({"check": "4-bit bytes are the reference's", **_bytes_check()})
    checks.append({"check": "bf16 products are right", **_product_check()})
    locks = os.name == "posix"
    note = "flock" if locks else "no flock here: two trainers on one run are not kept apart"
    checks.append({"check": "run directories are locked", "ok": locks, "note": note})
    return checks


REFERENCE_SHA256 = "7e1f0c94cfb3178c1f15bd31fc32b1069ce6af24c2ab149dcca15679cb1f4d2b"
"""Of the codes and scales of the tensor below, double-quantized: equal on every machine, backend
and thread count."""


def _bytes_check() -> dict[str, Any]:
    import hashlib

    import torch

    from ..quantization.tensor import quantize

    n = 64 * 300 + 17
    steps = (torch.arange(n, dtype=torch.int64) * 2654435761 + 12345) % 65521
    weights = (steps.float() - 32760.0) / 65536.0
    digest = hashlib.sha256()
    for tensor in quantize(weights).stored_tensors():
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]
    found = digest.hexdigest()
    return {"ok": found == REFERENCE_SHA256, "note": f"sha256 {found[:16]}"}


def _product_check() -> dict[str, Any]:
    """PyTorch's own, of two matrices whose result is known; odd thread settings spoil them."""
    import torch

    ones = torch.ones(256, 256, dtype=torch.bfloat16, device="cpu")
    ok = bool((ones @ ones == 256).all())
    variables = ", ".join(f"{k}={v}" for k, v in os.environ.items() if k.startswith("OMP_"))
    return {"ok": ok, "note": f"{torch.get_num_threads()} threads {variables}".strip()}


def _shown(value: Any) -> str:
    return ", ".join(value) or "none known" if isinstance(value, list) else str(value)


command = Verb("doctor", DoctorConfig, doctor)
