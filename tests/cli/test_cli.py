"""The command line as a person uses it: exit codes, messages, JSON, options from anywhere."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from halfbyte.cli import run
from halfbyte.memory import process


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"instruction": "Say hello.", "output": "Hello!"}\n' * 6)
    return path


def test_train_chat_merge_end_to_end(
    stories: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = str(tmp_path / "run")
    arguments = [
        "train",
        str(stories),
        "--data",
        str(rows),
        "--output-dir",
        out,
        "--max_steps=30",
        "--json",
    ]
    assert run([*arguments, "--learning_rate", "1e-2", "--gradient_accumulation_steps", "1"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["steps"] == 30
    assert captured.err.rstrip().splitlines()[-1].startswith("next: halfbyte chat")
    assert run(["chat", out, "--prompt", "Say hello."]) == 0
    assert "Hello!" in capsys.readouterr().out, "overfitted: it answers, and stops by itself"
    merged = str(tmp_path / "merged")
    assert run(["merge", out, "--onto", "trained", "-o", merged, "--json"]) == 0
    receipt = json.loads(capsys.readouterr().out)
    assert receipt["greedy_agreement"] > 0.99
    assert run(["merge", out, "-o", merged]) == 2
    assert "is not empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    "seed", [pytest.param(seed, marks=pytest.mark.slow) for seed in (42, 1, 2, 3, 4)]
)
def test_demo_learns_what_it_did_not_know(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], seed: int
):
    """The target of the built-in model: at most 5 % of held-out orders before, at least 90 % after,
    for every seed."""
    assert run(["demo", "--output_dir", str(tmp_path / "demo"), "--seed", str(seed), "--json"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert result["exact_match_before"] <= 0.05 and result["exact_match_after"] >= 0.9
    assert result["greedy_agreement"] > 0.99
    assert captured.err.rstrip().splitlines()[-1].startswith("next: halfbyte chat")
    assert Path(result["merged_dir"], "model.safetensors").is_file()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/orders.jsonl").write_text("x")
    assert run(["demo", "--output_dir", str(tmp_path / "mine")]) == 2, (
        "somebody's directory is not replaced"
    )
    assert (tmp_path / "mine/orders.jsonl").read_text() == "x"


@pytest.mark.slow
def test_demo_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """QLoRA within two points of LoRA on the unquantized base, on the same rows and seed."""
    assert run(["demo", "--output_dir", str(tmp_path / "demo"), "--compare", "--json"]) == 0
    compared = json.loads(capsys.readouterr().out)["compare"]
    qlora, lora = compared["QLoRA (4-bit base)"], compared["LoRA (16-bit base)"]
    assert qlora["exact_match"] >= lora["exact_match"] - 0.02
    assert compared["full fine-tuning"]["exact_match"] > 0.5


def test_orders_share_nothing_between_training_and_test():
    from halfbyte.cli import orders

    train, held_out = orders.rows(7, 400, 100)
    for place in (0, 1):
        sides = [{row["messages"][place]["content"] for row in side} for side in (train, held_out)]
        assert not sides[0] & sides[1]
    assert orders.rows(7, 400, 100) == (train, held_out) != orders.rows(8, 400, 100)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (
            ["train", "{model}", "--data", "{rows}", "--learning_rte", "1"],
            2,
            "did you mean 'learning_rate'?",
        ),
        (["train", "{model}", "--data", "{rows}", "--learning_rate", "-1"], 2, "learning_rate"),
        (["train", "{model}", "--data", "{rows}", "--full"], 2, "--load_in_4bit false"),
        (["train", "--data", "{rows}"], 2, "model is required"),
        (["fly"], 2, "No such command"),
        (["train", "/no/such/model", "--data", "{rows}"], 6, "no model directory"),
        (["train", "{model}", "--data", "/no/rows.jsonl"], 4, "cannot read the data file"),
        (["train", "{model}", "--data", "{bad}"], 4, "bad.jsonl:1"),
        (
            ["train", "{model}", "--data", "{rows}", "--target_modules", "nope"],
            2,
            "matches no linear layer",
        ),
        (
            ["train", "{model}", "--data", "{rows}", "--output_dir", "{rows}/x"],
            5,
            "cannot write to",
        ),
        (["chat", "{model}/absent"], 6, "no model directory"),
        (["merge", "{model}", "-o", "x"], 6, "is not a run directory"),
    ],
)
def test_failures_name_the_way_out(
    stories: Path,
    rows: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    message: str,
):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"question": 1}\n')
    places = {"model": stories, "rows": rows, "bad": bad}
    filled = [a.format(**places) for a in arguments]
    if arguments[0] == "train" and "--output_dir" not in arguments:
        filled += ["--output_dir", str(tmp_path / "out")]
    assert run(filled) == code
    assert message in capsys.readouterr().err


def test_errors_as_json(capsys: pytest.CaptureFixture[str]):
    assert run(["merge", "nowhere", "-o", "x", "--json"]) == 6
    error = json.loads(capsys.readouterr().out)
    assert error["exit_code"] == 6 and "not a run directory" in error["what"]


def test_what_a_file_of_another_tool_leaves_to_defaults_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Twice the rank is LLaMA-Factory's alpha, 16 bits are its base: nothing of it was said."""
    config = tmp_path / "c.yaml"
    config.write_text("model: m\ndata: d\nfinetuning_type: lora\nlora_rank: 64\nwarmup_steps: 5\n")
    assert run(["train", "--config", str(config), "--lora_dropout", "0", "--dry-run"]) == 0
    said = " ".join(capsys.readouterr().out.split()).partition("not another tool's: ")[2]
    assert "load_in_4bit true, lora_alpha 32, target_modules all-linear" in said
    assert not any(name in said for name in ("lora_r ", "lora_dropout", "warmup"))
    config.write_text("model: m\ndata: d\nlora_rank: 64\nadapter_name_or_path: a\n")
    assert run(["train", "--config", str(config), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "learning_rate" in said and "lora_alpha" not in said
    config.write_text("model: m\ndata: d\nlora_r: 64\n")
    assert run(["train", "--config", str(config), "--dry-run"]) == 0
    assert "not another tool's" not in capsys.readouterr().out


def test_one_yaml_for_all_verbs(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = tmp_path / "c.yaml"
    config.write_text("model: m\ndata: d\nlora_rank: 4\nmax-seq-length: 77\nmax_new_tokens: 9\n")
    assert run(["train", "--config", str(config), "--lora_alpha", "64", "--dry-run", "--json"]) == 0
    captured = capsys.readouterr()
    record = json.loads(captured.out)
    assert (record["lora_r"], record["max_length"], record["lora_alpha"]) == (4, 77, 64)
    assert "lora_rank is called lora_r here" in captured.err
    assert run(["chat", "--config", str(config), "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["max_new_tokens"] == 9
    config.write_text("leaning_rate: 1\n")
    assert run(["train", "--config", str(config)]) == 2
    assert "learning_rate" in capsys.readouterr().err


def test_booleans_with_and_without_a_value(capsys: pytest.CaptureFixture[str]):
    common = ["train", "m", "--data", "d", "--dry-run", "--json"]
    for given, expected in (
        (["--packing"], True),
        (["--packing", "false"], False),
        (["--packing=true"], True),
    ):
        assert run([*common, *given]) == 0
        assert json.loads(capsys.readouterr().out)["packing"] is expected


@pytest.mark.parametrize(
    "topic",
    ["", "int4", "nf4", "double-quant", "tokens", "quiz", "lr"]
    + [pytest.param(topic, marks=pytest.mark.slow) for topic in ("paged", "memory", "optim")],
)
def test_explain_every_topic(topic: str, capsys: pytest.CaptureFixture[str]):
    assert run(["explain", *([topic] if topic else []), "--json"]) == 0
    captured = capsys.readouterr()
    page = json.loads(captured.out)
    assert page["parts"] and captured.err.rstrip().splitlines()[-1].startswith("next: halfbyte")


@pytest.mark.slow
def test_explain_shows_the_published_figures_beside_the_articles(
    capsys: pytest.CaptureFixture[str],
):
    def page(topic: str) -> str:
        assert run(["explain", topic, "--json"]) == 0
        return json.dumps(json.loads(capsys.readouterr().out)["parts"])

    nf4 = page("nf4")
    assert "-0.7076" in nf4 and "-0.6962" in nf4 and "3.88 bits" in nf4
    assert "4.1270" in page("double-quant") and "0.1167" in page("int4") and "3.3%" in page("int4")
    memory = page("memory")
    assert "207 M" in memory and "146.8 M" in memory
    assert run(["explain", "lora_rr"]) == 2
    assert "did you mean 'lora_r'?" in capsys.readouterr().err


def test_doctor_finds_this_machine_in_order(capsys: pytest.CaptureFixture[str]):
    assert run(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert all(check["ok"] for check in found["checks"]), found["checks"]
    assert all(path["why"] for path in found["fast_paths"]) and found["machine"]["cores"] >= 1


def test_doctor_knows_a_containers_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "memory.max").write_text(str(96 << 20))
    (tmp_path / "memory.current").write_text(str(32 << 20))
    monkeypatch.setattr(process, "_cgroups", lambda kind="memory": [tmp_path])
    assert run(["doctor", "--json"]) == 0
    machine = json.loads(capsys.readouterr().out)["machine"]
    assert machine["memory available GiB"] == 0.06
    assert machine["memory limit"] == f"0.09 GiB, by {tmp_path / 'memory.max'}"


def test_data_check_counts_and_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    lines = ['{"instruction": "Say hello.", "output": "Hello!"}'] * 3 + [
        '{"instruction": "Hi.", "output": "Yo."}'
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([*lines, "{bad"]))
    assert run(["data", "check", str(path)]) == 4
    assert f"{path}:5" in capsys.readouterr().err
    assert run(["data", "check", str(path), "--skip_bad", "1", "--json"]) == 0
    captured = capsys.readouterr()
    counts = json.loads(captured.out)
    assert counts["rows"] == counts["rows_with_trained_end"] == 4
    assert (
        counts["duplicate_rows"] == 2
        and counts["bad_rows_skipped"] == 1
        and counts["form"] == "alpaca"
    )
    assert counts["masked_tokens"] + counts["supervised_tokens"] == counts["tokens"]
    assert "⟦Hello!⟧⟦<|end|>⟧" in captured.err


def test_plain_text_runs_are_continued_without_a_template(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "colour of grass: ", "completion": "green"}\n' * 8)
    out = str(tmp_path / "run")
    options = ["--max_steps", "30", "--learning_rate", "1e-2", "--gradient_accumulation_steps", "1"]
    assert (
        run(
            [
                "train",
                "demo",
                "--data",
                str(path),
                "--output_dir",
                out,
                "--lora_dropout",
                "0",
                *options,
            ]
        )
        == 0
    )
    capsys.readouterr()
    assert run(["chat", out, "--prompt", "colour of grass: ", "--json"]) == 0
    captured = capsys.readouterr()
    said = json.loads(captured.out)
    assert (said["answer"], said["stopped"]) == ("green", True)
    assert "without a chat template" in captured.err


def test_conversational_prompts_keep_their_template(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "rows.jsonl"
    turn = {
        "prompt": [{"role": "user", "content": "Hi?"}],
        "completion": [{"role": "assistant", "content": "Yo."}],
    }
    path.write_text((json.dumps(turn) + "\n") * 4)
    out = str(tmp_path / "run")
    assert (
        run(
            [
                "train",
                "demo",
                "--data",
                str(path),
                "--output_dir",
                out,
                "--max_steps",
                "1",
                "--num_samples",
                "0",
            ]
        )
        == 0
    )
    capsys.readouterr()
    assert run(["chat", out, "--prompt", "Hi?", "--max_new_tokens", "3"]) == 0
    assert "without a chat template" not in capsys.readouterr().out


def test_options_of_other_tools(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    common = ["train", "m", "--data", "d", "--dry-run", "--json"]

    def record(*more: str) -> dict:
        assert run([*common, *more]) == 0
        return json.loads(capsys.readouterr().out)

    both = record("--train_on_inputs")
    assert both["completion_only_loss"] is both["assistant_only_loss"] is False
    neither = record("--train_on_inputs", "false")
    assert neither["completion_only_loss"] is neither["assistant_only_loss"] is True
    assert record("--bf16")["dtype"] == "bfloat16" and record("--bf16", "false")["dtype"] == "auto"
    assert record("--val_set_size", "0.1")["eval_split"] == 0.1
    assert run(["train", "--packing", "m", "--data", "d", "--dry-run"]) == 0, (
        "a switch does not eat the model"
    )
    capsys.readouterr()
    assert run([*common, "--load_in_8bit"]) == 2
    assert "bases are held in 4 bits" in capsys.readouterr().err
    assert record("--use_dora")["use_dora"] is True
    assert record("--lora_modules_to_save", "lm_head")["modules_to_save"] == "lm_head"
    assert run([*common, "--num_train_epochs", "inf"]) == 2
    capsys.readouterr()
    assert run([*common, "--adapter", "qlora", "--save_strategy", "steps"]) == 0
    capsys.readouterr()
    config = tmp_path / "c.yaml"
    config.write_text(
        "val_set_size:\nadapter: qlora\ntarget_modules: [q_proj, v_proj]\ntrust_remote_code: "
        "false\nfp16: true\n"
    )
    record = record("--config", str(config))
    assert record["target_modules"] == "q_proj,v_proj" and record["dtype"] == "float16"
    assert run(["chat", "m", "--prompt", "--packing is what?", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "--packing is what?"


def test_a_files_repository_is_the_trainings(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """One YAML serves every verb; a merge must not go over the adapter that the training
    published."""
    config = tmp_path / "c.yaml"
    config.write_text("push_to_hub: true\nhub_model_id: me/adapter\n")

    def record(*arguments: str) -> dict:
        assert run([*arguments, "--config", str(config), "--dry-run", "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    assert record("train", "m", "--data", "d")["hub_model_id"] == "me/adapter"
    assert record("merge", "r", "-o", "o")["push_to_hub"] is False
    named = record(
        "export",
        "r",
        "--to",
        "peft",
        "-o",
        "o",
        "--push_to_hub",
        "true",
        "--hub_model_id",
        "me/export",
    )
    assert named["push_to_hub"] and named["hub_model_id"] == "me/export"


def test_help_does_not_import_torch():
    code = "import sys, halfbyte.cli as c; c.run(['--help']); sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, env=environment
        ).returncode
        == 0
    )


def test_package_gives_functions_not_modules():
    import halfbyte.training.trainer

    assert callable(halfbyte.train) and callable(halfbyte.load) and callable(halfbyte.merge)
    assert halfbyte.nf4.NF4Tensor is halfbyte.NF4Tensor
    with pytest.raises(AttributeError):
        _ = halfbyte.nothing


def test_threads_that_wait_give_their_core_away_soon():
    """Unless torch is there already, or the user has said how threads wait."""
    show = "import os; print(os.environ.get('GOMP_SPINCOUNT'))"
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    }
    cases = (
        ("import halfbyte; ", {}, "20000"),
        ("import sys; sys.modules['torch'] = sys; import halfbyte; ", {}, "None"),
        ("import halfbyte; ", {"OMP_WAIT_POLICY": "active"}, "None"),
        ("import halfbyte; ", {"GOMP_SPINCOUNT": "7"}, "7"),
    )
    for begin, given, expected in cases:
        command = [sys.executable, "-c", begin + show]
        found = subprocess.run(
            command, env={**environment, **given}, capture_output=True, text=True, check=True
        )
        assert found.stdout.strip() == expected, (begin, given)


def test_bench_shows_limits_and_ours(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    from halfbyte.cli import bench
    from halfbyte.ops import cpu

    monkeypatch.setattr(bench, "ROWS", 128)
    monkeypatch.setattr(bench, "COLUMNS", 192)
    monkeypatch.setattr(bench, "PARAMETERS", 8192)
    best = cpu.path_in_use()
    try:
        for path in cpu.paths():
            assert run(["bench", "--json", "--path", path]) == 0
            found = json.loads(capsys.readouterr().out)
            assert (
                found["path"] == path
                and found["limits"]["copy_bytes"] > 0
                and found["limits"]["fp32_flops"] > 0
            )
            assert len(found["operations"]) == 9 and all(
                row["ms"] > 0 for row in found["operations"]
            )
    finally:
        if cpu.paths():
            cpu.choose_path(best)
    assert run(["bench", "--kernels", "torch"]) == 0
    assert "no library to measure" in capsys.readouterr().out
    cpu.use("auto")
    assert run(["bench", "--path", "sse9"]) == 2


def command(*arguments: str, **how: Any) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, "-m", "halfbyte", *arguments], timeout=300, **how)


@pytest.mark.parametrize(
    "encoding",
    ["ascii", *(pytest.param(name, marks=pytest.mark.slow) for name in ("latin-1", "cp1252"))],
)
def test_a_terminal_that_lacks_characters_gets_others(tmp_path: Path, encoding: str):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instruction": "日本?", "output": "はい → ☕"}\n' * 3, encoding="utf-8")
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    found = command("data", "check", str(rows), "--model", "demo", env=environment, **PIPES)
    assert found.returncode == 0, found.stderr[-800:]
    assert b"[[" in found.stdout or "⟦".encode(encoding, "ignore") in found.stdout


PIPES: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_output_that_nobody_takes_ends_no_training(rows: Path, stories: Path, tmp_path: Path):
    options = ["--max_steps", "2", "--gradient_accumulation_steps", "1", "--num_samples", "0"]
    out = tmp_path / "run"
    with Path("/dev/full").open("wb") as full:
        found = command(
            "train",
            str(stories),
            "--data",
            str(rows),
            "--output_dir",
            str(out),
            *options,
            stdout=full,
            stderr=subprocess.PIPE,
        )
    assert found.returncode == 0, found.stderr[-800:]
    assert (out / "adapter/adapter_model.safetensors").is_file()
    assert "step 2" in (out / "log.txt").read_text() or "loss" in (out / "log.txt").read_text()


def test_modules_in_the_working_directory_are_nobodys(tmp_path: Path):
    for name in ("json", "click", "torch", "random"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported what lies around')\n")
    found = command("--version", cwd=tmp_path, **PIPES)
    assert found.returncode == 0, found.stderr[-300:]
