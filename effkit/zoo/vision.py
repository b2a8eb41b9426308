"""Three classifiers of 28 x 28 images: an MLP, Deep Compression's LeNet-300-100, and a small residual network."""

from itertools import pairwise

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from effkit.core.checkpoint import stored


@stored
class MLP(nn.Module):
    """Fully connected layers with ReLU between: widths (784, 800, 800, 10) has the size of the student of Hinton
    et al. 2015 (their teacher had 1,200 units a layer), (784, 300, 100, 10) is the LeNet-300-100 of LeCun et al. 1998 and Han et al. 2015."""

    def __init__(self, widths: tuple[int, ...] = (784, 800, 800, 10)):
        super().__init__()
        self.widths = tuple(widths)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(self.widths))

    def forward(self, x: Float[Tensor, "b ..."]) -> Float[Tensor, "b classes"]:
        x = x.flatten(1)
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class ResidualBlock(nn.Module):
    """x + f(x), with a projection where shape changes (He et al. 2015, arXiv:1512.03385, fig. 2, option B)."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        same = inputs == outputs and stride == 1
        self.shortcut = (
            nn.Identity()
            if same
            else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        )

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


@stored
class ResNet(nn.Module):
    """A CIFAR-style residual network for small images: a stem, one stage a width, global average pooling, a classifier."""

    def __init__(self, widths: tuple[int, ...] = (32, 64, 128), blocks: int = 1, channels: int = 1, classes: int = 10):
        super().__init__()
        self.widths, self.blocks, self.channels, self.classes = tuple(widths), blocks, channels, classes
        self.stem = nn.Conv2d(channels, widths[0], 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(widths[0])
        stages: list[nn.Module] = []
        inputs = widths[0]
        for stage, width in enumerate(widths):
            for block in range(blocks):
                stages.append(ResidualBlock(inputs, width, stride=2 if stage and block == 0 else 1))
                inputs = width
        self.stages = nn.Sequential(*stages)
        self.classifier = nn.Linear(inputs, classes)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b classes"]:
        x = self.stages(F.relu(self.norm(self.stem(x))))
        return self.classifier(x.mean(dim=(2, 3)))
