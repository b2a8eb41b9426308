"""The shipped checkpoints, one entry each."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from effkit import zoo
from effkit.core.task import Batches, Task
from effkit.core.training import Schedule
from effkit.studies.train import Recipe, compiled_language_loss
from effkit.zoo.data import Jittered, Windows, mnist, stdlib_tests, stdlib_text
from effkit.zoo.diffusion import UNet, denoising
from effkit.zoo.gpt import GPT
from effkit.zoo.tasks import classification_loss
from effkit.zoo.tokens import encode, shipped_tokenizer
from effkit.zoo.vision import MLP, ResNet


def stdlib_training(length: int, seed: int) -> Task:
    """The training modules twice an epoch, for they are what is scored, and the `test` package once: with the modules
    alone (3 M tokens for 4.7 M parameters) the model learned them by heart."""
    modules = stdlib_text("train")
    ids = encode(shipped_tokenizer(), (*modules, *stdlib_tests(), *modules))
    return Task("stdlib", train=Windows(ids, length=length, size=4096 // length, shuffle=True, seed=seed))  # type: ignore[arg-type]


def mnist_task(kind: type[Batches] = Jittered) -> Task:
    return Task("mnist", train=kind(*mnist()["train"], size=64, shuffle=True), loss=classification_loss)


def language_recipe(steps: tuple[int, int], lr: float, build: Callable[[], GPT], *, seed: int = 1, kept: float = 0.0) -> Recipe:
    """Short windows while everything is still to be learned, then the whole context at half the learning rate; the whole
    context alone, where nothing is."""
    schedule = Schedule(steps=steps[0], lr=lr, warmup=100, weight_decay=0.1, autocast=True)
    short = Recipe(build, lambda: stdlib_training(length=256, seed=0), schedule, compiled_language_loss)
    longer = replace(schedule, steps=steps[1], lr=lr / 2)
    return replace(short, first=short if steps[0] else None, task=lambda: stdlib_training(length=1024, seed=seed), schedule=longer, kept=kept)


def gpt(**shape) -> Callable[[], GPT]:
    return lambda: GPT(vocab_size=1024, context=1024, **shape)


def grown(name: str, layers: int) -> GPT:
    """A shipped decoder with more layers, which says just what it said: each new block is a copy of the one before it that
    adds nothing until it is trained (Wu et al. 2024, arXiv:2401.02415, section 3.2, who then train the new blocks alone)."""
    small: Any = zoo.load(name)[0]
    model: Any = GPT(**small.numbers() | {"layers": layers})
    model.load_state_dict(small.state_dict(), strict=False)
    origins = [layer * len(small.blocks) // layers for layer in range(layers)]
    for block, origin, before in zip(model.blocks, origins, [-1, *origins], strict=False):
        block.load_state_dict(small.blocks[origin].state_dict())
        if origin == before:
            nn.init.zeros_(block.attention.o.weight)
            nn.init.zeros_(block.ff.down.weight)
    return model


RECIPES = {
    "mlp": Recipe(
        lambda: MLP((784, 800, 800, 10)), mnist_task, Schedule(4400, 1e-3, warmup=100, weight_decay=0.05)
    ),
    "lenet-300-100": Recipe(
        lambda: MLP((784, 300, 100, 10)), lambda: mnist_task(Batches), Schedule(1100, 1e-3, warmup=50, weight_decay=0.1)
    ),
    "resnet": Recipe(lambda: ResNet((32, 64, 128)), mnist_task, Schedule(1650, 4e-3, warmup=100, weight_decay=0.05)),
    "unet": Recipe(
        UNet, lambda: denoising("mnist", mnist()), Schedule(6000, 2e-3, warmup=200, weight_decay=0.01, autocast=True)
    ),
    "gpt-small": language_recipe((6000, 2400), 3e-3, gpt(d_model=256, layers=6, heads=8, kv_heads=4, d_ff=704)),
    "gpt-target": language_recipe((0, 1600), 3e-3, lambda: grown("gpt-small", layers=14), seed=2, kept=0.4),
    "gpt-draft": language_recipe((2500, 800), 4e-3, gpt(d_model=192, layers=2, heads=6, kv_heads=2, d_ff=576)),
}


def taught(student: str, teacher: str, steps: int) -> Recipe:
    """A shipped draft goes on learning, from all that its target thinks of each next token (Zhou et al. 2023, arXiv:2310.08461,
    who also begin with a draft that was trained plainly)."""
    begun: Callable[[], Any] = lambda: zoo.load(student)[0].train()  # noqa: E731
    return replace(language_recipe((0, steps), 4e-3, begun, seed=3), teacher=teacher)


RECIPES["gpt-draft-distilled"] = taught("gpt-draft", "gpt-target", steps=1200)
