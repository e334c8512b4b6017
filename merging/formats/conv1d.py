"""Which layers of a base store their weight transposed: the ``Conv1D`` of transformers' GPT-2 and its like.

PEFT's configuration has one flag, ``fan_in_fan_out``, for all layers of an adapter, and PEFT 0.21 saves the
one that the layer it wrapped last needed. Where a model has both kinds of layers (GPT-2 with its head) the
flag is wrong for some of them. Between adapters that does not matter, but it does where an update meets the
weight of the base.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from merging.formats.loaded import Module

MODEL_TYPES = ("clvp", "decision_transformer", "gpt2", "imagegpt", "openai-gpt")
LAYERS = ("c_attn", "c_fc", "c_proj", "q_attn")


def oriented(
    modules: Mapping[str, Module], shapes: Mapping[str, tuple[int, ...]], model_type: str | None
) -> dict[str, Module]:
    """The modules with the orientation of the base's weights, whose ``shapes`` go by the name of the module.

    The shape decides, for square weights the kind of model and the name of the layer; where these say
    nothing the flag stays, and a shape that fits neither way is left for the caller to refuse.
    """
    found = {}
    for name, module in modules.items():
        shape, turned = shapes.get(name), module.fan_in_fan_out
        if module.kind == "linear" and module.expert is None and shape is not None:
            if module.m != module.n:
                turned = shape == (module.n, module.m)
            elif model_type in MODEL_TYPES:
                turned = _leaf(name) in LAYERS
            if turned != module.fan_in_fan_out:
                own = (module.n, module.m) if turned else (module.m, module.n)
                module = replace(module, fan_in_fan_out=turned, weight_shape=own)
        found[name] = module
    return found


def doubtful(names: Iterable[str]) -> bool:
    """Whether an adapter of these modules may have layers of both kinds."""
    leaves = {_leaf(name) in LAYERS for name in names}
    return len(leaves) == 2


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]
