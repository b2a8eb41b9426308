"""The shipped checkpoints, one entry each."""

from effkit.core.task import Task
from effkit.core.training import Schedule
from effkit.studies.train import Recipe, compiled_language_loss
from effkit.zoo.data import Windows, stdlib_text
from effkit.zoo.gpt import GPT
from effkit.zoo.tokens import encode, shipped_tokenizer


def stdlib_training() -> Task:
    ids = encode(shipped_tokenizer(), stdlib_text("train"))
    return Task("stdlib", train=Windows(ids, length=256, size=16, shuffle=True))  # type: ignore[arg-type]


RECIPES = {
    "gpt-small": Recipe(
        build=lambda: GPT(vocab_size=1024, d_model=256, layers=6, heads=8, kv_heads=4, d_ff=704, context=1024),
        task=stdlib_training,
        schedule=Schedule(steps=2600, lr=3e-3, warmup=100, weight_decay=0.1, autocast=True),
        loss=compiled_language_loss,
    ),
}
