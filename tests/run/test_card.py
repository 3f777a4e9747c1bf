"""Tests of `run.card`."""

from halfbyte.run.directory import Run

from ..helpers import front_matter


def test_the_adapter_has_a_card(trained_run: Run):
    text = (trained_run.adapter / "README.md").read_text()
    info = trained_run.info()
    assert front_matter(text) == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["halfbyte", "lora", "qlora"],
    }, "the built-in model has no name on the Hub"
    for fact in (
        info["base"]["digest"],
        info["data"]["sha256"],
        info["template_sha256"],
        "PeftModel.from_pretrained",
    ):
        assert fact in text
    assert "70 rows" in text and "held-out loss" in text and "r 16, alpha 32" in text
