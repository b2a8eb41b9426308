"""The technique: same outputs, guards, fallbacks that say why, weights that stay live, files, and the laws of any technique."""

import copy
import threading

import pytest
import torch
from torch import nn

from effkit import Sampler, load, log, save
from effkit.compilation import Compile
from effkit.compilation.compiled import PASSES, Compiled
from effkit.compilation.fusion import Kernel
from effkit.core import native
from effkit.core.task import Task
from effkit.core.technique import Identity, Pipeline
from effkit.core.traits import EAGER
from effkit.measure import macs, peak, resident
from effkit.peft import LoRA
from effkit.quantization import RTN
from effkit.zoo import GPT, MLP, ResNet

GREEDY = Sampler(temperature=0)
SMALL = {
    "mlp": (lambda: MLP((784, 30, 20, 10)), lambda n=3: torch.randn(n, 1, 28, 28)),
    "resnet": (lambda: ResNet((4,)), lambda n=2: torch.randn(n, 1, 28, 28)),
    "gpt": (
        lambda: GPT(vocab_size=32, d_model=16, layers=1, heads=4, kv_heads=2, d_ff=24),
        lambda n=2: torch.randint(32, (n, 7)),
    ),
}


def compiled(name="mlp", **settings):
    build, example = SMALL[name]
    model, x = build().eval(), example()
    return Compile(**settings)(model, Task(example=(x,))), model, x


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("name", SMALL)
def test_outputs_are_the_models_and_nothing_fell_back(name):
    fast, model, _ = compiled(name)
    x = SMALL[name][1]()
    assert torch.allclose(fast(x), model(x), 1e-4, 1e-5)
    assert not fast.fallbacks and len(fast.executor.graph.operators) < fast.history[0][1]


@pytest.mark.parametrize("name", SMALL)
def test_a_result_stays_as_it_was_when_the_next_call_overwrites_the_arena(name):
    fast, model, x = compiled(name)
    first, other = fast(x), SMALL[name][1]()
    kept = first.clone()
    second = fast(other)
    assert torch.equal(first, kept) and torch.allclose(second, model(other), 1e-4, 1e-5)


@pytest.mark.parametrize("passes", [(), ("fuse",), tuple(reversed(PASSES))], ids=["none", "fuse", "reversed"])
def test_no_pass_is_needed_and_no_order_harms(passes):
    fast, model, x = compiled("resnet", passes=passes)
    assert torch.allclose(fast(x), model(x), 1e-4, 1e-5) and not fast.fallbacks


# guards


def falls_back(fast, model, *args, **kwargs):
    before = sum(fast.fallbacks.values())
    seen, wanted = fast(*args, **kwargs), model(*args, **kwargs)
    assert torch.equal(seen, wanted) and sum(fast.fallbacks.values()) == before + 1
    return str(log(fast)[-1])


def test_another_shape_or_dtype_runs_the_original_and_the_log_says_so_once():
    fast, model, x = compiled()
    assert "[2, 1, 28, 28]" in falls_back(fast, model, x[:2])
    lines = len(log(fast))
    falls_back(fast, model, x[:2])
    assert len(log(fast)) == lines and sum(fast.fallbacks.values()) == 2
    fast, model = fast.double(), model.double()
    assert "float64" in falls_back(fast, model, x.double())


def test_training_mode_keyword_arguments_and_hooks_run_the_original():
    fast, model, x = compiled("resnet")
    assert "positional" in falls_back(fast, model, x=x)
    seen = []
    handle = fast.original.stem.register_forward_hook(lambda *_: seen.append(1))
    assert "hooks" in falls_back(fast, model, x) and seen == [1]
    handle.remove()
    fast(x)
    assert seen == [1] and sum(fast.fallbacks.values()) == 2
    fast.train()
    fast(x)
    assert fast.original.training and "training mode" in str(log(fast)[-1])


def test_gradients_flow_through_the_original():
    fast, model, x = compiled()
    with torch.enable_grad():
        fast(x).sum().backward()
        model(x).sum().backward()
    assert torch.equal(fast.original.layers[0].weight.grad, model.layers[0].weight.grad)
    assert "gradients" in str(log(fast)[-1])


def test_an_input_of_another_layout_is_handled():
    fast, model, x = compiled("resnet")
    twisted = x.transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.allclose(fast(twisted), model(x), 1e-4, 1e-5) and not fast.fallbacks


def test_two_threads_do_not_share_the_arena():
    fast, model, x = compiled()
    fast.executor.busy.acquire()
    assert "thread" in falls_back(fast, model, x)
    fast.executor.busy.release()
    wanted, wrong = model(x), []

    def work():
        for _ in range(20):
            with torch.no_grad():
                if not torch.allclose(fast(x), wanted, 1e-4, 1e-5):
                    wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# weights


@pytest.mark.slow
@pytest.mark.parametrize("how", ["written", "loaded", "replaced", "moved"])
def test_changed_weights_count_even_where_they_were_folded(how):
    fast, model, x = compiled("resnet")
    before = fast(x)
    norm = fast.original.norm
    if how == "written":
        norm.weight.mul_(3.0)
    elif how == "loaded":
        fast.load_state_dict({k: v * 2 if v.is_floating_point() else v for k, v in fast.state_dict().items()})
    elif how == "replaced":
        norm.weight = nn.Parameter(norm.weight * 3)
    else:
        norm.weight.data = norm.weight.data * 3
    after = fast(x)
    assert (
        not torch.allclose(after, before) and torch.allclose(after, fast.original(x), 1e-4, 1e-5) and not fast.fallbacks
    )


def test_parameters_and_attributes_are_the_originals():
    fast, model, x = compiled("gpt")
    assert [p.shape for p in fast.parameters()] == [p.shape for p in model.parameters()]
    assert {k.removeprefix("original.") for k in fast.state_dict()} == set(model.state_dict())
    assert fast.config == model.config and fast.context == model.context
    assert torch.equal(fast.generate(x, 3, sampler=GREEDY), model.generate(x, 3, sampler=GREEDY))
    with pytest.raises(AttributeError, match="nonsense"):
        fast.nonsense  # noqa: B018


def test_memory_that_compiling_added_is_counted():
    fast, model, x = compiled("resnet")
    added = resident(fast).value - resident(model).value
    folded = sum(b.nbytes for name, b in fast.named_buffers() if name.startswith("folded_"))
    assert added == fast.executor.plan.total + folded and folded > 0


@pytest.mark.slow
def test_what_lies_in_the_arena_is_really_not_allocated():
    fast, model, x = compiled("gpt")
    fast(x)
    assert peak(lambda: fast(x)).value < peak(lambda: model(x)).value / 2


@pytest.mark.slow
def test_products_are_counted_as_in_the_original():
    for name in SMALL:
        fast, model, x = compiled(name)
        assert macs(fast, (x,)).value == macs(model, (x,)).value, name


# files and copies


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_a_file_holds_the_original_and_compiles_again(name, tmp_path):
    fast, model, x = compiled(name)
    save(fast, tmp_path / "fast.safetensors")
    opened = load(tmp_path / "fast.safetensors")
    assert isinstance(opened, Compiled) and opened.passes == fast.passes and opened.executor is None
    assert torch.equal(opened(x), fast(x)) and opened.executor is not None and not opened.fallbacks
    assert Compile().claim(opened) == Compile().claim(fast)


class Foreign(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 3), nn.ReLU())

    def forward(self, x):
        return self.inner(x) + 1


def test_a_foreign_model_is_saved_and_opened_with_a_base(tmp_path):
    x = torch.randn(2, 4)
    fast = Compile()(Foreign().eval(), Task(example=(x,)))
    save(fast, tmp_path / "foreign.safetensors")
    opened = load(tmp_path / "foreign.safetensors", base=Foreign())
    assert torch.equal(opened(x), fast(x)) and not opened.fallbacks
    with pytest.raises(ValueError, match="base"):
        load(tmp_path / "foreign.safetensors")


def test_a_copy_is_independent():
    fast, model, x = compiled()
    twin = copy.deepcopy(fast)
    twin.original.layers[0].weight.zero_()
    assert torch.allclose(fast(x), model(x), 1e-4, 1e-5) and torch.allclose(twin(x), twin.original(x), 1e-4, 1e-5)


# the technique among others


def test_other_techniques_refuse_a_compiled_model():
    fast, model, x = compiled()
    assert EAGER.holds(model) and not EAGER.holds(fast)
    for technique in (RTN(), LoRA(), Compile(), Identity()):
        with pytest.raises(ValueError, match="eager"):
            technique(fast, Task(example=(x,)))
    with pytest.raises(ValueError, match="put RTN first"):
        Pipeline((Compile(), RTN()))


def test_it_compiles_what_other_techniques_made():
    x = torch.randn(3, 784)
    model = Pipeline((RTN(bits=4), Compile()))(MLP((784, 20, 10)).eval(), Task(example=(x,)))
    assert torch.allclose(model(x), model.original(x), 1e-4, 1e-5) and not model.fallbacks
    folded = sum(b.nbytes for name, b in model.named_buffers() if name.startswith("folded_"))
    assert folded < resident(model.original).value, "the packed weights were unpacked for good"


@pytest.mark.parametrize("passes, said", [(("fuze",), "fuze"), ("fuse", r"\('fuse',\)")])
def test_unknown_passes_are_refused(passes, said):
    with pytest.raises(ValueError, match=said):
        Compile(passes=passes)


def test_a_task_without_an_example_is_refused():
    with pytest.raises(ValueError, match=r"task\.example"):
        Compile()(MLP((784, 10)), Task())


def test_what_cannot_be_captured_is_refused_and_the_model_is_as_it_was():
    class Branches(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(ValueError, match="Branches cannot be captured"):
        Compile()(Branches(), Task(example=(torch.ones(3),)))


def test_a_graph_that_is_wrong_on_the_example_is_refused(monkeypatch):
    monkeypatch.setattr(
        Kernel, "__call__", lambda self, *xs, out=None: torch.zeros(self.type.shape) if out is None else out.zero_()
    )
    if native.compiler():
        with pytest.raises(ValueError, match="differ"):
            compiled("gpt")


def test_without_a_compiler_it_still_works_and_the_log_says_so(monkeypatch):
    monkeypatch.setenv("EFFKIT_NO_COMPILER", "1")
    fast, model, x = compiled("gpt")
    assert torch.allclose(fast(x), model(x), 1e-4, 1e-5) and "no C compiler" in str(log(fast))
    assert not any(isinstance(node.op, Kernel) for node in fast.executor.graph.operators)


def test_the_claim_counts_operators_and_refuses_other_models():
    fast, model, _ = compiled()
    assert (
        Compile().claim(fast).value == len(fast.executor.graph.operators)
        and Compile().claim(fast).provenance == "counted"
    )
    with pytest.raises(ValueError, match="compiled model"):
        Compile().claim(model)


def test_the_report_says_what_happened():
    fast, _, x = compiled("resnet")
    fast(x[:1])
    text = fast.report()
    assert "captured" in text and "arena" in text and "fell back 1 times" in text


def test_the_source_is_python_that_forgets_each_value_after_its_last_use():
    fast, _, _ = compiled()
    assert fast.executor.source.startswith("def forward(x0):") and "out=m_addmm" in fast.executor.source
    assert "del addmm" in fast.executor.source
