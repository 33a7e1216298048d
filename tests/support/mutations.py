"""Every way to change a packed model that its family's forward might notice, one at a time.

A mutation is ``(name, change)``: ``change(model)`` changes it and returns what undoes that.
"""

import contextlib
import copy
import sys

import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from torch import nn
from transformers import AttentionInterface

from maqd_hf.decoding.families import FAMILIES
from maqd_hf.decoding.identity import own_attributes

_SKIPPED = ("config", "layer_types", "spec", "context", "act")  # objects, changed elsewhere


def mutations(model):
    """All mutations of ``model``: of one module of each class and place, and of the config."""
    yield from _of_config(model.config)
    places = set()
    for path, module in model.named_modules():
        place = ".".join(part for part in path.split(".") if part != "0")
        if any(part.isdigit() for part in place.split(".")) or place in places:
            continue  # the first block stands for all
        places.add(place)
        yield from _of_attributes(path, module)
        yield from _of_tensors(path, module)
        yield from _of_code(path, module)
    yield from _of_functions(model)
    yield "all of attention scaled", _everywhere(model, "scaling")


def _other(value):
    """Values that ``value`` might be changed to."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, 1] if value != 1 else [2]
    if isinstance(value, float):
        return [value * 0.5 + 0.1]
    return [True, 3] if value is None else []


def _accepted(config, name, values):
    """Those of ``values`` that a config takes."""
    for value in values:
        with contextlib.suppress(StrictDataclassFieldValidationError):
            setattr(copy.copy(config), name, value)
            yield value


def _setter(find, name, value):
    def change(model):
        owner = find(model)
        old = getattr(owner, name)
        setattr(owner, name, value)
        return lambda: setattr(owner, name, old)

    return change


def _of_config(config):
    for name, value in vars(config).items():
        for other in _accepted(config, name, [] if name.startswith("_") else _other(value)):
            yield f"config.{name}={other}", _setter(lambda m: m.config, name, other)
    yield "config._attn_implementation", _setter(lambda m: m.config, "_attn_implementation", "mine")
    kinds = getattr(config, "layer_types", None)
    if kinds:
        swapped = {"full_attention": "sliding_attention", "sliding_attention": "full_attention"}
        other = [swapped[kinds[0]], *kinds[1:]]
        yield "config.layer_types", _setter(lambda m: m.config, "layer_types", other)


def _of_attributes(path, module):
    for name in own_attributes(module):
        value = vars(module)[name]
        others = _other(value) if not name.startswith("_") and name not in _SKIPPED else []
        for other in others:
            yield f"{path}.{name}={other}", _setter(_at(path), name, other)


def _at(path):
    return lambda model: model.get_submodule(path)


def _of_tensors(path, module):
    tensors = {**module._parameters, **module._buffers}
    for name, tensor in tensors.items():
        if tensor is None or not tensor.numel():
            continue
        yield f"{path}.{name} edited in place", _edit(path, name, lambda t: t)
        yield f"{path}.{name} edited through data", _edit(path, name, lambda t: t.data)

        def replace(model, name=name):
            owner = model.get_submodule(path)
            old = getattr(owner, name)
            new = _changed(old.detach().clone())
            kind = nn.Parameter if isinstance(old, nn.Parameter) else nn.Buffer
            options = {"requires_grad": False} if kind is nn.Parameter else {}
            setattr(owner, name, kind(new, **options))
            return lambda: setattr(owner, name, old)

        def exchange(model, name=name):
            tensor = getattr(model.get_submodule(path), name)
            old = tensor.detach().clone()
            tensor.data = _changed(old.clone())
            return lambda: setattr(tensor, "data", old)

        yield f"{path}.{name} replaced", replace
        yield f"{path}.{name} given other data", exchange


def _changed(tensor):
    """``tensor``, edited in place; of codes a bit is flipped, which leaves them codes."""
    if tensor.dtype == torch.int32:
        return tensor.bitwise_xor_(1)
    return tensor.mul_(1.5)


def _edit(path, name, view):
    def change(model):
        tensor = getattr(model.get_submodule(path), name)
        old = tensor.detach().clone()
        with torch.no_grad():
            _changed(view(tensor))

        def undo():
            with torch.no_grad():
                tensor.copy_(old)

        return undo

    return change


def _halved(output):
    """What a changed forward returns."""
    if isinstance(output, torch.Tensor):
        return output * 0.5
    if isinstance(output, tuple):
        return (_halved(output[0]), *output[1:])
    output.logits = output.logits * 0.5 if "logits" in output else None
    return output


def _of_code(path, module):
    """The class subclassed, its forward patched, an instance's own forward, and hooks."""
    inner_model = path and "Model" in type(module).__name__
    if inner_model or isinstance(module, (nn.ModuleList, nn.Dropout)):
        return

    def subclass(model):
        owner, old = model.get_submodule(path), type(model.get_submodule(path))
        forward = old.forward
        body = {"forward": lambda self, *a, **k: _halved(forward(self, *a, **k))}
        owner.__class__ = type(f"Mine{old.__name__}", (old,), body)
        return lambda: setattr(owner, "__class__", old)

    def patch(model):
        kind = type(model.get_submodule(path))
        own, old = "forward" in vars(kind), kind.forward
        kind.forward = lambda self, *a, **k: _halved(old(self, *a, **k))
        return lambda: setattr(kind, "forward", old) if own else delattr(kind, "forward")

    def instance(model):
        owner = model.get_submodule(path)
        owner.forward = lambda *a, **k: _halved(type(owner).forward(owner, *a, **k))
        return lambda: delattr(owner, "forward")

    yield f"{path} subclassed", subclass
    yield f"{path} patched at its class", patch
    if path:  # the model's own forward is where the native step stands, and hooks run around it
        yield f"{path} with a forward of its own", instance
        yield from _of_hooks(path)


def _of_hooks(path):
    """A hook that halves the output, and one that halves the inputs."""

    def hook(model):
        owner = model.get_submodule(path)
        return owner.register_forward_hook(lambda m, args, output: _halved(output)).remove

    def pre_hook(model):
        owner = model.get_submodule(path)

        def change(module, args, kwargs):
            return tuple(map(_halved_input, args)), kwargs

        return owner.register_forward_pre_hook(change, with_kwargs=True).remove

    yield f"{path} hooked", hook
    yield f"{path} hooked before", pre_hook


def _halved_input(value):
    floats = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value * 0.5 if floats else value


def _of_functions(model):
    """Functions of the family's module and of torch, exchanged."""
    module = sys.modules[FAMILIES[model.config.model_type].module]
    for name in ("apply_rotary_pos_emb", "create_causal_mask"):
        if hasattr(module, name):
            yield f"{name} exchanged", _exchanged(module, name)

    def attention(model):
        old = AttentionInterface._global_mapping["sdpa"]
        AttentionInterface.register("sdpa", lambda *a, **k: _halved(old(*a, **k)))
        return lambda: AttentionInterface.register("sdpa", old)

    def every_module(model):
        def hook(module, args, output):
            return _halved(output) if isinstance(output, torch.Tensor) else None

        return nn.modules.module.register_module_forward_hook(hook).remove

    yield "attention exchanged", attention
    yield "a hook on every module", every_module


def _exchanged(module, name):
    def change(model):
        old = getattr(module, name)

        def new(*args, **kwargs):
            found = old(*args, **kwargs)
            return None if name == "create_causal_mask" else tuple(map(torch.neg, found))

        setattr(module, name, new)
        return lambda: setattr(module, name, old)

    return change


def _everywhere(model, name):
    def change(model):
        owners = [module for module in model.modules() if name in vars(module)]
        old = [getattr(owner, name) for owner in owners]
        for owner, value in zip(owners, old, strict=True):
            setattr(owner, name, value * 0.1)

        def undo():
            for owner, value in zip(owners, old, strict=True):
                setattr(owner, name, value)

        return undo

    return change
