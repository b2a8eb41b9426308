"""One file for a transformed model: it opens without its recipe, in a fresh process, and never holds a pickle.

Problem   A rewritten model no longer fits its class: some layers are packed, narrowed, masked, factorized.
Idea      Beside the tensors, the safetensors header lists for each module its kind, from a closed registry, and the
          numbers its constructor takes. Opening builds the root, puts each listed module in place, then loads tensors.
Checked   A SHA-256 over header and tensors; a schema version.
Left out  Models whose class is foreign: their owner passes `base`, an instance of the original architecture.
"""

import hashlib
import inspect
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn
from torch.nn.utils import parametrize

from effkit.core.paths import write_atomically

SCHEMA = 1
#: modules of torch that are rebuilt from the numbers their constructors take
_TORCH = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm, nn.RMSNorm,
          nn.Embedding, nn.ReLU, nn.PReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Softmax, nn.Identity, nn.Flatten,
          nn.Dropout, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)  # fmt: skip
KINDS: dict[str, type[nn.Module]] = {kind.__name__: kind for kind in _TORCH}
SAME = "="
_CONTAINERS = {"Sequential": nn.Sequential, "ModuleList": nn.ModuleList}


def stored(kind: type[nn.Module]) -> type[nn.Module]:
    """Class decorator: files may hold modules of this kind. Its constructor's arguments must be attributes of it, or
    it has a method `numbers` that returns them as JSON."""
    if kind.__name__ in KINDS:
        raise ValueError(f"two kinds of module are called {kind.__name__}; rename one of them")
    KINDS[kind.__name__] = kind
    return kind


def numbers(module: nn.Module) -> dict:
    """The constructor's arguments, read from the module itself, so that a narrowed layer says its new width."""
    if callable(own := getattr(module, "numbers", None)):
        return own()
    kind = parametrize.type_before_parametrizations(module)
    names = [n for n in inspect.signature(kind).parameters if n not in ("device", "dtype", "inplace") and n[0] != "_"]
    values = {n: getattr(module, n) for n in names if hasattr(module, n)}
    return {n: v is not None if isinstance(v, Tensor) or n == "bias" else v for n, v in values.items()}


def save(model: nn.Module, path: str | Path, made: dict | None = None) -> int:
    """Writes the model as one safetensors file and returns its size in bytes. Shared tensors are written once. made: how
    the model was made, as JSON, to be read from the header."""
    tensors, ties = _unique_tensors(model)
    header = {"schema": SCHEMA, "root": type(model).__name__, "modules": describe(model), "ties": ties,
              "training": model.training, "frozen": [n for n, p in model.named_parameters() if not p.requires_grad]}  # fmt: skip
    return write_tensors(Path(path), header | ({"made": made} if made else {}), tensors)


def load(path: str | Path, base: nn.Module | None = None) -> nn.Module:
    """Opens a file that `save` wrote. base: a module of the original class, needed only where effkit does not know it.

    Raises ValueError when the file is cut short, altered, of another schema, or needs a base.
    """
    header, tensors = read_tensors(Path(path))
    with torch.device("meta"):
        model = _build_root(header, base)
        for where, spec in header["modules"].items():
            model = _place(model, where, spec)
    for alias, original in header["ties"].items():
        tensors[alias] = tensors[original]
    _assign(model, tensors)
    for alias, original in header["ties"].items():
        _tie(model, alias, original)
    frozen = set(header["frozen"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen and parameter.is_floating_point())
    return model.train(header["training"])


def describe(model: nn.Module) -> dict[str, list]:
    """path -> [kind, numbers, parametrizations] for every module of a known kind, parents before children; of a module
    that stands in a second place [SAME, its first path, {}]."""
    result: dict[str, list] = {}
    first: dict[int, str] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        kind = parametrize.type_before_parametrizations(module)
        if (original := first.setdefault(id(module), path)) != path:
            result[path] = [SAME, original, {}]
        elif kind in (nn.Sequential, nn.ModuleList):
            result[path] = [kind.__name__, list(module._modules), {}]
        elif KINDS.get(kind.__name__) is kind and "parametrizations" not in path:
            lists = getattr(module, "parametrizations", {}).items()
            held = {n: [[type(p).__name__, numbers(p)] for p in plist] for n, plist in lists}
            result[path] = [kind.__name__, numbers(module), held]
    return result


def _build_root(header: dict, base: nn.Module | None) -> nn.Module:
    """The root; one of a known kind may wrap a model of a class that only its owner knows (its `wraps` names it)."""
    spec = header["modules"].get("")
    root = None if spec is None else _make(spec)
    foreign = header["root"] if root is None else getattr(root, "wraps", "")
    if foreign and base is None:
        raise ValueError(f"this file holds a {foreign}, a class effkit does not know; pass base={foreign}(...), freshly built")
    if root is None:
        return base.to("meta")  # type: ignore[union-attr]
    if foreign:
        root.original = base.to("meta")  # type: ignore[union-attr]
    return root


def _make(spec: list) -> nn.Module:
    kind, details, held = spec
    if kind in _CONTAINERS:
        made = _CONTAINERS[kind]()
        for name in details:
            made.add_module(name, nn.Identity())
        return made
    if kind not in KINDS:
        raise ValueError(f"no kind of module called {kind!r} in this version of effkit; it knows {', '.join(sorted(KINDS))}")
    module = KINDS[kind](**{k: tuple(v) if isinstance(v, list) else v for k, v in details.items()})
    for name, specs in held.items():
        for parametrization in specs:
            parametrize.register_parametrization(module, name, _make([*parametrization, {}]), unsafe=True)
    return module


def _place(model: nn.Module, path: str, spec: list) -> nn.Module:
    """Puts the described module at its path unless an equal one stands there already."""
    if path == "":
        return model
    parent, _, name = path.rpartition(".")
    holder = model.get_submodule(parent)
    there = holder._modules.get(name)
    if spec[0] == SAME:
        holder._modules[name] = model.get_submodule(spec[1])
    elif there is None or describe(there).get("") != spec:
        holder._modules[name] = _make(spec)
    return model


def _unique_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each tensor once, contiguous and without slack, and which further names share it. Copied is only what is a part
    of a larger storage, or shows one in a second way: a model is not held twice while it is written."""
    seen: dict[tuple, str] = {}
    tensors, ties, places = {}, {}, set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()) if tensor.numel() else (name,)
        if key in seen:
            ties[name] = seen[key]
        else:
            seen[key] = name
            plain = tensor.detach().cpu().contiguous()
            whole = plain.untyped_storage().nbytes() == plain.nbytes and plain.data_ptr() not in places
            tensors[name] = plain if whole else plain.clone()
            places.add(plain.data_ptr())
    return tensors, ties


def write_tensors(path: Path, header: dict, tensors: dict[str, Tensor]) -> int:
    """One safetensors file with a JSON header and the SHA-256 of both; returns its size in bytes."""
    header = header | {"sha256": _digest(header, tensors)}
    data = to_bytes(tensors, metadata={"effkit": json.dumps(header, separators=(",", ":"))})
    write_atomically(path, data)
    return len(data)


def read_tensors(path: Path, way_out: str = "fetch or make it again") -> tuple[dict, dict[str, Tensor]]:
    """Header and tensors, both checked."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}{', but a folder' * path.is_dir()}: give the path of a file that effkit.save wrote")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("effkit", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged or not a safetensors file ({error}); {way_out}") from error
    if not isinstance(header, dict) or header.get("schema") != SCHEMA:
        found = header.get("schema") if isinstance(header, dict) else "no effkit header"
        raise ValueError(f"{path} has schema {found!r}, and {SCHEMA} is what this version reads; save the model again with effkit.save")
    if header.pop("sha256", None) != _digest(header, tensors):
        raise ValueError(f"{path} was altered or damaged: its SHA-256 does not match; {way_out}")
    return header, tensors


def _digest(header: dict, tensors: dict[str, Tensor]) -> str:
    return digest(sorted(tensors.items()), json.dumps(header, sort_keys=True).encode())


def fingerprint(modules: Iterable[nn.Module]) -> str:
    """SHA-256 over all tensors of the modules, in order: whether these are the very weights that something was made for."""
    return digest(item for module in modules for item in module.state_dict().items())


def digest(named: Iterable[tuple[str, Tensor]], start: bytes = b"") -> str:
    """SHA-256 over names, dtypes, shapes and bytes of tensors."""
    hashed = hashlib.sha256(start)
    for name, tensor in named:
        hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        content = tensor.detach().cpu().contiguous().reshape(-1)
        hashed.update(content.view(torch.uint8).numpy().data if tensor.numel() else b"")
    return hashed.hexdigest()


def _assign(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    missing, unexpected = model.load_state_dict(tensors, assign=True, strict=False)
    if missing or unexpected:
        seen = f"missing {missing or 'nothing'}, unexpected {unexpected or 'nothing'}"
        raise ValueError(f"the file does not fit the model: {seen}; was base built with other sizes?")


def _tie(model: nn.Module, alias: str, original: str) -> None:
    """Makes both names one Parameter again."""
    (a_parent, _, a_name), (o_parent, _, o_name) = alias.rpartition("."), original.rpartition(".")
    holder = model.get_submodule(a_parent)
    store = holder._parameters if a_name in holder._parameters else holder._buffers
    store[a_name] = getattr(model.get_submodule(o_parent), o_name)
