"""Make a tiny text encoder in the released layout: a T5 tokenizer trained on captions, a T5 encoder of random weights.

    python data_tools/make_demo_text.py LABELS DST --dim 64 --seed 0

Writes ``DST/tokenizer`` (sentencepiece unigram over ``LABELS/*.txt``) and ``DST/text_encoder`` (safetensors), which
``TextEncoder.load`` and diffusers' pipelines read. The encoder is random, not trained: it tells captions apart, so that
a small model can learn which caption goes with which clip, but it knows nothing of what words mean.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from cogvideo_dist.rng import fold_seed

MOST_PIECES = 8000
HEADS = 4
SENTINELS = 100


def train_tokenizer(captions: Sequence[str], folder: Path, *, length: int) -> int:
    """Write a T5 tokenizer of as many pieces as the captions support, up to ``MOST_PIECES``; returns its size."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(captions), model_writer=model, model_type="unigram", vocab_size=MOST_PIECES,
        hard_vocab_limit=False, character_coverage=1.0, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, pad_piece="<pad>",
        num_threads=1, minloglevel=2,
    )  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "spiece.model").write_bytes(model.getvalue())
    settings = {
        "tokenizer_class": "T5Tokenizer", "extra_ids": SENTINELS, "model_max_length": length,
        "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>",
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).get_piece_size() + SENTINELS


def make_encoder(folder: Path, *, vocabulary: int, dim: int, layers: int, seed: int) -> None:
    """Write a T5 v1.1 encoder whose weights are drawn from ``seed`` as T5's are before training."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=vocabulary, d_model=dim, d_kv=dim // HEADS, d_ff=2 * dim, num_layers=layers, num_heads=HEADS,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):  # transformers draws from torch's global generator
        torch.manual_seed(fold_seed(seed, "demo text encoder"))
        T5EncoderModel(config).save_pretrained(folder)


def read_captions(labels: Path) -> list[str]:
    """The captions of ``labels/*.txt`` in the order of their names."""
    captions = [path.read_text(encoding="utf-8").strip() for path in sorted(labels.glob("*.txt"))]
    if not any(captions):
        raise ValueError(f"{labels} holds no captions (*.txt); data_tools/make_demo_clips.py makes some")
    return captions


def make_text(
    labels: str | Path, folder: str | Path, *, dim: int = 64, layers: int = 2, length: int = 226, seed: int = 0
) -> None:
    """Write ``folder/tokenizer`` and ``folder/text_encoder``, which must not be there yet."""
    root = Path(folder)
    if dim < HEADS or dim % HEADS or layers < 1:
        raise ValueError(f"--dim must be a multiple of {HEADS} and --layers at least 1, found {dim} and {layers}")
    for name in ("tokenizer", "text_encoder"):
        if (root / name).exists():
            raise ValueError(f"{root / name} is already there; remove it or choose another folder")
    vocabulary = train_tokenizer(read_captions(Path(labels)), root / "tokenizer", length=length)
    make_encoder(root / "text_encoder", vocabulary=vocabulary, dim=dim, layers=layers, seed=seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("labels", metavar="LABELS", help="folder of captions, one .txt each")
    parser.add_argument("folder", metavar="DST", help="folder to write tokenizer/ and text_encoder/ into")
    parser.add_argument("--dim", type=int, default=64, help="features per token (text_dim)")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--length", type=int, default=226, help="tokens of a padded caption (text_length)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = vars(parser.parse_args())
    try:
        make_text(arguments.pop("labels"), arguments["folder"], **{k: v for k, v in arguments.items() if k != "folder"})
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
