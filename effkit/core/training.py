"""fit(): the one plain training loop, with a progress bar; it goes on where an interrupted run stopped."""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn
from tqdm.auto import tqdm

from effkit.core.paths import write_atomically
from effkit.core.task import Batch, Task

Loss = Callable[[nn.Module, Batch], Tensor]


@dataclass(frozen=True)
class Schedule:
    """Learning rate and length of a run: linear warm-up, then cosine decay (Loshchilov & Hutter 2016, arXiv:1608.03983, eq. 5)."""

    steps: int
    lr: float = 1e-3
    warmup: int = 0
    weight_decay: float = 0.0
    final: float = 0.05  # of lr, at the last step
    clip: float = 1.0  # norm of the gradient
    autocast: bool = False  # bfloat16 matrix products

    def rate(self, step: int) -> float:
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * (self.final + (1 - self.final) * (1 + math.cos(math.pi * done)) / 2)


def fit(
    model: nn.Module,
    task: Task,
    schedule: Schedule,
    *,
    loss: Loss | None = None,
    after_step: Callable[[int], None] | None = None,
    resume: str | Path | None = None,
    save_every: int = 200,
    label: str = "training",
) -> list[float]:
    """Trains the parameters that require gradients, in place; returns the loss of each step (nats).

    loss        (model, batch) -> scalar; task.loss on the model's outputs otherwise
    after_step  called with the number of steps done: schedules of sparsity, say
    resume      a file that holds the state of an unfinished run; written every `save_every` steps and on Ctrl-C
    """
    task.require("train", *(() if loss else ("loss",)), by=fit)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise ValueError("no parameter requires gradients, so there is nothing to train; unfreeze some with requires_grad_(True)")
    optimizer = torch.optim.AdamW(_groups(trained, schedule.weight_decay), lr=schedule.lr, betas=(0.9, 0.95))
    curve = _restore(Path(resume), model, trained, optimizer, schedule) if resume else []
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    bar = tqdm(range(len(curve), schedule.steps), initial=len(curve), total=schedule.steps, desc=label, leave=False, delay=2)
    try:
        for step in bar:
            curve.append(_step(model, task, step, optimizer, schedule, trained, loss))
            if after_step:
                after_step(step + 1)
            if step % 20 == 0:
                bar.set_postfix(loss=f"{curve[-1]:.3f}")
            if resume and (step + 1) % save_every == 0:
                _keep(Path(resume), model, trained, optimizer, schedule, curve)
    except KeyboardInterrupt:
        if resume:
            _keep(Path(resume), model, trained, optimizer, schedule, curve)
            tqdm.write(f"stopped after {len(curve)} of {schedule.steps} steps; saved to {resume}: the same call goes on from there")
        raise
    finally:
        for module, mode in modes:
            module.training = mode
    return curve


def _step(model, task: Task, step: int, optimizer, schedule: Schedule, trained, loss: Loss | None) -> float:
    batch = task.train.at(step)  # type: ignore[union-attr]
    for group in optimizer.param_groups:
        group["lr"] = schedule.rate(step)
    with torch.autocast("cpu" if not batch[0].is_cuda else "cuda", torch.bfloat16, enabled=schedule.autocast):
        value = loss(model, batch) if loss else task.loss(model(batch[0]), batch)  # type: ignore[misc]
    if not torch.isfinite(value):
        raise ValueError(f"the loss is {value.item()} at step {step}; lower the learning rate ({schedule.lr}) or look for NaN in the data")
    optimizer.zero_grad(set_to_none=True)
    value.backward()
    nn.utils.clip_grad_norm_(trained.values(), schedule.clip)
    optimizer.step()
    return value.item()


def _groups(trained: dict[str, nn.Parameter], weight_decay: float) -> list[dict]:
    """Weight decay for matrices only: pulling norms and biases to zero helps nobody."""
    return [
        {"params": [p for p in trained.values() if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained.values() if p.dim() < 2], "weight_decay": 0.0},
    ]


def _keep(path: Path, model, trained, optimizer, schedule: Schedule, curve: list[float]) -> None:
    """Weights, buffers, and both moments of AdamW, in one safetensors file with its SHA-256."""
    tensors = {f"model.{name}": t for name, t in _owned(model).items()}
    for name, parameter in trained.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}.{name}"] = torch.as_tensor(value)
    tensors["curve"] = torch.tensor(curve, dtype=torch.float64)
    tensors = {name: t.detach().contiguous().clone() for name, t in tensors.items()}
    write_atomically(path, to_bytes(tensors, {"schedule": json.dumps(asdict(schedule)), "sha256": _hash(tensors)}))


def _restore(path: Path, model, trained, optimizer, schedule: Schedule) -> list[float]:
    """The curve so far; empty when there is nothing to go on from."""
    if not path.exists():
        return []
    try:
        with safe_open(path, framework="pt") as file:
            meta, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); delete it to start over") from error
    if meta.get("sha256") != _hash(tensors):
        raise ValueError(f"{path} was altered or damaged: its SHA-256 does not match; delete it to start over")
    if json.loads(meta["schedule"]) != asdict(schedule):
        raise ValueError(f"{path} belongs to a run with another schedule ({meta['schedule']}); delete it to start over")
    with torch.no_grad():
        for name, tensor in _owned(model).items():
            tensor.copy_(tensors[f"model.{name}"])
    for name, parameter in trained.items():
        state = {key: tensors[f"{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}.{name}" in tensors}
        if state:
            optimizer.state[parameter] = state
    return tensors["curve"].tolist()


def _owned(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _hash(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data if tensors[name].numel() else b"")
    return digest.hexdigest()
