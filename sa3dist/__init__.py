"""Distributed LoRA trainer for Stable Audio 3: a zip of captioned clips goes in, one adapter file comes out."""

import importlib

__version__ = "0.1.0"

# Public names and the module each comes from, imported when first asked for: `import sa3dist` stays light.
_EXPORTS = {
    "load_base": "sa3dist.model.loading",
    "random_base": "sa3dist.model.random_weights",
    "write_tiny_base": "sa3dist.model.tiny",
    "attach_adapter": "sa3dist.adapters",
    "load_adapter": "sa3dist.adapters",
    "adapter_parameters": "sa3dist.adapters",
    "effective_weight": "sa3dist.adapters",
    "save_adapter": "sa3dist.adapters",
    "fal_env": "sa3dist.serve.client_env",
}


# Modules that are part of the public interface as such, with the same promise.
_SUBMODULES = ("flow",)


def __getattr__(name: str):
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted([*globals(), *_EXPORTS, *_SUBMODULES])
