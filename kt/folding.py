"""Frozen networks run without the normalisations that follow their convolutions.

In eval mode, batch normalisation is an affine map per channel with fixed numbers, so with a convolution before it, it
is a convolution. Its weights lie beside the network's own, in no state dict; parameters, statistics and modules stay
what they were, so everything that reads or copies those sees the network as it was trained.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from inspect import Parameter, signature
from types import MethodType
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights

WEIGHT, BIAS = "folded_weight", "folded_bias"
# timm's normalisation with dropout and an activation behind it.
NORM_AND_ACTIVATION = "timm.layers.norm_act.BatchNormAct2d"

# What children of a module follow one another, by what tells how the module runs.
_known: dict[str, list[tuple[str, str]]] = {}


class _Surface(fx.Tracer):
    """Sees how a module calls its children, whatever happens inside these."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def fold_norms(network: nn.Module) -> None:
    """Folds each batch normalisation that is in eval mode into the convolution that it follows, if it does.

    Again on a folded network, it takes over what parameters and statistics are now.

    Args:
        network: A frozen one. Convolutions must be such that `_conv_forward` with other weights is all that changes.
    """
    for convolution, norm in conv_norm_pairs(network):
        for name, value in zip((WEIGHT, BIAS), _weights(convolution, norm), strict=True):
            convolution.register_buffer(name, value.detach().to(convolution.weight), persistent=False)
        # Instance attributes, which a deep copy binds to the copied layers.
        convolution.__dict__["forward"] = MethodType(_folded_convolution, convolution)
        norm.__dict__["forward"] = MethodType(_folded_norm, norm)


def _weights(convolution: nn.Conv2d, norm: Any) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that does the work of both, in double precision."""
    layers = (convolution.weight, convolution.bias, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    weight, bias, mean, var, scale, shift = (None if each is None else each.double() for each in layers)
    found: list[Any] = [weight, bias, mean, var, norm.eps, scale, shift]
    return fuse_conv_bn_weights(*found)


def is_folded(norm: nn.Module) -> bool:
    """Whether a normalisation gives what it reads, since the layer before it has done its work."""
    return "forward" in vars(norm)


def conv_norm_pairs(network: nn.Module) -> list[tuple[nn.Conv2d, Any]]:
    """The convolutions of a network whose output is read by one batch normalisation in eval mode and nothing else."""
    modules = list(network.modules())
    parents = Counter(id(child) for module in modules for child in module._modules.values())
    found: list[tuple[nn.Conv2d, Any]] = []
    for module in modules:
        children: dict[str, Any] = {name: child for name, child in module._modules.items() if child is not None}
        if not any(map(_convolves, children.values())) or not any(map(_normalises, children.values())):
            continue
        for first, second in _followers(module):
            pair = children[first], children[second]
            if _convolves(pair[0]) and _normalises(pair[1]) and all(parents[id(layer)] == 1 for layer in pair):
                found.append(pair)
    return found


def _convolves(layer: Any) -> bool:
    """Whether a layer is a convolution whose weights could be others; hooks may change what it is given or gives."""
    return type(layer).forward is nn.Conv2d.forward and _bare(layer)


def _normalises(layer: Any) -> bool:
    """Whether a layer is an affine map by fixed statistics, but for dropout and an activation behind it."""
    kind = type(layer)
    known = kind.forward is _BatchNorm.forward or f"{kind.__module__}.{kind.__qualname__}" == NORM_AND_ACTIVATION
    return known and not layer.training and layer.running_mean is not None and _bare(layer)


def _bare(layer: nn.Module) -> bool:
    return not (layer._forward_pre_hooks or layer._forward_hooks)


def _followers(module: nn.Module) -> list[tuple[str, str]]:
    """Names of children of which the second one reads what the first gives, each called once and that by none else."""
    key = repr((type(module), [*_told(module)]))
    if key not in _known:
        _known[key] = [*_traced_followers(module)]
    return _known[key]


def _told(module: nn.Module) -> Iterator[Any]:
    """What may decide how a module calls its children: these, and its plain settings."""
    yield from ((name, type(child)) for name, child in module._modules.items())
    plain = (bool, int, float, str, tuple, type(None))
    yield from sorted((name, repr(value)) for name, value in vars(module).items() if isinstance(value, plain))


def _traced_followers(module: nn.Module) -> Iterator[tuple[str, str]]:
    try:
        parameters = signature(type(module).forward).parameters.values()
        usual = {each.name: each.default for each in parameters if each.default is not Parameter.empty}
        graph = _Surface().trace(module, usual)
    except Exception:  # of any kind, from others' code that no symbol can run through: such a module runs as it is
        return
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    # Children whose weights the module reads itself count as called once more.
    calls += Counter(str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr")
    for node in graph.nodes:
        first = node.args[0] if node.op == "call_module" and len(node.args) == 1 and not node.kwargs else None
        if not isinstance(first, fx.Node) or first.op != "call_module" or [*first.users] != [node]:
            continue
        if calls[first.target] == calls[node.target] == 1:
            yield str(first.target), str(node.target)


def _folded_convolution(self: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution and the normalisation behind it."""
    return self._conv_forward(x, self.get_buffer(WEIGHT), self.get_buffer(BIAS))


def _folded_norm(self: Any, x: Tensor) -> Tensor:
    """What is left of a normalisation: nothing, or timm's dropout and activation."""
    return x if type(self).forward is _BatchNorm.forward else self.act(self.drop(x))
