"""Small models and tasks on which the laws of every technique are tried; seconds, not minutes."""

import torch
from torch import nn

from effkit.core.task import Batches, Task
from effkit.zoo.data import Windows
from effkit.zoo.diffusion import UNet, denoising
from effkit.zoo.gpt import GPT
from effkit.zoo.tasks import classification_loss, correct, language_loss
from effkit.zoo.vision import MLP, ResNet


def language_task(vocab: int = 64) -> Task:
    ids = torch.randint(vocab, (1200,), generator=torch.Generator().manual_seed(1))
    windows = Windows(ids, length=16, size=8, shuffle=True).first(15)
    return Task(
        "tokens",
        example=(ids[None, :16],),
        train=windows,
        calib=windows,
        val=windows,
        test=windows,
        loss=language_loss,
        per_example=next_token_losses,
    )


def next_token_losses(model: nn.Module, data) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat(
            [torch.nn.functional.cross_entropy(model(x).transpose(1, 2), y, reduction="none").mean(1) for x, y in data]
        )


def image_task(side: int = 28, channels: int = 1) -> Task:
    rng = torch.Generator().manual_seed(2)
    images, labels = torch.rand(48, channels, side, side, generator=rng), torch.randint(10, (48,), generator=rng)
    data = Batches(images, labels, size=16)
    return Task(
        "images",
        example=(images[:4],),
        train=data,
        calib=data,
        val=data,
        test=data,
        loss=classification_loss,
        per_example=correct,
    )


def gpt() -> nn.Module:
    torch.manual_seed(0)
    return GPT(vocab_size=64, d_model=32, layers=2, heads=4, kv_heads=2, d_ff=64, context=64).eval()


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return MLP((784, 32, 24, 10)).eval()


def resnet() -> nn.Module:
    torch.manual_seed(0)
    model = ResNet((4, 8), blocks=1)
    with torch.no_grad():  # statistics and scales that are not the initial ones, so that a lost one is noticed
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-0.2, 0.2)
                module.running_var.uniform_(0.5, 1.5)
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.2, 0.2)
    return model.eval()


def unet() -> nn.Module:
    torch.manual_seed(0)
    return UNet((8, 8, 16)).eval()


def noise_task() -> Task:
    rng = torch.Generator().manual_seed(2)
    images = torch.rand(48, 1, 28, 28, generator=rng), torch.randint(10, (48,), generator=rng)
    return denoising("noise", dict.fromkeys(("train", "val", "test"), images), size=16)


SUBJECTS = {
    "gpt": (gpt, language_task), "mlp": (mlp, image_task), "resnet": (resnet, image_task), "unet": (unet, noise_task),
}  # fmt: skip


def outputs(model: nn.Module, task: Task) -> torch.Tensor:
    with torch.no_grad():
        return model(*task.example)
