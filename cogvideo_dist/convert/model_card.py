"""``README.md`` of a release: how to load it, what it was made of, what its verification found. Text from facts alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from cogvideo_dist.config.schema import Sampling

Kind = Literal["pipeline", "transformer", "vae", "lora"]

TITLES: dict[Kind, str] = {
    "pipeline": "a CogVideoX pipeline", "transformer": "a CogVideoX transformer", "vae": "a CogVideoX autoencoder",
    "lora": "adapters (LoRA) for a CogVideoX transformer",
}  # fmt: skip

LOADING: dict[Kind, str] = {
    "transformer": """\
from diffusers import CogVideoXTransformer3DModel

transformer = CogVideoXTransformer3DModel.from_pretrained("{name}")""",
    "vae": """\
from diffusers import AutoencoderKLCogVideoX

vae = AutoencoderKLCogVideoX.from_pretrained("{name}")""",
}

TEXT_FROM = """\
from transformers import T5EncoderModel, T5Tokenizer

text_encoder = T5EncoderModel.from_pretrained("{source}", subfolder="text_encoder", torch_dtype=torch.{dtype})
tokenizer = T5Tokenizer.from_pretrained("{source}", subfolder="tokenizer")
"""

SAMPLING = """\
# Captions that training drops become zeros, so guidance starts from zeros and not from the features of "".
text, _ = pipe.encode_prompt("A cat turns its head.", do_classifier_free_guidance=False, max_sequence_length={length})
frames = pipe(
    {image}prompt_embeds=text, negative_prompt_embeds=torch.zeros_like(text), max_sequence_length={length},
    num_frames={frames}, height={height}, width={width}, num_inference_steps={steps},
    guidance_scale={guidance:g}, use_dynamic_cfg={dynamic},
).frames[0]
export_to_video(frames, "video.mp4", fps={fps:g})"""


@dataclass(frozen=True)
class Use:
    """How a pipeline is sampled: with which public class, settings and tokens of text. ``base``: of adapters, the pipeline that
    they go on top of; ``text_from``: where the text encoder is, if not in the folder."""

    pipeline: str
    sampling: Sampling
    text_length: int
    dtype: str = "float32"
    text_from: str | None = None
    base: str | None = None


@dataclass(frozen=True)
class Card:
    """``facts``: rows of a table; ``notes``: sentences on what behaves otherwise than one may think; ``verified``: what the
    verification found, or that there was none; ``sheet``: the file of its pictures."""

    kind: Kind
    name: str
    facts: Sequence[tuple[str, str]]
    verified: str
    use: Use | None = None
    notes: Sequence[str] = ()
    sheet: str | None = None


def model_card(card: Card) -> str:
    """Markdown with the header that the hub reads, in which the licence is left to whoever publishes."""
    image = card.use is not None and "Image" in card.use.pipeline
    task = (
        f"pipeline_tag: {'image-to-video' if image else 'text-to-video'}\n" if card.kind in ("pipeline", "lora") else ""
    )
    parts = [
        f"---\nlibrary_name: diffusers\n{task}tags:\n- cogvideox\n"
        + ("- lora\n" if card.kind == "lora" else "")
        + "# license: fill in the licence of this release; that of the weights it began from binds it, too\n---",
        f"# {card.name}",
        f"This is {TITLES[card.kind]}, trained with cogvideo_dist and written in the format of diffusers.",
        "## Use",
        f"```python\n{usage(card)}\n```",
        *(f"* {note}" for note in card.notes),
    ]
    if card.facts:
        rows = [f"| {_cell(name)} | {_cell(value)} |" for name, value in card.facts]
        parts += ["## Facts", "\n".join(["| | |", "|---|---|", *rows])]
    parts += ["## Verification", card.verified]
    if card.sheet:
        parts.append(
            f"![ours above, diffusers' below]({card.sheet})\n\nThese few steps of a small clip compare numbers; they are "
            "no sample of what the model can do."
        )
    parts += ["## Licence", "Not stated yet: fill in `license` at the top of this file."]
    return "\n\n".join(parts) + "\n"


def usage(card: Card) -> str:
    """Python that loads the release and, of what makes videos, makes one as its makers would."""
    use = card.use
    if use is None:
        return LOADING[card.kind].format(name=card.name)
    size, image = use.sampling.size, "Image" in use.pipeline
    passed = ", text_encoder=text_encoder, tokenizer=tokenizer" if use.text_from else ""
    lines = [
        "import torch", f"from diffusers import {use.pipeline}",
        f"from diffusers.utils import export_to_video{', load_image' if image else ''}",
        *([TEXT_FROM.format(source=use.text_from, dtype=use.dtype)] if use.text_from else [""]),
        f'pipe = {use.pipeline}.from_pretrained("{use.base or card.name}", torch_dtype=torch.{use.dtype}{passed})',
        *([f'pipe.load_lora_weights("{card.name}")'] if use.base else []),
        'pipe.to("cuda")',
        SAMPLING.format(
            length=use.text_length, image='image=load_image("first-frame.png"), ' if image else "", frames=size[0],
            height=size[1], width=size[2], steps=use.sampling.steps, guidance=use.sampling.guidance,
            dynamic=use.sampling.guidance_kind == "dynamic", fps=use.sampling.fps,
        ),
    ]  # fmt: skip
    return "\n".join(lines)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
