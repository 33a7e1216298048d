"""Whether a model runs the code that the native step stands for, and nothing else.

The library answers for the classes and functions of the installed transformers, torch and this
package. A subclass, a patched class or function, a hook, a ``forward`` of an instance, another
attention function: each means other code, for which only the model itself can answer.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from operator import attrgetter
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_modules
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

try:
    from transformers.utils import output_capturing
except ImportError:  # before transformers 5.2
    output_capturing = None  # type: ignore[assignment]

from ..nn import BatchContext
from .families import Family, UnsupportedError

PLAIN = frozenset(vars(nn.Module()))
"""Attributes that every module has."""

methods = attrgetter("forward", "__call__")
"""The functions of a class that a call of its modules runs."""

_ATTENTION = ("sdpa", "eager")  # computed by torch alone, and from a mask that says all
_OURS = f"{__name__.partition('.')[0]}.nn."
_TRACED = ("transformers.masking_utils", "transformers.integrations.sdpa_attention")


def own_attributes(module: nn.Module) -> list[str]:
    """Names of the attributes that its class, or somebody later, gave ``module``."""
    return [name for name in vars(module) if name not in PLAIN]


def global_hooks() -> list[dict[int, Any]]:
    """Hooks on every module there is."""
    return [torch_modules._global_forward_hooks, torch_modules._global_forward_pre_hooks]


def attention_functions(config: Any) -> list[object]:
    """What computes the attention and its mask, by the name that ``config`` gives."""
    name = getattr(config, "_attn_implementation", None)
    return [ALL_ATTENTION_FUNCTIONS.get(name), ALL_MASK_ATTENTION_FUNCTIONS.get(name)]


def check_identity(model: Any, family: Family) -> None:
    """``UnsupportedError`` unless ``model`` runs stock code of ``family`` alone."""
    modules = dict(model.named_modules())
    for name, module in modules.items():
        where = name or "the model"
        _check_class(type(module), where, family)
        _check_instance(module, where, model)
    for module_type in {type(module) for module in modules.values()}:
        for function in methods(module_type):
            _check_origin(function, f"{module_type.__name__}.forward", family)
    if any(global_hooks()):
        raise UnsupportedError("hooks on all modules")
    _check_attention(model.config, family)
    for names, values in read_globals(model, family):
        for name in names:
            _check_origin(values[name], name, family)


def _check_class(kind: type, where: str, family: Family) -> None:
    known = kind.__module__ in (family.module, "transformers.activations") or (
        kind.__module__.startswith(("torch.nn.modules.", _OURS))
    )
    if not known or getattr(sys.modules[kind.__module__], kind.__name__, None) is not kind:
        raise UnsupportedError(
            f"{where} is a {kind.__module__}.{kind.__qualname__}, no class of {family.module}, of "
            "torch or of this package"
        )


def _check_instance(module: nn.Module, where: str, model: nn.Module) -> None:
    """What somebody hung on one module. Hooks on the model itself run around its ``forward``."""
    names = own_attributes(module)
    methods = [n for n in names if isinstance(getattr(type(module), n, None), FunctionType)]
    if module is model:
        methods = [name for name in methods if name != "forward"]  # where the native step stands
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    idle = all(map(_is_idle, hooks))
    if methods or "_hf_hook" in names or not (idle or module is model):
        raise UnsupportedError(f"{where} has hooks or a forward of its own")
    config = vars(module).get("config", model.config)
    if config is not model.config:
        raise UnsupportedError(f"{where} has a config of its own")


def _is_idle(hook: Any) -> bool:
    """Whether a hook has nothing to do in a native step: that of this package tells the layers
    what the library is told directly, and those of transformers wait for a call that wants hidden
    states (``is_captured``)."""
    if isinstance(getattr(hook, "__self__", None), BatchContext):
        return True
    code = getattr(hook, "__code__", None)
    return code is not None and code.co_filename == getattr(output_capturing, "__file__", None)


def is_captured() -> bool:
    """Whether an outer model collects hidden states or attentions at this moment."""
    return output_capturing is not None and output_capturing._active_collector.get() is not None


def _check_attention(config: Any, family: Family) -> None:
    name = config._attn_implementation
    if name not in _ATTENTION:
        raise UnsupportedError(f"attention {name!r} is not one of {', '.join(_ATTENTION)}")
    if not getattr(config, "is_causal", True):
        raise UnsupportedError("config.is_causal=False")
    for function in attention_functions(config):
        if function is not None:
            _check_origin(function, f"attention {name!r}", family)
    for interface in (AttentionInterface, AttentionMaskInterface):
        for function in filter(_is_function, vars(interface).values()):
            _check_origin(function, interface.__name__, family)


def _is_function(value: object) -> bool:
    return isinstance(value, FunctionType)


def _check_origin(function: Any, name: str, family: Family) -> None:
    """``UnsupportedError`` unless the installed packages define ``function`` and what it wraps."""
    for code in _chain(function):
        if not code.co_filename.startswith(_folders(family.module)):
            raise UnsupportedError(f"{name} was replaced by code of {code.co_filename}")


@cache
def _folders(module: str) -> tuple[str, ...]:
    """Where the code of a family may come from: its own package, transformers, torch and ours."""
    names = {name.partition(".")[0] for name in (module, "transformers", "torch", _OURS)}
    return tuple(f"{Path(str(sys.modules[name].__file__)).parent}{os.sep}" for name in names)


_CONTEXT_MANAGER: CodeType = contextmanager(lambda: iter(())).__code__


def _chain(function: Any) -> Iterator[CodeType]:
    """The code of ``function`` and of all that it wraps, but for ``contextlib``'s own part."""
    while function is not None:
        if isinstance(function, FunctionType) and function.__code__ is not _CONTEXT_MANAGER:
            yield function.__code__
        function = getattr(function, "__wrapped__", None)


# ------------------------------------------------------------------------------ global functions


def read_globals(model: nn.Module, family: Family) -> list[tuple[list[str], dict[str, Any]]]:
    """The functions and classes that the forwards of ``model`` find in their modules when they
    run: (names, the module's dictionary).

    They are followed through the family's own module and those that make masks and attention.
    """
    found: dict[int, tuple[set[str], dict[str, Any]]] = {}
    seen: set[CodeType] = set()
    todo: list[Any] = [f for kind in {type(m) for m in model.modules()} for f in methods(kind)]
    todo += attention_functions(model.config)
    while todo:
        function = todo.pop()
        todo += [getattr(function, "__wrapped__", None)] if function is not None else []
        if not isinstance(function, FunctionType) or function.__code__ in seen:
            continue
        seen.add(function.__code__)
        if function.__module__ not in (family.module, *_TRACED):
            continue
        values = function.__globals__
        names, _ = found.setdefault(id(values), (set(), values))
        for name in _names(function.__code__):
            value = values.get(name)
            if isinstance(value, (FunctionType, type)):
                names.add(name)
                todo.append(value)
    return [(sorted(names), values) for names, values in found.values() if names]


def names_read(model: nn.Module, found: list[tuple[list[str], dict[str, Any]]]) -> set[str]:
    """Every name and word in the code that calls of ``model``'s modules run, with the functions
    ``found`` by ``read_globals``: an attribute called by none of them is not read."""
    functions = [kind.forward for kind in {type(module) for module in model.modules()}]
    functions += attention_functions(model.config)  # type: ignore[arg-type]
    for names, values in found:
        functions += [values[name] for name in names]
    return {name for function in functions for code in _chain(function) for name in _words(code)}


def _words(code: CodeType) -> Iterable[str]:
    yield from _names(code)
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant


def _names(code: CodeType) -> Iterable[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
