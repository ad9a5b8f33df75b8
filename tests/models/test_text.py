from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from diffusers import CogVideoXPipeline
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import T5EncoderModel, T5Tokenizer

from cogvideo_dist.models.text import TextEncoder
from data_tools.make_demo_text import make_text

LENGTH, DIM = 24, 32
CAPTIONS = (
    "The camera slowly pans right over a red coffee cup on a wooden table.",
    "A tabby cat with green eyes, while the camera zooms in.",
    "A white rocket on its launch pad at dusk, while the camera tilts up.",
    "The camera quickly zooms out from a man filming with a camera on a tripod.",
    "Rows of old coins.",
)
LONG = " ".join(CAPTIONS)
ODD = ("", "  two   spaces ", "Émigré … ＦＵＬＬ width", "日本語 never seen", "a\nb\tc")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("text")
    labels = root / "labels"
    labels.mkdir()
    for index, caption in enumerate(CAPTIONS):
        (labels / f"{index}.txt").write_text(caption)
    make_text(labels, root, dim=DIM)
    return root


@pytest.fixture(scope="module")
def encoder(folder: Path) -> TextEncoder:
    return TextEncoder.load(folder, length=LENGTH)


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def like_released(tokenizer: Path) -> None:
    """Give a folder the four files of the released tokenizers, sentinels listed in each."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer / "spiece.model")).get_piece_size()
    ids = {f"<extra_id_{i}>": pieces + 99 - i for i in range(100)}
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    added = {"<pad>": 0, "</s>": 1, "<unk>": 2, **ids}
    config = {
        **special,
        "added_tokens_decoder": {str(i): {"content": token, **plain} for token, i in added.items()},
        "additional_special_tokens": list(ids),
        "clean_up_tokenization_spaces": True,
        "extra_ids": 100,
        "legacy": True,
        "model_max_length": 226,
        "sp_model_kwargs": {},
        "tokenizer_class": "T5Tokenizer",
    }
    named = {key: {"content": token, **plain} for key, token in special.items()}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(config))
    (tokenizer / "special_tokens_map.json").write_text(json.dumps({"additional_special_tokens": list(ids), **named}))
    (tokenizer / "added_tokens.json").write_text(json.dumps(ids))


def test_features_equal_diffusers_bitwise(folder: Path, encoder: TextEncoder) -> None:
    pipeline: Any = CogVideoXPipeline(
        tokenizer=T5Tokenizer.from_pretrained(folder / "tokenizer"),
        text_encoder=T5EncoderModel.from_pretrained(folder / "text_encoder"),
        vae=None,
        transformer=None,
        scheduler=None,
    )
    captions = [*CAPTIONS, *ODD, LONG]
    with torch.no_grad():
        expected, _ = pipeline.encode_prompt(captions, do_classifier_free_guidance=False, max_sequence_length=LENGTH)
    found = encoder.encode(captions)
    assert found.shape == (len(captions), LENGTH, DIM)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("layout", ["released", "tokenizer.json"])
def test_tokenizer_layouts_give_the_same_features(copy: Path, encoder: TextEncoder, layout: str) -> None:
    tokenizer = copy / "tokenizer"
    if layout == "released":
        like_released(tokenizer)
    else:
        T5Tokenizer.from_pretrained(tokenizer).save_pretrained(tokenizer)
        (tokenizer / "spiece.model").unlink()
        assert (tokenizer / "tokenizer.json").is_file()
    captions = [*CAPTIONS, *ODD, LONG]
    assert torch.equal(TextEncoder.load(copy, length=LENGTH).encode(captions), encoder.encode(captions))


def test_tokens_equal_sentencepiece(folder: Path, encoder: TextEncoder) -> None:
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer" / "spiece.model"))
    assert (pieces.pad_id(), pieces.eos_id(), pieces.unk_id()) == (0, 1, 2)
    for caption in (*CAPTIONS, *ODD, LONG):
        expected = [*pieces.encode(caption), 1]
        assert encoder.tokenizer(caption, verbose=False).input_ids == expected
        assert encoder.token_count(caption) == len(expected)


def test_long_captions_are_cut_and_keep_their_end_token(encoder: TextEncoder) -> None:
    ids = encoder.tokenizer(LONG, verbose=False).input_ids
    assert encoder.token_count(LONG) == len(ids) > LENGTH
    with torch.no_grad():
        expected = encoder.t5(torch.tensor([[*ids[: LENGTH - 1], 1]]))[0]
    assert torch.equal(encoder.encode([LONG]), expected)


def test_padding_is_attended_to(encoder: TextEncoder) -> None:
    count = encoder.token_count(CAPTIONS[4])
    mask = (torch.arange(LENGTH) < count).long()[None]
    ids = encoder.tokenizer(CAPTIONS[4], padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids
    with torch.no_grad():
        masked = encoder.t5(ids, attention_mask=mask)[0]
        unmasked = encoder.t5(ids, attention_mask=torch.ones_like(mask))[0]
    found = encoder.encode([CAPTIONS[4]])
    torch.testing.assert_close(found, unmasked)
    assert (found - masked)[:, :count].abs().max() > 1e-2


def test_captions_have_clearly_different_features(encoder: TextEncoder) -> None:
    features = encoder.encode(CAPTIONS).flatten(1)
    distance = torch.cdist(features, features) / features.norm(dim=1)
    assert distance[~torch.eye(len(CAPTIONS), dtype=torch.bool)].min() > 0.3


def test_unconditional_features_are_zeros(encoder: TextEncoder) -> None:
    assert torch.equal(encoder.unconditional(3), torch.zeros(3, LENGTH, DIM))
    assert encoder.encode([""]).abs().max() > 0.1


def test_encoder_stays_frozen_inside_a_training_parent(encoder: TextEncoder) -> None:
    parent = nn.Sequential(encoder).train()
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in parent.parameters())
    first, second = encoder.encode(CAPTIONS), encoder(CAPTIONS)
    assert torch.equal(first, second) and not first.requires_grad


def test_dtype_is_that_of_the_features(folder: Path, encoder: TextEncoder) -> None:
    double = TextEncoder.load(folder, length=LENGTH, dtype=torch.float64)
    assert double.dim == DIM and double.encode(CAPTIONS).dtype == double.unconditional(1).dtype == torch.float64
    torch.testing.assert_close(double.encode(CAPTIONS).float(), encoder.encode(CAPTIONS), atol=1e-5, rtol=1e-5)


def test_the_seed_alone_decides_the_demo_encoder(folder: Path, tmp_path: Path) -> None:
    make_text(folder / "labels", tmp_path / "same", dim=DIM)
    make_text(folder / "labels", tmp_path / "other", dim=DIM, seed=1)
    for name in ("tokenizer/spiece.model", "text_encoder/model.safetensors"):
        assert (tmp_path / "same" / name).read_bytes() == (folder / name).read_bytes()
    weights = "text_encoder/model.safetensors"
    assert (tmp_path / "other" / weights).read_bytes() != (folder / weights).read_bytes()
    with pytest.raises(ValueError, match="already there"):
        make_text(folder / "labels", folder)
    with pytest.raises(ValueError, match="holds no captions"):
        make_text(tmp_path, tmp_path / "none")


def test_pickled_weights_are_refused(copy: Path) -> None:
    (copy / "text_encoder" / "model.safetensors").rename(copy / "text_encoder" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="text_encoder holds weights as .bin, a pickle"):
        TextEncoder.load(copy, length=LENGTH)


def test_missing_files_are_named(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="absent/text_encoder: no such folder"):
        TextEncoder.load(tmp_path / "absent", length=LENGTH)
    (copy / "tokenizer" / "spiece.model").unlink()
    with pytest.raises(ValueError, match="copy/tokenizer has neither spiece.model nor tokenizer.json"):
        TextEncoder.load(copy, length=LENGTH)
    (copy / "tokenizer" / "spiece.model").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match="spiece.model is a Git LFS pointer"):
        TextEncoder.load(copy, length=LENGTH)
    index = {
        "metadata": {},
        "weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"},
    }
    (copy / "text_encoder" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="has no model-00001-of-00002.safetensors, model-00002-of-00002.safetensors"):
        TextEncoder.load(copy, length=LENGTH)
    (copy / "text_encoder" / "config.json").unlink()
    with pytest.raises(ValueError, match="text_encoder has no config.json"):
        TextEncoder.load(copy, length=LENGTH)


def test_weights_that_do_not_fit_are_refused(copy: Path) -> None:
    path = copy / "text_encoder" / "model.safetensors"
    weights = load_file(path)
    lacking = "encoder.block.1.layer.1.DenseReluDense.wo.weight"
    save_file({name: value for name, value in weights.items() if name != lacking}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"the weights lack {lacking}"):
        TextEncoder.load(copy, length=LENGTH)


def test_a_tokenizer_of_another_model_is_refused(copy: Path) -> None:
    path = copy / "tokenizer" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "extra_ids": 200}))
    with pytest.raises(ValueError, match="take both folders from the same release"):
        TextEncoder.load(copy, length=LENGTH)


def test_import_needs_torch_alone() -> None:
    heavy = ("transformers", "sentencepiece", "diffusers", "safetensors", "PIL", "av")
    code = f"import sys, cogvideo_dist.models.text; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
