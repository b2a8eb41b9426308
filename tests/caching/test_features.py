"""DeepCache: with interval 1 nothing changes; with more, the depths run as seldom as it says, and never for another
drawing. Against a drawing written out by hand."""

import pytest
import torch
from torch import nn

import effkit
from effkit.caching import DeepCache
from effkit.caching.features import FAR, Kept
from effkit.core.paths import data_dir
from effkit.core.task import Task
from effkit.zoo.data import digits
from effkit.zoo.diffusion import Noised, UNet, denoising, denoising_loss, draw, noise_left, signal, timed, waves

SMALL = (8, 8, 16)


def unet(seed: int = 0) -> UNet:
    torch.manual_seed(seed)
    return UNet(SMALL).eval()


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def runs(model: nn.Module, steps: int, n: int = 2) -> int:
    """How often the depths run in one drawing."""
    calls = []
    part = model.depths.part if isinstance(model.depths, Kept) else model.depths
    handle = part.register_forward_hook(lambda *_: calls.append(1))
    draw(model, n, steps=steps, rng=rng())
    handle.remove()
    return len(calls)


def test_interval_one_is_the_model():
    model = unet()
    assert torch.equal(draw(DeepCache(1)(model), 3, steps=6, rng=rng()), draw(model, 3, steps=6, rng=rng()))


@pytest.mark.parametrize("interval, steps, wanted", [(1, 6, 6), (2, 6, 3), (3, 6, 2), (3, 7, 3), (9, 6, 1)])
def test_the_depths_run_once_in_so_many_steps(interval, steps, wanted):
    model = DeepCache(interval)(unet())
    assert runs(model, steps) == wanted
    assert runs(model, steps) == wanted, "a second drawing begins anew"
    assert DeepCache(interval).claim(model).value == 1 / interval


@torch.no_grad()
def by_hand(model: UNet, n: int, steps: int, interval: int) -> torch.Tensor:
    """DDIM with the U-Net's two ways written out."""
    x, times = torch.randn(n, 1, 28, 28, generator=rng()), torch.linspace(1, 0, steps + 1)
    for i, (now, then) in enumerate(zip(times, times[1:], strict=False)):
        t = now.expand(n)
        shallow = model.down(model.stem(x), t)
        if i % interval == 0:
            deep = model.depths(shallow, t)
        noise = model.head(nn.functional.silu(model.norm(model.up(torch.cat((deep, shallow), 1), t))))
        a, b = signal(now), signal(then)
        image = ((x - (1 - a).sqrt() * noise) / a.sqrt()).clamp(-1, 1)
        x = b.sqrt() * image + (1 - b).sqrt() * (x - a.sqrt() * image) / (1 - a).sqrt()
    return (image + 1) / 2


@pytest.mark.parametrize("interval", [1, 2, 4])
def test_a_drawing_is_the_one_by_hand(interval):
    model = unet()
    assert torch.allclose(draw(DeepCache(interval)(model), 2, steps=7, rng=rng()), by_hand(model, 2, 7, interval), atol=1e-5)


@torch.no_grad()
def test_what_is_no_next_step_is_computed_afresh():
    """Images are other ones each time, but near the last."""
    model, kept = unet(), DeepCache(9)(unet())
    x = torch.randn(2, 1, 28, 28, generator=rng())
    for i, t in enumerate([[0.5, 0.5], [0.5, 0.5], [0.6, 0.6], [0.5, 0.7], [0.9, 0.9]]):  # the same, later, not all earlier, later
        now = timed(x + 0.1 * torch.randn(x.shape, generator=rng(i)), torch.tensor(t))
        assert torch.equal(kept(now), model(now)), t
    x = torch.randn(8, 1, 28, 28, generator=rng())
    kept(timed(x, torch.full((8,), 0.9)))
    exchanged = timed(torch.cat((torch.randn(1, 1, 28, 28, generator=rng(5)), x[1:])), torch.full((8,), 0.8))
    assert torch.equal(kept(exchanged), model(exchanged)), "one image of eight is another drawing's"
    x = x[:2]
    kept(timed(x, torch.tensor([0.9, 0.9])))
    earlier = timed(x, torch.tensor([0.8, 0.8]))
    assert not torch.equal(kept(earlier), model(earlier)), "a next step"
    for other in (timed(x[:1], torch.tensor([0.1])), timed(x[:, :, 4:, 4:], torch.tensor([0.1, 0.1]))):
        assert torch.equal(kept(other), model(other)), "another number, another size"


@torch.no_grad()
def test_drawings_that_take_turns_do_not_get_each_other_s_depths():
    """Those of one step, too, which begin where the one before them did."""
    for model in (unet(), effkit.load(data_dir() / "unet.safetensors").float()):
        kept, noise = DeepCache(9)(model), [torch.randn(1, 1, 28, 28, generator=rng(seed)) for seed in range(2)]
        for time in (1.0, 0.9, 0.8):
            for x in noise:
                now = timed(x, torch.tensor([time]))
                assert torch.equal(kept(now), model(now)), time
        for seed in range(3):
            assert torch.equal(draw(kept, 1, steps=1, rng=rng(seed)), draw(model, 1, steps=1, rng=rng(seed)))


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("steps", [3, 6, 20])
def test_steps_of_one_drawing_are_nearer_than_two_drawings(steps):
    """On the shipped model: FAR lies between."""
    model, lines = effkit.load(data_dir() / "unet.safetensors").float(), []
    for seed in range(6):
        lines.append([])
        handle = model.depths.register_forward_pre_hook(lambda module, args: lines[-1].append(args[0]))
        draw(model, 1, steps=steps, rng=rng(seed))
        handle.remove()
    far = lambda a, b: ((a - b).norm() / b.norm()).item()  # noqa: E731
    same = [far(line[i + 1], line[i]) for line in lines for i in range(steps - 1)]
    other = [far(a[i + 1], b[i]) for a in lines for b in lines if a is not b for i in range(steps - 1)]
    assert max(same) < FAR - 0.05 and min(other) > FAR + 0.1, (max(same), min(other))


def test_training_computes_afresh_and_keeps_nothing():
    kept = DeepCache(9)(unet())
    for t in (0.9, 0.5):
        kept(timed(torch.randn(1, 1, 28, 28), torch.tensor([t]))).sum().backward()
    assert kept.depths.last is None and all(p.grad is not None for p in kept.depths.parameters())


def test_twice_is_once():
    assert runs(DeepCache(2)(DeepCache(3)(unet())), 6) == 3


def test_what_has_no_depths_is_refused():
    with pytest.raises(ValueError, match="needs a U-Net with `depths`, as zoo.UNet has; Linear has none"):
        DeepCache()(nn.Linear(2, 2), Task())


def test_the_file_opens(tmp_path):
    model = DeepCache(3)(unet())
    effkit.save(model, tmp_path / "unet.safetensors")
    opened = effkit.load(tmp_path / "unet.safetensors")
    assert torch.equal(draw(opened, 2, steps=5, rng=rng()), draw(model, 2, steps=5, rng=rng()))


def test_a_cache_that_is_not_begun_anew_is_noticed(monkeypatch):
    monkeypatch.setattr(Kept, "_serves", lambda self, x, time: self.last is not None and self.age + 1 < self.interval)
    with pytest.raises(AssertionError):
        test_what_is_no_next_step_is_computed_afresh()


# the model


def test_noise_and_signal_share_the_variance():
    a = signal(torch.linspace(0, 1, 50))
    assert (a.diff() < 0).all() and a[0] > 0.999 and 0 < a[-1] < 1e-3


@pytest.mark.slow
def test_batches_of_noise_are_the_same_at_the_same_step_and_mean_what_they_say():
    data = Noised(*digits()["val"], size=8, shuffle=True)
    (x, noise), again = data.at(3), data.at(3)
    assert torch.equal(x, again[0]) and torch.equal(noise, again[1]) and not torch.equal(x, data.at(4)[0])
    a = signal(x[:, 1, 0, 0])[:, None, None, None]
    images = (x[:, :1] - (1 - a).sqrt() * noise) / a.sqrt()
    early = a.flatten() > 0.01
    assert images[early].min() >= -1.001 and images[early].max() <= 1.001 and (a[early] < 1).all()


def test_waves_tell_near_times_apart():
    near = waves(torch.tensor([0.500, 0.502]))
    assert (near[0] - near[1]).abs().max() > 0.5 and near.abs().max() <= 1


@pytest.mark.slow
def test_a_little_training_takes_noise_away():
    task, model = denoising("digits", {k: (nn.functional.interpolate(x, 28), y) for k, (x, y) in digits().items()}), unet()
    before = noise_left(model, task.val.first(64)).mean()
    from effkit.core.training import Schedule, fit

    fit(model, task, Schedule(40, 4e-3))
    assert noise_left(model, task.val.first(64)).mean() < 0.6 * before
    assert denoising_loss(torch.zeros(2, 1, 4, 4), (torch.zeros(1), torch.ones(2, 1, 4, 4))) == 1


@pytest.mark.parametrize("bad", [dict(n=0), dict(steps=0)])
def test_drawing_nothing_is_refused(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))} must be a whole number"):
        draw(unet(), **({"n": 1} | bad))
