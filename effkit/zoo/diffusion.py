"""A small diffusion model of digits: a U-Net that names the noise in an image, and how an image is drawn with it.

An image is mixed with noise, x_t = sqrt(a) x + sqrt(1 - a) e, and the model is asked for e (Ho et al. 2020,
arXiv:2006.11239, eq. 14). Drawing begins with noise and takes a little of it away, again and again: DDIM's steps
(Song et al. 2020, arXiv:2010.02502, eq. 12, without noise of their own), on the cosine schedule of Nichol & Dhariwal
2021 (arXiv:2102.09672, eq. 17).

How much noise there is enters as a second channel, constant over the image, so that the model has one input like others.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from effkit.core.checkpoint import stored
from effkit.core.checks import require_int
from effkit.core.task import Batch, Batches, Score, Task
from effkit.zoo.data import Split

BANDS = 16  # pairs of waves that spell the time


class NormedBlock(nn.Module):
    """x + f(x) as in ResNets, with group norms, and the time added between the convolutions."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.time = nn.Linear(2 * BANDS, outputs)
        self.norm2, self.conv2 = nn.GroupNorm(8, outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.shortcut = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Float[Tensor, "b c h w"], time: Float[Tensor, " b"]) -> Float[Tensor, "b d h w"]:
        y = self.conv1(F.silu(self.norm1(x))) + self.time(waves(time))[:, :, None, None]
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(y)))


@stored
class Depths(nn.Module):
    """What a U-Net does below its first resolution: two levels down, and up again."""

    def __init__(self, top: int, middle: int, bottom: int):
        super().__init__()
        self.top, self.middle, self.bottom = top, middle, bottom
        self.down1, self.down2 = NormedBlock(top, middle), NormedBlock(middle, bottom)
        self.mid, self.up = NormedBlock(bottom, bottom), NormedBlock(bottom + middle, middle)

    def forward(self, x: Float[Tensor, "b c h w"], time: Float[Tensor, " b"]) -> Float[Tensor, "b d h w"]:
        x = self.down1(F.avg_pool2d(x, 2), time)
        y = self.mid(self.down2(F.avg_pool2d(x, 2), time), time)
        return F.interpolate(self.up(torch.cat((F.interpolate(y, scale_factor=2.0), x), 1), time), scale_factor=2.0)


@stored
class UNet(nn.Module):
    """Image and time in, noise out (Ronneberger et al. 2015, arXiv:1505.04597, fig. 1, made small)."""

    def __init__(self, widths: tuple[int, ...] = (16, 48, 96)):
        super().__init__()
        self.widths = tuple(widths)
        self.stem, self.down = nn.Conv2d(1, widths[0], 3, padding=1), NormedBlock(widths[0], widths[0])
        self.depths = Depths(*widths)
        self.up, self.norm = NormedBlock(widths[1] + widths[0], widths[0]), nn.GroupNorm(8, widths[0])
        self.head = nn.Conv2d(widths[0], 1, 3, padding=1)

    def forward(self, x: Float[Tensor, "b 2 h w"]) -> Float[Tensor, "b 1 h w"]:
        """The noise in x[:, :1], where x[:, 1] is the time, 0 for an image, 1 for noise."""
        time = x[:, 1, 0, 0]
        shallow = self.down(self.stem(x[:, :1]), time)
        x = self.up(torch.cat((self.depths(shallow, time), shallow), 1), time)
        return self.head(F.silu(self.norm(x)))


def waves(time: Float[Tensor, " b"]) -> Float[Tensor, "b waves"]:
    """A time in [0, 1] as sines and cosines, from half a wave over all of it to some 500."""
    angles = time.float()[:, None] * math.pi * 1000 ** torch.linspace(0, 1, BANDS, device=time.device)
    return torch.cat((angles.sin(), angles.cos()), 1).to(time.dtype)


def signal(time: Tensor) -> Tensor:
    """a of a time: the share of the image in the variance, from 1 down to nearly 0."""
    return torch.cos((time * 0.992 + 0.008) / 1.008 * math.pi / 2).square()


def timed(x: Float[Tensor, "b 1 h w"], time: Float[Tensor, " b"]) -> Float[Tensor, "b 2 h w"]:
    """Images with their time as a second channel."""
    return torch.cat((x, time.to(x.dtype)[:, None, None, None].expand_as(x)), 1)


@dataclass(frozen=True)
class Noised(Batches):
    """Batches of images, scaled to [-1, 1], each mixed with noise at a time of its own, afresh at each step; the targets
    are the noise."""

    def at(self, step: int) -> Batch:
        images, _ = super().at(step)
        rng = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        noise, time = torch.randn(images.shape, generator=rng), torch.rand(len(images), generator=rng)
        a = signal(time)[:, None, None, None]
        return timed(a.sqrt() * (2 * images - 1) + (1 - a).sqrt() * noise, time), noise


@torch.no_grad()
def draw(
    model: nn.Module, n: int, *, steps: int = 50, rng: torch.Generator | None = None, size: int = 28
) -> Float[Tensor, "n 1 size size"]:
    """n images in [0, 1], from noise in `steps` passes of the model (DDIM, eta = 0)."""
    require_int("n", n, 1)
    require_int("steps", steps, 1, hint="each is a pass of the model")
    like = next(model.parameters())
    x = torch.randn(n, 1, size, size, generator=rng).to(like.device, like.dtype)
    times = torch.linspace(1, 0, steps + 1).tolist()
    for now, then in tqdm(zip(times, times[1:], strict=False), total=steps, desc="drawing", leave=False, delay=2):
        a, b = signal(torch.tensor(now)), signal(torch.tensor(then))
        noise = model(timed(x, torch.full((n,), now, device=x.device)))
        image = ((x - (1 - a).sqrt() * noise) / a.sqrt()).clamp(-1, 1)
        noise = (x - a.sqrt() * image) / (1 - a).sqrt()
        x = b.sqrt() * image + (1 - b).sqrt() * noise
    return (image + 1) / 2


def denoising(name: str, splits: dict[str, Split], *, size: int = 64) -> Task:
    """Images, noised; scored by the mean square of what is wrong in the noise, 1 where nothing is known."""
    noised = {key: Noised(*split, size=size, shuffle=key == "train") for key, split in splits.items()}
    return Task(
        name, example=(noised["val"].at(0)[0][:8],), calib=noised["train"].first(512), loss=denoising_loss,
        per_example=noise_left, score=Score("mean squared error", "", "lower"), **noised,
    )  # fmt: skip


def denoising_loss(outputs: Float[Tensor, "b 1 h w"], batch: Batch) -> Float[Tensor, ""]:
    return F.mse_loss(outputs.float(), batch[1])


@torch.no_grad()
def noise_left(model: nn.Module, data: Batches) -> Float[Tensor, " n"]:
    return torch.cat([(model(x).float() - noise).square().mean((1, 2, 3)) for x, noise in data])
