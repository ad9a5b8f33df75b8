"""How different two clips look: LPIPS (Zhang et al. 2018, arXiv 1801.03924) over frames, summed.

The ``lpips`` package (extra ``vae``) brings the networks and the weights of their layers' differences. Its backbone comes
from a file of torchvision's, never over the network.

Legend: B batch, T H W frames, height, width.
"""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cogvideo_dist.models.vae_blocks import frames_as_batch
from cogvideo_dist.rng import fold

SMALLEST = {"vgg": 16, "alex": 31, "squeeze": 17}
"""Backbone -> the least height and width that its poolings leave something of."""

RANDOM = "random"
TINY = 1e-10  # as the package's, which keeps the direction of a zero vector finite


class Perceptual(nn.Module):
    """LPIPS of frames; frozen, and without dropout, so always in evaluation. Differentiable with respect to both clips.

    ``net`` is "vgg" (what losses use), "alex" or "squeeze". ``weights`` is a file of that torchvision model
    (.safetensors, or .pth such as vgg16-397923af.pth; classifiers are ignored), or "random" for a backbone drawn from
    ``seed``, which tests distances of pictures without knowing what they show. ``chunk`` frames at a time are computed, and
    computed again in backward, so memory does not grow with the clip.
    """

    def __init__(self, net: str = "vgg", *, weights: str | Path, seed: int = 0, chunk: int = 4) -> None:
        super().__init__()
        if net not in SMALLEST:
            raise ValueError(f'no perceptual network "{net}"; there are {", ".join(SMALLEST)}')
        if importlib.util.find_spec("lpips") is None:
            raise ValueError('LPIPS needs the lpips package, which is not installed: pip install "cogvideo_dist[vae]"')
        if chunk < 1:
            raise ValueError(f"the perceptual loss's chunk is {chunk} frames; it must be at least 1")
        self.net, self.chunk = net, chunk
        network = _network(net)
        wanted = {name: parameter.shape for name, parameter in network.named_parameters()}
        found = _linear_weights(net, wanted)
        found |= _drawn(wanted, seed) if weights == RANDOM else _backbone(Path(weights), net, wanted)
        # Not strict: the package holds its linear layers under two names each.
        network.load_state_dict(found, strict=False, assign=True)
        self.network: Any = network.eval().requires_grad_(False)

    def forward(self, output: Tensor, video: Tensor) -> Tensor:
        """Two clips [B, 3, T, H, W] in [-1, 1] -> the sum of their frames' distances [B].

        Computed in the network's precision, which is float32 unless moved, whatever that of the clips.
        Raises ValueError where frames are smaller than the backbone takes.
        """
        if output.shape != video.shape or output.ndim != 5:
            raise ValueError(
                f"clips of shapes {list(output.shape)} and {list(video.shape)}; "
                "both must be [batch, 3, frames, height, width]"
            )
        least = SMALLEST[self.net]
        if min(output.shape[3:]) < least:
            raise ValueError(
                f"frames of {output.shape[3]}x{output.shape[4]} pixels; the perceptual network {self.net} takes "
                f"{least}x{least} and more"
            )
        pieces = zip(frames_as_batch(output).split(self.chunk), frames_as_batch(video).split(self.chunk))
        # The networks draw nothing, so that no state of a generator need be kept.
        distances = [checkpoint(self._distance, a, b, use_reentrant=False, preserve_rng_state=False) for a, b in pieces]
        return torch.cat(distances).unflatten(0, (output.shape[0], -1)).sum(1)

    def _distance(self, output: Tensor, video: Tensor) -> Tensor:
        """Pictures [N, 3, H, W] twice -> [N]: the weighted squared difference of directions, averaged over places."""
        first, second = (self._features(x) for x in (output, video))
        layers = [linear((a - b).square()).mean((1, 2, 3)) for a, b, linear in zip(first, second, self.network.lins)]
        return torch.stack(layers).sum(0)

    def _features(self, x: Tensor) -> list[Tensor]:
        dtype = next(self.parameters()).dtype
        return [_direction(layer) for layer in self.network.net(self.network.scaling_layer(x.to(dtype)))]


def _direction(x: Tensor) -> Tensor:
    """Unit vectors along channels; zero where there is nothing.

    The package's own takes the square root of zero there, whose gradient is not a number.
    """
    power = x.square().sum(1, keepdim=True)
    return x / (power.clamp_min(TINY**2).sqrt() + TINY)


def _network(net: str) -> nn.Module:
    """The package's network, without weights and without having drawn any."""
    import lpips  # type: ignore[import-untyped]

    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the package calls torchvision by an older name of its argument
        return lpips.LPIPS(net=net, pretrained=False, pnet_rand=True, use_dropout=False, verbose=False)


def _linear_weights(net: str, wanted: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """The weights of the layers' differences, which the package brings (version 0.1)."""
    import lpips

    state = _read(Path(lpips.__file__).parent / "weights" / "v0.1" / f"{net}.pth")
    # Index 1 in the file, after the dropout that is left out here.
    return {name: state[name.replace(".model.0.", ".model.1.")] for name in wanted if name.startswith("lin")}


def _backbone(path: Path, net: str, wanted: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(
            f"the perceptual network's weights {path} are no file; give torchvision's {net} as .safetensors or .pth"
        )
    state, found = _read(path), {}
    for name, shape in wanted.items():
        if not name.startswith("net."):
            continue
        foreign = _foreign(name)
        if foreign not in state or state[foreign].shape != shape:
            have = list(state[foreign].shape) if foreign in state else "nothing"
            raise ValueError(f"{path} has {have} as {foreign}; {net} needs {list(shape)}. Is it torchvision's {net}?")
        found[name] = state[foreign].float()
    return found


def _drawn(wanted: Mapping[str, torch.Size], seed: int) -> dict[str, Tensor]:
    """He et al. 2015: variances 2/fan-in, biases zero."""
    found = {}
    for name, shape in wanted.items():
        if name.startswith("net."):
            std = math.sqrt(2 / math.prod(shape[1:])) if len(shape) > 1 else 0.0
            found[name] = torch.randn(list(shape), generator=fold(seed, "perceptual", _foreign(name))) * std
    return found


def _foreign(name: str) -> str:
    """torchvision's name: net.slice4.17.weight is features.17.weight."""
    return "features." + name.split(".", 2)[2]


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    if path.suffix != ".pth":
        raise ValueError(f"{path}: weights of the perceptual network are .safetensors or .pth")
    return torch.load(path, map_location="cpu", weights_only=True)
