"""Any mmdet detector or mmseg segmentor as a student or a teacher, from its own config and without changes to it.

The network keeps its modules, its state dict and its `loss()`. One thing is added, once: its backbone's forward returns
the feature maps that a route holds, if there is one. So features of any origin go through the network's own neck, heads
and losses, and everything else about the network stays what mmdet or mmseg made it.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from types import MethodType
from typing import Any

import torch
from mmengine.model import BaseModel
from torch import Tensor, nn

from kt.classifier import Classifier, Pixels, TaskOutput
from kt.errors import UserError
from kt.precision import in_own_precision, views_in
from kt.stages import Stage, outputs_of, run_stages, stages_of

ROUTE = "_kt_route"


def _routed_forward(backbone: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The backbone's own forward, unless a route holds the maps it is to return."""
    route = backbone.__dict__.get(ROUTE)
    return type(backbone).forward(backbone, *args, **kwargs) if route is None else route


@contextlib.contextmanager
def routed(backbone: nn.Module, maps: tuple[Tensor, ...]) -> Iterator[None]:
    """Within, the backbone returns these maps, whatever it is given."""
    backbone.__dict__[ROUTE] = maps
    try:
        yield
    finally:
        backbone.__dict__[ROUTE] = None


@contextlib.contextmanager
def tapped(layer: nn.Module | None) -> Iterator[list[Pixels]]:
    """Within, whatever a layer reads and gives is put into a list."""
    seen: list[Pixels] = []
    if layer is None:
        yield seen
        return
    handle = layer.register_forward_hook(lambda _, inputs, output: seen.append(Pixels(inputs[0], output)))
    try:
        yield seen
    finally:
        handle.remove()


class Normaliser(nn.Module):
    """Images as a network wants them, from images (n, 3, h, w) in RGB, 0..1, whose padding is NaN.

    Padding has no colour: every network fills it with its own value after normalising, as its own preprocessor does. A
    fourth channel, measured depth in metres, goes as it is to networks that read it.

    Args:
        mean, std: Per channel in the network's channel order, for values in 0..255.
        bgr: Whether the network reads BGR.
        pad_value: What the network's padding holds after normalising.
        sparse: Whether the network reads measured depth.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        bgr: bool = False,
        pad_value: float = 0.0,
        sparse: bool = False,
    ):
        super().__init__()
        # Not persistent: state dicts stay the plain network's.
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, 3, 1, 1), persistent=False)
        self.bgr, self.pad_value, self.sparse = bgr, pad_value, sparse

    def in_rgb(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation per RGB channel for images in 0..1; single precision holds six decimals.

        Where the network reads measured depth, 0 and 1 follow, as `kt.models.dense.dense_config` has it.
        """
        found = ([round(value / 255, 6) for value in each.flatten().tolist()] for each in (self.mean, self.std))
        mean, std = (values[::-1] if self.bgr else values for values in found)
        return (mean + [0.0], std + [1.0]) if self.sparse else (mean, std)

    def forward(self, images: Tensor) -> Tensor:
        """The network's input."""
        colours, measured = images[:, :3], images[:, 3:]
        colours = colours.flip(1) if self.bgr else colours
        colours = torch.nan_to_num((colours * 255 - self.mean) / self.std, nan=self.pad_value)
        return torch.cat([colours, measured], 1) if self.sparse else colours


def _read_preprocessor(preprocessor: Any) -> Normaliser:
    """The normalisation that a mmdet or mmseg data preprocessor applies; it is fed with BGR images."""
    mean, std = [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]
    if preprocessor._enable_normalize:
        mean, std = preprocessor.mean.flatten().tolist(), preprocessor.std.flatten().tolist()
    pad_value = getattr(preprocessor, "pad_val", preprocessor.pad_value)
    sparse = getattr(preprocessor, "sparse", False)
    return Normaliser(mean, std, not preprocessor._channel_conversion, float(pad_value), sparse)


def _neutral(preprocessor: Any) -> Any:
    """A copy of a preprocessor that pads and collates alike but leaves images in RGB, 0..1, and padding at NaN."""
    neutral = copy.deepcopy(preprocessor)
    neutral._channel_conversion = neutral._enable_normalize = True
    neutral.register_buffer("mean", torch.zeros(3, 1, 1), persistent=False)
    neutral.register_buffer("std", torch.full((3, 1, 1), 255.0), persistent=False)
    for name in ("pad_value", "pad_val"):
        if hasattr(neutral, name):
            setattr(neutral, name, float("nan"))
    return neutral


def _read_by_heads(network: Any, outputs: Sequence[int]) -> list[int]:
    """Those of the backbone's outputs that a loss can depend on: necks and heads may leave out the first ones."""
    neck = getattr(network, "neck", None)
    if neck is not None:
        return list(outputs[getattr(neck, "start_level", 0) :])
    heads = [getattr(network, name, None) for name in ("decode_head", "auxiliary_head")]
    flat = [
        part for head in heads if head is not None for part in (head if isinstance(head, nn.ModuleList) else [head])
    ]
    chosen: set[int] = set()
    for head in flat:
        index = getattr(head, "in_index", range(len(outputs)))
        chosen |= {outputs[i] for i in ([index] if isinstance(index, int) else index)}
    return sorted(chosen) if flat else list(outputs)


class Backbone(BaseModel):
    """Stages and an input normalisation: all that hybrid forward and feature mimicking ask of a teacher.

    Args:
        network: Anything with stages: a classifier's network or a backbone of mmdet or mmseg.
        normaliser: Makes its input.
    """

    # Operators of mmcv (RoI align, deformable convolution) read memory as (n, c, h, w) whatever a tensor's strides are:
    # in channels_last they silently compute something else.
    memory_format = torch.contiguous_format
    precision = "fp32"  # of a frozen network's stages and what it makes of them, see `kt.precision`

    def __init__(self, network: nn.Module, normaliser: Normaliser):
        super().__init__()
        self.network: Any = network
        self.normaliser = normaliser

    def __getstate__(self) -> dict[str, Any]:
        # The views hold modules of this very network: a copy must make its own.
        return {key: value for key, value in self.__dict__.items() if key != "_stages"}

    @property
    def _features(self) -> nn.Module:
        return self.network

    @property
    def stages(self) -> list[Stage]:
        """Views of the network's stages, in order."""
        if "_stages" not in self.__dict__:
            self.__dict__["_stages"] = views_in(self.precision, *stages_of(self._features))
        return self.__dict__["_stages"]

    def normalise(self, inputs: Tensor) -> Tensor:
        """Images in RGB, 0..1, padding NaN, as this network wants to see them."""
        return self.normaliser(inputs)

    def extract(self, inputs: Tensor, depth: int | None = None) -> list[Tensor]:
        """Outputs of the first `depth` stages (all by default) for images in RGB, 0..1, padding NaN."""
        return run_stages(self.stages[:depth], self.normalise(inputs))

    def forward(self, inputs: Tensor, data_samples: Any = None, mode: str = "tensor") -> Any:
        """The stages' outputs; there is nothing else to ask for."""
        return self.extract(inputs)


class DenseModel(Backbone):
    """Wraps a detector or segmentor; its parameters are the network's and nothing else.

    Args:
        network: A model of mmdet or mmseg (or one that is built like theirs: `backbone`, `data_preprocessor`,
            `loss(inputs, data_samples)`, `test_step(data)`).

    Raises:
        UserError: Nobody has said how to cut its backbone into stages.
    """

    def __init__(self, network: Any):
        super().__init__(network, _read_preprocessor(network.data_preprocessor))
        self.neutral = _neutral(network.data_preprocessor)
        backbone = network.backbone
        self.outputs = outputs_of(backbone)
        self.reads = _read_by_heads(network, self.outputs)
        # An instance attribute, which a deep copy binds to the copied backbone.
        backbone.forward = MethodType(_routed_forward, backbone)
        backbone.__dict__[ROUTE] = None
        staged = {id(parameter) for stage in self.stages for parameter in stage.parameters()}
        for parameter in backbone.parameters():
            if id(parameter) not in staged:
                # Layers behind the last map that is read (mmdet's MobileNetV2 has one) never get a gradient.
                parameter.requires_grad_(False)

    @property
    def _features(self) -> nn.Module:
        return self.network.backbone

    @property
    def stages(self) -> list[Stage]:
        """Views of the backbone's stages, in order, as deep as the heads read."""
        return super().stages[: max(self.reads) + 1]

    def prepare(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """A batch as mmdet's and mmseg's loaders make it, collated for training.

        Args:
            batch: `inputs` (list of uint8 (3, h, w), BGR) and `data_samples`, as the libraries' pipelines pack them.

        Returns:
            The batch with `inputs` (n, 3, h, w) in RGB, 0..1, padding NaN, and data samples that know their padding.
        """
        data = {"inputs": batch["inputs"], "data_samples": batch["data_samples"]}
        return {**batch, **self.neutral(data, training=True)}

    def task(self, levels: Sequence[Tensor], batch: Mapping[str, Any]) -> TaskOutput:
        """The network's own losses on stage outputs, whoever made them; only the stages that its heads read matter.

        Args:
            levels: One map per stage; those that the network does not read are ignored.
            batch: A prepared batch.
        """
        seen, depth = list[Pixels](), None
        if self.gives_depth:
            depth = self.depth(levels, batch["inputs"])
            losses = self.network.compare(depth, batch["data_samples"])
        else:
            with self._routed(levels), tapped(self.pixel_classifier) as seen:
                losses = self.network.loss(batch["inputs"], batch["data_samples"])
        total, terms = self.network.parse_losses(losses)
        scalars = {name: value for name, value in terms.items() if name != "loss"}
        return TaskOutput(total, None, scalars, seen[-1] if seen else None, depth)

    @property
    def pixel_classifier(self) -> nn.Conv2d | None:
        """The last layer of a segmentor's decode head, where that is a convolution to class scores."""
        layer = getattr(getattr(self.network, "decode_head", None), "conv_seg", None)
        return layer if isinstance(layer, nn.Conv2d) else None

    @in_own_precision
    def pixels(self, levels: Sequence[Tensor]) -> Pixels:
        """What a segmentor's decode head reads and gives at each pixel, for the outputs of all stages."""
        with self._routed(levels), tapped(self.pixel_classifier) as seen:
            self.network.decode_head(self.network.extract_feat(levels[0]))
        return seen[-1]

    def _routed(self, levels: Sequence[Tensor]) -> contextlib.AbstractContextManager:
        """Within, the backbone returns those of its stages' outputs that it always does."""
        return routed(self.network.backbone, tuple(levels[index] for index in self.outputs))

    @property
    def gives_depth(self) -> bool:
        """Whether it is a depth network (`kt.models.depth`)."""
        return hasattr(self.network, "decode_depth")

    @in_own_precision
    def depth(self, levels: Sequence[Tensor], inputs: Tensor) -> Tensor:
        """A depth network's answer in metres, (n, h, w), on stage outputs for images (n, c, h, w)."""
        return self.network.decode_depth([levels[index] for index in self.outputs], inputs.shape[-2:])

    def predict(self, batch: Mapping[str, Any]) -> list:
        """Data samples with predictions: exactly the plain network's `test_step`."""
        return self.network.test_step({"inputs": batch["inputs"], "data_samples": batch["data_samples"]})

    def forward(self, inputs: Any, data_samples: Any = None, mode: str = "tensor") -> Any:
        """What the plain network gives."""
        return self.network(inputs, data_samples, mode=mode)


def as_teacher(model: Classifier | DenseModel) -> Classifier | DenseModel | Backbone:
    """A model that can teach a detector or segmentor: a classifier gives its stages and its normalisation."""
    if isinstance(model, Backbone):
        return model
    mean, std = (buffer.flatten() * 255 for buffer in (model.mean, model.std))
    return Backbone(model.network, Normaliser(mean.tolist(), std.tolist()))


def check_dense(network: Any, key: str) -> None:
    """Refuses a model that does not look like mmdet's or mmseg's.

    Raises:
        UserError: A part is missing.
    """
    missing = [name for name in ("backbone", "data_preprocessor", "loss", "test_step") if not hasattr(network, name)]
    if missing:
        kind = type(network).__name__
        raise UserError(f"{key}={kind}: expected a detector or segmentor with a backbone; it has no {missing[0]}")
