"""A release's README: a header that the hub reads, every fact, and lines that load it."""

from __future__ import annotations

import ast
import re
from dataclasses import replace

import pytest
import yaml

from cogvideo_dist.config.schema import Sampling
from cogvideo_dist.convert.model_card import Card, Use, model_card, usage

USE = Use("CogVideoXPipeline", Sampling(40, "ddim", 5.5, "dynamic", (49, 480, 720), 8.0), 226, "bfloat16")
CARD = Card(
    "pipeline", "my-model", [("Steps", "1,000"), ("a|b", "two\nlines")], "forward 1e-9", USE, ["A note."], "sheet.png"
)


def header(card: Card) -> dict[str, object]:
    text = model_card(card)
    assert text.startswith("---\n")
    return yaml.safe_load(text.split("---\n")[1])


def test_the_header_names_library_and_task_and_leaves_the_licence_open() -> None:
    assert header(CARD) == {"library_name": "diffusers", "pipeline_tag": "text-to-video", "tags": ["cogvideox"]}
    image = replace(CARD, kind="lora", use=replace(USE, pipeline="CogVideoXImageToVideoPipeline", base="a/b"))
    assert header(image) == {
        "library_name": "diffusers", "pipeline_tag": "image-to-video", "tags": ["cogvideox", "lora"]
    }  # fmt: skip
    assert "pipeline_tag" not in header(Card("vae", "my-vae", [], "Not verified."))
    assert "# license: fill in" in model_card(CARD)


def test_facts_notes_and_verdict_are_there() -> None:
    text = model_card(CARD)
    for part in ("| Steps | 1,000 |", "| a\\|b | two lines |", "\n* A note.\n", "forward 1e-9", "](sheet.png)"):
        assert part in text, part


@pytest.mark.parametrize("card", [
    CARD,
    replace(CARD, use=replace(USE, pipeline="CogVideoXImageToVideoPipeline", text_from="THUDM/CogVideoX-5b")),
    replace(CARD, kind="lora", use=replace(USE, base="THUDM/CogVideoX-5b")),
    Card("transformer", "my-dit", [], "-"),
    Card("vae", "my-vae", [], "-"),
])  # fmt: skip
def test_its_lines_are_python_that_names_the_release(card: Card) -> None:
    code = re.search(r"```python\n(.*?)```", model_card(card), re.DOTALL)
    assert code is not None and code[1].strip() == usage(card)
    ast.parse(code[1])
    assert f'"{card.name}"' in code[1]
