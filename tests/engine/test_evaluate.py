"""Loss and exact match against transformers' own loss and a greedy loop; the base beside the run;
overfitted rows."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import halfbyte
from halfbyte.adapters.peft_files import adapter_off
from halfbyte.cli import run as cli
from halfbyte.config.options import DataOptions
from halfbyte.data.dataset import read_data
from halfbyte.data.renderer import Renderer
from halfbyte.engine.evaluate import RowLosses, exact_matches, mean_loss, score
from halfbyte.engine.generate import answer, answers
from halfbyte.files import hub
from halfbyte.run.directory import Run
from halfbyte.run.load import load

EIGHT = [
    ("What is the capital of France?", "Paris, on the Seine."),
    ("Two and two?", "4"),
    ("Say nothing much.", "Nothing much!"),
    ("Name three colours.", "red, green and blue"),
    ("Who wrote Emma?", "Jane Austen wrote it in 1815."),
    ("Translate dog.", "perro"),
    ("A list, please.", "- one\n- two"),
    ("As JSON?", '{"a": [1, 2]}'),
]


def write(path: Path, pairs: list[tuple[str, str]]) -> str:
    path.write_text("".join(json.dumps({"instruction": q, "output": a}) + "\n" for q, a in pairs))
    return str(path)


@pytest.fixture(scope="session")
def overfitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, str]:
    """The built-in model after eight rows, seen until it knows them; its tokenizer's pad token is
    its end token."""
    home = tmp_path_factory.mktemp("eight")
    shutil.copytree(hub.resolve("demo"), home / "base")
    tokenizer = hub.load_tokenizer(home / "base")
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(home / "base")
    data = write(home / "rows.jsonl", EIGHT)
    options: dict[str, Any] = {
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "lora_dropout": 0.0,
    }
    run = halfbyte.train(
        model=str(home / "base"),
        data=data,
        output_dir=str(home / "run"),
        dtype="float32",
        learning_rate=5e-3,
        max_steps=60,
        num_samples=8,
        **options,
    )
    return run, data


def test_eight_overfitted_rows_are_answered_exactly_and_end_by_themselves(
    overfitted: tuple[Run, str],
):
    run, _data = overfitted
    model, tokenizer = load(run.path)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    renderer = Renderer(tokenizer)
    for question, wanted in EIGHT:
        said = answer(model, renderer, [{"role": "user", "content": question}])
        assert (said.text, said.stopped) == (wanted, True)
    samples = run.samples()
    assert len(samples) == 8 and all(
        s["after"] == s["expected"] and s["after_stopped"] for s in samples
    )
    assert not any(s["before"] == s["expected"] for s in samples)


def test_an_answer_that_is_another_is_not_written_to_its_end(
    overfitted: tuple[Run, str], monkeypatch: pytest.MonkeyPatch
):
    """Of a real chat model's 282 rows `eval` wrote every answer, for an hour. What is cut changes
    no match: right ones, one that goes on, and others."""
    model, tokenizer = load(overfitted[0].path)
    renderer = Renderer(tokenizer)
    long = "once upon a time there was " * 8
    pairs = [*EIGHT[:4], (EIGHT[4][0], EIGHT[4][1] + " and more"), *((q, long) for q, _ in EIGHT)]
    asked = [(renderer.prompt_ids([{"role": "user", "content": q}]), a) for q, a in pairs]
    steps: list[int] = []
    forward = type(model).forward

    def counted(self: Any, *given: Any, **more: Any) -> Any:
        steps.append(1)
        return forward(self, *given, **more)

    monkeypatch.setattr(type(model), "forward", counted)
    found = exact_matches(model, renderer, asked)
    assert found == [True] * 4 + [False] * 9
    longest = max(len(tokenizer(text)["input_ids"]) for _, text in EIGHT)
    assert len(steps) <= longest + 8 < len(tokenizer(long)["input_ids"])
    whole = answers(model, renderer, [ids for ids, _ in asked], 100)
    texts = [
        (a.stopped and a.text.strip() == wanted.strip())
        for a, (_, wanted) in zip(whole, pairs, strict=True)
    ]
    assert texts == found


def test_eval_puts_the_base_beside_the_run(
    overfitted: tuple[Run, str], capsys: pytest.CaptureFixture[str]
):
    run, data = overfitted
    assert cli(["eval", str(run.path), "--data", data, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["tuned"]["exact_match"] == 1.0 and result["base"]["exact_match"] == 0.0
    assert result["tuned"]["loss"] < 0.05 < 1 < result["base"]["loss"]
    assert result["base"]["tokens"] == result["tuned"]["tokens"]
    base = str(run.info()["base"]["path"])
    assert cli(["eval", base, "--data", data, "--json", "--dtype", "float32"]) == 0
    alone = json.loads(capsys.readouterr().out)
    assert (
        alone["base"]["loss"] == pytest.approx(result["base"]["loss"], rel=1e-5)
        and alone["tuned"] is None
    )


def test_eval_scores_every_row_whatever_a_shared_configuration_holds_out(
    overfitted: tuple[Run, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run, data = overfitted
    (tmp_path / "c.yaml").write_text("eval_split: 0.5\n")
    arguments = [
        "eval",
        str(run.path),
        "--data",
        data,
        "--config",
        str(tmp_path / "c.yaml"),
        "--json",
    ]
    assert cli([*arguments, "--generate", "false"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["rows"] == 8 and result["base"]["exact_match"] is None


def test_eval_of_a_full_fine_tuning_puts_the_same_kind_of_base_beside_it(
    tmp_path: Path, capsys: Any
):
    data = write(tmp_path / "r.jsonl", EIGHT)
    common: dict[str, Any] = {
        "full": True,
        "load_in_4bit": False,
        "optim": "adamw_torch",
        "dtype": "float32",
    }
    run = halfbyte.train(
        model="demo",
        data=data,
        output_dir=str(tmp_path / "run"),
        max_steps=2,
        num_samples=0,
        save_steps=9,
        **common,
    )
    assert cli(["eval", str(run.path), "--data", data, "--generate", "false", "--json"]) == 0
    beside = json.loads(capsys.readouterr().out)["base"]["loss"]
    arguments = [
        "eval",
        "demo",
        "--data",
        data,
        "--generate",
        "false",
        "--json",
        "--dtype",
        "float32",
    ]
    assert cli([*arguments, "--load_in_4bit", "false"]) == 0
    assert json.loads(capsys.readouterr().out)["base"]["loss"] == pytest.approx(beside, rel=1e-6)


def test_questions_too_long_for_the_limit_are_not_asked(tmp_path: Path):
    data = read_data(
        write(tmp_path / "r.jsonl", [*EIGHT[:2], ("long " * 60, "x")]),
        DataOptions(max_length=40),
        hub.resolve("demo"),
    )
    asked = [data.question(row) is not None for row in data.train.rows]
    assert asked == [True, True]


def test_a_run_on_another_base_is_refused(overfitted: tuple[Run, str], tmp_path: Path, capsys: Any):
    """The base overwritten in place: the adapter no longer fits, and that is said, not run."""
    run, _data = overfitted
    shutil.copytree(run.path, tmp_path / "run")
    shutil.copytree(run.info()["base"]["path"], tmp_path / "base")
    from safetensors.torch import load_file, save_file

    weights = load_file(tmp_path / "base/model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] += 1
    weights_at, kind = tmp_path / "base/model.safetensors", {"format": "pt"}
    save_file(weights, weights_at, kind)
    info = run.info()  # without its seal and copy, as older releases wrote it
    (tmp_path / "run/.run.json").unlink()
    info["base"]["path"] = str(tmp_path / "base")
    (tmp_path / "run/run.json").write_text(json.dumps(info))
    assert cli(["chat", str(tmp_path / "run"), "--prompt", "hi"]) == 6
    assert "not the one this adapter was trained on" in capsys.readouterr().err
    save_file(load_file(run.info()["base"]["path"] + "/model.safetensors"), weights_at, kind)
    described = json.loads((tmp_path / "base/config.json").read_text())
    changed = {**described, "rms_norm_eps": 1e-3}
    (tmp_path / "base/config.json").write_text(json.dumps(changed))
    assert cli(["chat", str(tmp_path / "run"), "--prompt", "hi"]) == 6
    before = described["rms_norm_eps"]
    assert f"rms_norm_eps: {before} then, 0.001 now" in capsys.readouterr().err
    info["base"]["path"] = run.info()["base"]["path"]
    (tmp_path / "run/run.json").write_text(json.dumps(info))
    template = tmp_path / "run/adapter/chat_template.jinja"
    template.write_text(template.read_text().replace("<|end|>", ""))
    assert cli(["chat", str(tmp_path / "run"), "--prompt", "hi"]) == 6
    assert "chat_template.jinja is not the file that was written" in capsys.readouterr().err
    (tmp_path / "run/run.json").write_text('{"config": {}}')
    assert cli(["chat", str(tmp_path / "run"), "--prompt", "hi"]) == 6
    assert "damaged" in capsys.readouterr().err


def test_loss_is_transformers_own(tmp_path: Path):
    """Row by row with labels, weighted by supervised tokens; packed or not."""
    data = read_data(write(tmp_path / "r.jsonl", EIGHT), DataOptions(), hub.resolve("demo"))
    model, _ = load("demo", dtype="float32", device="cpu")
    total, tokens = 0.0, 0
    with torch.no_grad():
        for row in data.train.rows:
            labels = torch.tensor(
                [i if flag else -100 for i, flag in zip(row.input_ids, row.loss_mask, strict=True)]
            )
            count = int((labels[1:] != -100).sum())
            loss = model(input_ids=torch.tensor([row.input_ids]), labels=labels[None]).loss
            total, tokens = total + float(loss) * count, tokens + count
    for packed in (True, False):
        loss, counted = mean_loss(model, data.train.rows, packed=packed)
        assert counted == tokens and loss == pytest.approx(total / tokens, rel=1e-5)


def test_answers_together_are_the_answers_alone():
    """Left padding changes nothing but rounding."""
    model, tokenizer = load("demo", dtype="float32", device="cpu")
    renderer = Renderer(tokenizer)
    prompts = [renderer.prompt_ids([{"role": "user", "content": q}]) for q, _ in EIGHT]
    together = answers(model, renderer, prompts, 12)
    alone = [answers(model, renderer, [ids], 12)[0] for ids in prompts]
    assert together == alone


def test_exact_match_wants_the_whole_answer_and_the_end(monkeypatch: pytest.MonkeyPatch):
    """An answer that goes on, or stops early, is no match."""
    from halfbyte.engine import evaluate
    from halfbyte.engine.generate import Answer

    renderer = Renderer(hub.load_tokenizer(hub.resolve("demo")))
    said = [
        Answer("yes", True),
        Answer("yes", False),
        Answer("yes and", True),
        Answer(" yes\n", True),
    ]
    monkeypatch.setattr(evaluate, "answers", lambda *a, **more: said)
    found = exact_matches(None, renderer, [([5, 6], "yes")] * 4)
    assert found == [True, False, False, True]


def test_an_answer_may_begin_with_control_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It is wanted without them, and has the room to say them."""
    from halfbyte.engine import evaluate
    from halfbyte.engine.generate import Answer

    opened = "<|system|>" * 9
    template = tmp_path / "template.jinja"
    template.write_text(
        "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}"
        + opened
        + "{{ m.content }}<|end|>{% endgeneration %}{% else %}{{ m.content }}<|end|>{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    data = read_data(
        write(tmp_path / "r.jsonl", [("say it", "tea")]),
        DataOptions(chat_template=str(template)),
        hub.resolve("demo"),
    )
    (row,) = data.train.rows
    limits: list[int] = []

    def say(
        model: Any, renderer: Any, prompts: Any, limit: int, wanted: Any = None
    ) -> list[Answer]:
        limits.append(limit)
        return [Answer("tea", True)]

    monkeypatch.setattr(evaluate, "answers", say)
    lost = RowLosses((0.0,), (1,), (0.0,))
    monkeypatch.setattr(evaluate, "row_losses", lambda *a, **k: lost)
    assert score(None, data, [row], packed=True, generate=True).exact_match == 1.0
    ids, wanted = data.question(row) or ([], "")
    assert wanted == "tea" and limits[0] >= len(row.input_ids) - len(ids) > 9


def test_adapter_off_is_the_base_exactly(overfitted: tuple[Run, str]):
    run, _ = overfitted
    base, _ = load(run.info()["base"]["path"], dtype="float32", device="cpu")
    tuned, _ = load(run.path)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        with adapter_off(tuned):
            assert torch.equal(tuned(input_ids=ids).logits, base(input_ids=ids).logits)
        assert not torch.equal(tuned(input_ids=ids).logits, base(input_ids=ids).logits)


def test_evaluation_between_steps_changes_no_training(tmp_path: Path):
    """train -> eval -> train: the adapter's bytes are those of a training that never evaluated."""
    data = write(tmp_path / "r.jsonl", EIGHT * 2)
    digests = []
    for name, every in (("a", 0), ("b", 1)):
        run = halfbyte.train(
            model="demo",
            data=data,
            output_dir=str(tmp_path / name),
            eval_split=4,
            eval_steps=every,
            max_steps=3,
            num_samples=2 if every else 0,
            gradient_accumulation_steps=2,
        )
        digests.append((run.adapter / "adapter_model.safetensors").read_bytes())
    assert digests[0] == digests[1]
    steps = [row["step"] for row in Run(tmp_path / "b").read("eval.jsonl")]
    assert steps == [0, 1, 2, 3], "before, and after each step"
    assert [row["step"] for row in Run(tmp_path / "a").read("eval.jsonl")] == [0, 3]


def test_rows_without_a_question_have_no_exact_match(tmp_path: Path):
    (tmp_path / "t.jsonl").write_text('{"text": "Once upon a time there was a king."}\n')
    data = read_data(str(tmp_path / "t.jsonl"), DataOptions(), hub.resolve("demo"))
    model, _ = load("demo", dtype="float32", device="cpu")
    found = score(model, data, data.train.rows, packed=True, generate=True)
    ids = data.train.rows[0].input_ids
    assert found.exact_match is None and found.tokens == len(ids) - 1
    assert ids[-1] == model.config.eos_token_id
    text = torch.tensor([ids[:-1]])  # as other tools evaluate it
    with torch.no_grad():
        theirs = math.exp(model(input_ids=text, labels=text).loss)
    assert found.perplexity_without_end == pytest.approx(theirs, rel=1e-4) != found.perplexity
