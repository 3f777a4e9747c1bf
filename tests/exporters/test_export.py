"""A run for other tools, opened by them; and published, against a Hub on this machine."""

import base64
import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import halfbyte
from halfbyte.adapters.peft_files import load_adapter
from halfbyte.cli import run as command
from halfbyte.cli.export import OPENS
from halfbyte.config.options import ModelOptions
from halfbyte.config.verbs import ExportConfig
from halfbyte.errors import ModelError, StorageError, UsageError
from halfbyte.exporters.export import _WRITERS, FORMATS
from halfbyte.files import publish
from halfbyte.files.safetensors import Checkpoint, write_safetensors
from halfbyte.progress import no_progress
from halfbyte.quantization.writer import quantize

from ..helpers import small_config

ROWS = [
    {"prompt": f"{word} is", "completion": f" a word of {len(word)} letters"}
    for word in "one three seven".split()
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("export")


@pytest.fixture(scope="module")
def data(home: Path) -> Path:
    path = home / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in ROWS))
    return path


@pytest.fixture(scope="module")
def base(stories: Path, home: Path) -> Path:
    """Of widths that are multiples of a block: bitsandbytes 0.50 dequantizes others wrongly on
    CPUs."""
    torch.manual_seed(0)
    config = small_config(vocab_size=512, intermediate_size=128, max_position_embeddings=512)
    LlamaForCausalLM(config).save_pretrained(home / "base")
    for file in stories.iterdir():
        if "token" in file.name:
            shutil.copy(file, home / "base" / file.name)
    return home / "base"


@pytest.fixture(scope="module")
def run(base: Path, home: Path, data: Path) -> halfbyte.Run:
    options: dict[str, Any] = {
        "gradient_accumulation_steps": 3,
        "learning_rate": 2e-2,
        "lora_dropout": 0.0,
    }
    return halfbyte.train(str(base), data, output_dir=str(home / "run"), max_steps=4, **options)


IDS = torch.arange(3, 25)[None]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


def test_every_export_runs_in_its_tool_with_our_logits(run: halfbyte.Run, home: Path, base: Path):
    peft: Any = pytest.importorskip("peft")
    ours = logits(halfbyte.load(run.path, dtype="float32")[0])
    size = float(ours.abs().max())

    halfbyte.export(run.path, home / "peft", "peft")
    held, _ = halfbyte.load(base, dtype="float32")
    under_peft = peft.PeftModel.from_pretrained(held, str(home / "peft"))
    torch.testing.assert_close(logits(under_peft), ours, rtol=0, atol=1e-5 * size)
    found = halfbyte.export(run.path, home / "hf", "hf")
    assert found["greedy_agreement"] == 1.0
    merged: Any = AutoModelForCausalLM.from_pretrained(home / "hf", dtype=torch.float32)
    torch.testing.assert_close(logits(merged), ours, rtol=0, atol=1e-4 * size)

    pytest.importorskip("bitsandbytes")
    found = halfbyte.export(run.path, home / "4bit", "bnb-4bit")
    assert found["digest"] == run.info()["base"]["digest"]
    # exactly our weights there, by our own reader; run by bitsandbytes within its rounding
    again, _ = halfbyte.load(home / "4bit", dtype="float32")
    load_adapter(again, home / "4bit" / "adapter")
    assert torch.equal(logits(again), ours)
    theirs: Any = AutoModelForCausalLM.from_pretrained(home / "4bit", dtype=torch.float32)
    assert type(theirs.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    with_adapter = peft.PeftModel.from_pretrained(theirs, str(home / "4bit" / "adapter")).train()
    torch.testing.assert_close(logits(with_adapter), ours, rtol=0, atol=1e-2 * size)
    named = json.loads((home / "4bit" / "adapter" / "adapter_config.json").read_text())[
        "base_model_name_or_path"
    ]
    assert named == str(home / "4bit"), "so that it opens from anywhere"
    moved = shutil.copytree(home / "4bit", home / "moved")
    shutil.move(home / "4bit", home / "away")
    again, _ = halfbyte.load(moved / "adapter", dtype="float32", allow_other_base=True)
    assert torch.equal(logits(again), ours)
    shutil.move(home / "away", home / "4bit")


def test_the_adapter_beside_4_bits_names_them_from_the_root(
    trained_run: halfbyte.Run, tmp_path: Path
):
    halfbyte.export(trained_run.path, tmp_path / "made", "bnb-4bit")
    described = json.loads((tmp_path / "made/adapter/adapter_config.json").read_text())
    assert described["base_model_name_or_path"] == str(tmp_path / "made")
    assert 'path/to/this/directory/adapter"' in (tmp_path / "made/README.md").read_text()


def test_what_cannot_be_exported_is_refused_and_leaves_nothing(run: halfbyte.Run, home: Path):
    with pytest.raises(UsageError, match="not empty"):
        halfbyte.export(run.path, run.path, "peft")
    with pytest.raises(UsageError, match="no-such-format"):
        halfbyte.export(run.path, home / "no", "no-such-format")
    assert not (home / "no").exists() and not list(home.glob(".no*"))


def test_a_base_that_has_changed_is_not_exported(base: Path, data: Path, tmp_path: Path):
    """Also one that was in 4 bits before."""
    quantize(base, ModelOptions(), tmp_path / "q", no_progress)
    run = halfbyte.train(
        str(tmp_path / "q"), data, output_dir=str(tmp_path / "run"), max_steps=1, num_samples=0
    )
    found = halfbyte.export(run.path, tmp_path / "out", "bnb-4bit")
    assert found["digest"] == run.info()["base"]["digest"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'path/to/this/directory/adapter"' in card and "bitsandbytes" not in card.splitlines()[0]
    held = Checkpoint(tmp_path / "q")
    tensors = {name: held.read(name) for name in held}
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 2
    write_safetensors(next((tmp_path / "q").glob("*.safetensors")), tensors)
    with pytest.raises(ModelError, match="changed since"):
        halfbyte.export(run.path, tmp_path / "no", "bnb-4bit")
    assert not (tmp_path / "no").exists()


def test_a_full_fine_tuning_is_exported_as_a_model(base: Path, data: Path, tmp_path: Path):
    options: dict[str, Any] = {
        "full": True,
        "load_in_4bit": False,
        "max_steps": 1,
        "num_samples": 0,
        "dtype": "float32",
    }
    run = halfbyte.train(str(base), data, output_dir=str(tmp_path / "run"), **options)
    halfbyte.export(run.path, tmp_path / "model", "hf")
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(logits(model), logits(halfbyte.load(run.path)[0]), rtol=0, atol=1e-5)
    with pytest.raises(UsageError, match="no adapter"):
        halfbyte.export(run.path, tmp_path / "no", "peft")


class Hub(ThreadingHTTPServer):
    """What `huggingface_hub` asks of a Hub to create a repository and upload a folder."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.created: list[dict[str, Any]] = []
        self.down = False
        self.private = True

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def _answer(self, body: Any, status: int = 200) -> None:
        text = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            found = b""
            while size := int(self.rfile.readline(), 16):
                found += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return found
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_GET(self) -> None:
        if self.server.down:
            return self._answer({"error": "down"}, 503)
        told = {"id": "me/model", "sha": "0" * 40, "siblings": [], "private": self.server.private}
        return self._answer(told)

    def do_POST(self) -> None:
        body = self._body()
        if self.server.down:
            self._answer({"error": "down"}, 503)
        elif self.path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            self._answer(
                {"url": f"{self.server.address}/me/model", "name": "me/model", "id": "me/model"}
            )
        elif "/preupload/" in self.path:
            # large files go another way, which is the client's business
            paths = [file["path"] for file in json.loads(body)["files"]]
            mode = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            self._answer({"files": [{"path": path, **mode} for path in paths]})
        elif "/commit/" in self.path:
            for line in body.splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    self.server.files[value["path"]] = base64.b64decode(value["content"])
            self._answer(
                {"commitUrl": f"{self.server.address}/me/model/commit/1", "commitOid": "1" * 40}
            )
        else:
            self._answer({"error": self.path}, 404)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import HfApi

    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(
        publish, "_api", lambda: HfApi(server.address, token="hf_none", library_name="halfbyte")
    )
    yield server
    server.shutdown()
    server.server_close()


def test_an_adapter_is_published_with_its_card(stories: Path, data: Path, tmp_path: Path, hub: Hub):
    run = halfbyte.train(
        str(stories),
        data,
        output_dir=str(tmp_path / "run"),
        max_steps=1,
        num_samples=0,
        push_to_hub=True,
        hub_model_id="me/model",
    )
    assert len(hub.created) == 1 and hub.created[0]["name"] == "model"
    assert hub.created[0].get("private") or hub.created[0].get("visibility") == "private"
    files = {file.name: file.read_bytes() for file in run.adapter.iterdir()}
    assert hub.files.keys() == files.keys() and "README.md" in files
    described = json.loads(hub.files.pop("adapter_config.json"))
    assert described["base_model_name_or_path"] == stories.name, "no path of this machine"
    assert not any(str(stories.parent).encode() in content for content in hub.files.values())
    for name, content in files.items():
        if name == "adapter_config.json":
            continue
        assert hashlib.sha256(hub.files[name]).digest() == hashlib.sha256(content).digest(), name


def test_exports_and_merges_are_published_by_their_verbs(
    run: halfbyte.Run, tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
):
    named = ["--push_to_hub", "true", "--hub_model_id", "me/model", "--hub_private_repo", "false"]
    assert (
        command(["export", str(run.path), "--to", "peft", "-o", str(tmp_path / "a"), *named]) == 0
    )
    assert hub.files.keys() == {file.name for file in (tmp_path / "a").iterdir()}
    assert "published: http://127.0.0.1" in capsys.readouterr().out
    hub.files.clear()
    assert command(["merge", str(run.path), "-o", str(tmp_path / "b"), *named]) == 0
    assert {"model.safetensors", "README.md", "merge.json"} <= hub.files.keys()
    assert not hub.created[-1].get("private") and hub.created[-1].get("visibility") != "private"


def test_a_hub_that_refuses_is_known_before_the_work_and_loses_nothing_after(
    stories: Path, data: Path, run: halfbyte.Run, tmp_path: Path, hub: Hub
):
    hub.down = True
    options: dict[str, Any] = {
        "push_to_hub": True,
        "hub_model_id": "me/model",
        "max_steps": 1,
        "num_samples": 0,
    }
    with pytest.raises(StorageError, match="before anything was done"):
        halfbyte.train(str(stories), data, output_dir=str(tmp_path / "run"), **options)
    assert not (tmp_path / "run" / "checkpoints").exists()
    with pytest.raises(StorageError) as caught:
        publish.publish(run.adapter, "me/model", "a message", "the command again")
    assert (
        "complete on this machine" in caught.value.what
        and "the command again" in caught.value.ways_out
    )
    with pytest.raises(UsageError, match="hub_model_id"):
        halfbyte.train(str(stories), data, push_to_hub=True)


def test_what_is_to_be_private_does_not_go_where_everybody_reads(hub: Hub):
    """The Hub leaves a repository that is there as it is, whatever is asked for."""
    assert publish.reserve("me/model", private=True) == "me/model"
    hub.private = False
    assert publish.reserve("me/model", private=False) == "me/model"
    with pytest.raises(UsageError, match="there already and public"):
        publish.reserve("me/model", private=True)


def test_every_format_is_one_everywhere():
    """The option, the table, and what the command line says of opening it."""
    option = get_args(ExportConfig.model_fields["to"].annotation)
    assert set(option) == set(FORMATS) == set(OPENS) == {*_WRITERS, "hf"}
