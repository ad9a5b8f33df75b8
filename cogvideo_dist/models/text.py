"""The frozen T5 encoder that turns captions into text features, from a released (diffusers) folder.

Captions are padded to a fixed length and encoded without an attention mask, so padding is attended to, as the released
models were trained. Unconditional features are zeros, as in training; encoding "" is another thing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import T5EncoderModel, T5Tokenizer


class TextEncoder(nn.Module):
    """Captions -> features [B, length, dim]; always in evaluation mode and without gradients."""

    def __init__(self, t5: T5EncoderModel, tokenizer: T5Tokenizer, *, length: int) -> None:
        super().__init__()
        if length < 1:
            raise ValueError(f"the text length must be at least 1 token, found {length}")
        self.t5 = t5.requires_grad_(False)
        self.tokenizer = tokenizer
        self.length = length
        self.dim: int = t5.config.d_model
        self.train(False)

    @classmethod
    def load(
        cls, folder: str | Path, *, length: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> TextEncoder:
        """Read ``folder/text_encoder`` (config.json, safetensors) and ``folder/tokenizer`` (spiece.model)."""
        from transformers import T5EncoderModel, T5Tokenizer

        encoder, words = Path(folder) / "text_encoder", Path(folder) / "tokenizer"
        check_encoder(encoder)
        check_tokenizer(words)
        tokenizer = T5Tokenizer.from_pretrained(words, local_files_only=True)
        loaded: Any = T5EncoderModel.from_pretrained(
            encoder, dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
        t5, found = loaded
        if found["missing_keys"]:
            raise ValueError(
                f"{encoder}: the weights lack {', '.join(sorted(found['missing_keys']))}; copy the folder again"
            )
        if len(tokenizer) > t5.config.vocab_size:
            raise ValueError(
                f"{words} knows {len(tokenizer)} tokens, but {encoder} embeds {t5.config.vocab_size}; "
                "take both folders from the same release"
            )
        return cls(t5.to(device), tokenizer, length=length)

    def train(self, mode: bool = True) -> TextEncoder:
        """Stays in evaluation mode whatever ``mode``: a parent's ``train()`` must not switch dropout on."""
        return super().train(False)

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> Tensor:
        """B captions -> features [B, length, dim]; longer ones are cut at ``length`` tokens, the end token included."""
        tokens = self.tokenizer(
            list(captions), padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        )
        features: Tensor = self.t5(tokens.input_ids.to(self.t5.device))[0]
        return features.to(self.t5.dtype)

    forward = encode

    def unconditional(self, count: int) -> Tensor:
        """The features of ``count`` dropped captions: zeros [count, length, dim]."""
        return torch.zeros(count, self.length, self.dim, dtype=self.t5.dtype, device=self.t5.device)

    def token_count(self, caption: str) -> int:
        """Tokens of a caption before it is cut, the end token included."""
        return len(self.tokenizer(caption, verbose=False).input_ids)


def check_encoder(folder: Path) -> None:
    """Refuse a ``text_encoder/`` folder that is not there, not complete or not in safetensors."""
    _check_folder(folder, "config.json")
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    needed = {single}
    if index.is_file():
        needed = {folder / name for name in json.loads(index.read_text())["weight_map"].values()}
    missing = sorted(path.name for path in needed if not path.is_file())
    if not missing:
        return
    if any(folder.glob("*.bin")):
        raise ValueError(
            f"{folder} holds weights as .bin, a pickle that can run code when it is read; "
            "take the release with safetensors, or convert it once with save_pretrained(..., safe_serialization=True)"
        )
    raise ValueError(f"{folder} has no {', '.join(missing)}; copy the whole text_encoder folder of the released model")


def check_tokenizer(folder: Path) -> None:
    """Refuse a ``tokenizer/`` folder without a vocabulary: transformers would make up one that knows no words."""
    _check_folder(folder)
    names = ("spiece.model", "tokenizer.json")
    if not any((folder / name).is_file() for name in names):
        raise ValueError(
            f"{folder} has neither {' nor '.join(names)}; copy the whole tokenizer folder of the released model"
        )
    for name in names:
        path = folder / name
        if path.is_file() and path.read_bytes()[:8] == b"version ":
            raise ValueError(f"{path} is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`")


def _check_folder(folder: Path, *files: str) -> None:
    if not folder.is_dir():
        raise ValueError(
            f"{folder}: no such folder; a text encoder's folder holds text_encoder/ and tokenizer/, as a released "
            "diffusers folder does"
        )
    for name in files:
        if not (folder / name).is_file():
            raise ValueError(f"{folder} has no {name}; copy the whole folder of the released model")
