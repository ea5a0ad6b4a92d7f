"""Detectors, segmentors, pose and depth networks by name or by a config file of mmdet or mmseg, at any width."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pickle import UnpicklingError
from typing import Any

import torch
from mmengine.config import ConfigDict
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DefaultScope

from kt.errors import UserError, nearest
from kt.models.build import normalisation_of_weights, slim
from kt.models.checkpoints import refused_code
from kt.models.configs import read_config_file
from kt.models.names import CONFIG_NETWORK, DENSE_NETWORKS, NETWORKS
from kt.stages import stages_of, without_widening

ModelConfig = dict[str, Any]
# Anchors of a Faster R-CNN are 8 strides large on images of this height. Smaller images have smaller objects, but
# anchors smaller than two strides would leave gaps between them.
ANCHOR_HEIGHT, LEAST_ANCHOR = 800, 2.0
COLOURS = 3


def _backbone(name: str, width: float, strides: Sequence[int], **options: Any) -> ModelConfig:
    return {"type": "StagedBackbone", "name": name, "width": width, "out_strides": list(strides), **options}


def _channels(name: str, width: float, widening: bool) -> dict[int, int]:
    """Channels of a network's maps at each of its strides; see `StagedBackbone` for `widening`."""
    from kt.models import build_network

    with torch.device("meta"):  # shapes alone
        network = build_network(name, num_classes=1, width=width)
    stages = stages_of(network) if widening else without_widening(stages_of(network))
    return {stage.stride: stage.channels for stage in stages}


def _detection_preprocessor(mean: Sequence[float], std: Sequence[float]) -> ModelConfig:
    return {
        "type": "DetDataPreprocessor",
        "mean": list(mean),
        "std": list(std),
        "bgr_to_rgb": True,
        "pad_size_divisor": 32,
    }


def _anchor_scale(height: int) -> float:
    return max(LEAST_ANCHOR, 8 * min(1.0, height / ANCHOR_HEIGHT))


def _delta_coder(*stds: float) -> ModelConfig:
    return {"type": "DeltaXYWHBBoxCoder", "target_means": [0.0] * 4, "target_stds": list(stds)}


def _assigner(positive: float, negative: float, least: float, low_quality: bool) -> ModelConfig:
    return {
        "type": "MaxIoUAssigner",
        "pos_iou_thr": positive,
        "neg_iou_thr": negative,
        "min_pos_iou": least,
        "match_low_quality": low_quality,
        # A proposal that lies mostly in an ignore region is neither a positive nor a negative.
        "ignore_iof_thr": 0.5,
    }


def _sampler(number: int, positive: float, with_truth: bool) -> ModelConfig:
    return {
        "type": "RandomSampler",
        "num": number,
        "pos_fraction": positive,
        "neg_pos_ub": -1,
        "add_gt_as_proposals": with_truth,
    }


def _fasterrcnn(backbone: ModelConfig, channels: list[int], classes: int, width: float, height: int) -> ModelConfig:
    """Faster R-CNN with a feature pyramid: Ren et al. 2015; Lin et al. 2017. Settings are mmdet's."""
    strides = backbone["out_strides"]
    neck, nms = slim(256, width), {"type": "nms", "iou_threshold": 0.7}
    proposals = {"nms_pre": 2000, "max_per_img": 1000, "nms": nms, "min_bbox_size": 0}
    anchors = {
        "type": "AnchorGenerator",
        "scales": [_anchor_scale(height)],
        "ratios": [0.5, 1.0, 2.0],
        "strides": [*strides, 2 * strides[-1]],
    }
    return {
        "type": "FasterRCNN",
        "backbone": backbone,
        "neck": {"type": "FPN", "in_channels": channels, "out_channels": neck, "num_outs": len(strides) + 1},
        "rpn_head": {
            "type": "RPNHead",
            "in_channels": neck,
            "feat_channels": neck,
            "anchor_generator": anchors,
            "bbox_coder": _delta_coder(1.0, 1.0, 1.0, 1.0),
            "loss_cls": {"type": "CrossEntropyLoss", "use_sigmoid": True, "loss_weight": 1.0},
            "loss_bbox": {"type": "L1Loss", "loss_weight": 1.0},
        },
        "roi_head": {
            "type": "StandardRoIHead",
            "bbox_roi_extractor": {
                "type": "SingleRoIExtractor",
                "roi_layer": {"type": "RoIAlign", "output_size": 7, "sampling_ratio": 0},
                "out_channels": neck,
                "featmap_strides": list(strides),
                "finest_scale": 7 * _anchor_scale(height),
            },
            "bbox_head": {
                "type": "Shared2FCBBoxHead",
                "in_channels": neck,
                "fc_out_channels": slim(1024, width),
                "roi_feat_size": 7,
                "num_classes": classes,
                "bbox_coder": _delta_coder(0.1, 0.1, 0.2, 0.2),
                "reg_class_agnostic": False,
                "loss_cls": {"type": "CrossEntropyLoss", "use_sigmoid": False, "loss_weight": 1.0},
                "loss_bbox": {"type": "L1Loss", "loss_weight": 1.0},
            },
        },
        "train_cfg": {
            "rpn": {
                "assigner": _assigner(0.7, 0.3, 0.3, True),
                "sampler": _sampler(256, 0.5, False),
                "allowed_border": -1,
                "pos_weight": -1,
                "debug": False,
            },
            "rpn_proposal": proposals if width == 1 else {**proposals, "nms_pre": 300, "max_per_img": 150},
            "rcnn": {
                "assigner": _assigner(0.5, 0.5, 0.5, False),
                "sampler": _sampler(512 if width == 1 else 64, 0.25, True),
                "pos_weight": -1,
                "debug": False,
            },
        },
        "test_cfg": {
            "rpn": {**proposals, "nms_pre": 1000 if width == 1 else 300, "max_per_img": 1000 if width == 1 else 150},
            "rcnn": {"score_thr": 0.05, "nms": {"type": "nms", "iou_threshold": 0.5}, "max_per_img": 100},
        },
    }


def _retinanet(backbone: ModelConfig, channels: list[int], classes: int, width: float, height: int) -> ModelConfig:
    """RetinaNet: Lin et al. 2017. Settings are mmdet's."""
    strides, neck = backbone["out_strides"], slim(256, width)
    levels = [*strides[1:], 2 * strides[-1], 4 * strides[-1]]
    return {
        "type": "RetinaNet",
        "backbone": backbone,
        "neck": {
            "type": "FPN",
            "in_channels": channels,
            "out_channels": neck,
            "start_level": 1,
            "add_extra_convs": "on_input",
            "num_outs": len(levels),
        },
        "bbox_head": {
            "type": "RetinaHead",
            "num_classes": classes,
            "in_channels": neck,
            "stacked_convs": 4,
            "feat_channels": neck,
            "anchor_generator": {
                "type": "AnchorGenerator",
                "octave_base_scale": _anchor_scale(height) / 2,
                "scales_per_octave": 3,
                "ratios": [0.5, 1.0, 2.0],
                "strides": levels,
            },
            "bbox_coder": _delta_coder(1.0, 1.0, 1.0, 1.0),
            "loss_cls": {"type": "FocalLoss", "use_sigmoid": True, "gamma": 2.0, "alpha": 0.25, "loss_weight": 1.0},
            "loss_bbox": {"type": "L1Loss", "loss_weight": 1.0},
        },
        "train_cfg": {
            "assigner": _assigner(0.5, 0.4, 0, True),
            "sampler": {"type": "PseudoSampler"},
            "allowed_border": -1,
            "pos_weight": -1,
            "debug": False,
        },
        "test_cfg": {
            "nms_pre": 1000,
            "min_bbox_size": 0,
            "score_thr": 0.05,
            "nms": {"type": "nms", "iou_threshold": 0.5},
            "max_per_img": 100,
        },
    }


def _segmentor(backbone: ModelConfig, head: ModelConfig, classes: int, **parts: Any) -> ModelConfig:
    common = {
        "num_classes": classes,
        "align_corners": False,
        "loss_decode": {"type": "CrossEntropyLoss", "use_sigmoid": False, "loss_weight": 1.0},
    }
    return {
        "type": "EncoderDecoder",
        "backbone": backbone,
        **parts,
        "decode_head": {**head, **common},
        "train_cfg": {},
        "test_cfg": {"mode": "whole"},
    }


def _semantic_fpn(backbone: ModelConfig, channels: list[int], classes: int, width: float, height: int) -> ModelConfig:
    """Semantic FPN: Kirillov et al. 2019. Settings are mmseg's."""
    strides, neck = backbone["out_strides"], slim(256, width)
    head = {
        "type": "FPNHead",
        "in_channels": [neck] * len(strides),
        "in_index": list(range(len(strides))),
        "feature_strides": list(strides),
        "channels": slim(128, width),
        "dropout_ratio": 0.1,
        "norm_cfg": {"type": "BN", "requires_grad": True},
    }
    neck_config = {"type": "FPN", "in_channels": channels, "out_channels": neck, "num_outs": len(strides)}
    return _segmentor(backbone, head, classes, neck=neck_config)


def _deeplabv2(backbone: ModelConfig, channels: list[int], classes: int, width: float, height: int) -> ModelConfig:
    """DeepLab v2, without its CRF: Chen et al. 2018; as Tsai et al. 2018 use it."""
    fc = slim(1024, width) if backbone["name"].startswith("vgg") else 0
    head = {"type": "DeepLabV2Head", "in_channels": channels[-1], "in_index": 0, "fc_channels": fc}
    return _segmentor(backbone, head, classes)


def _deeplabv3(backbone: ModelConfig, channels: list[int], classes: int, width: float, height: int) -> ModelConfig:
    """DeepLab v3: Chen et al. 2017. Settings are mmseg's, without the auxiliary head."""
    head = {
        "type": "ASPPHead",
        "in_channels": channels[-1],
        "in_index": 0,
        "channels": slim(512, width),
        "dilations": [1, 12, 24, 36],
        "dropout_ratio": 0.1,
        "norm_cfg": {"type": "BN", "requires_grad": True},
    }
    return _segmentor(backbone, head, classes)


def _pspnet(backbone: ModelConfig, channels: list[int], classes: int, width: float, height: int) -> ModelConfig:
    """PSPNet: Zhao et al. 2017. Settings are mmseg's, whose ResNet-18 has narrower heads."""
    wide, narrow = (128, 64) if backbone["name"] == "resnet18" else (512, 256)
    before, last = channels
    common = {"dropout_ratio": 0.1, "norm_cfg": {"type": "BN", "requires_grad": True}}
    head = {"type": "PSPHead", "in_channels": last, "in_index": 1, "channels": slim(wide, width), **common}
    auxiliary = {
        "type": "FCNHead",
        "in_channels": before,
        "in_index": 0,
        "channels": slim(narrow, width),
        "num_convs": 1,
        "concat_input": False,
        **common,
    }
    model = _segmentor(backbone, head, classes)
    loss = {**model["decode_head"]["loss_decode"], "loss_weight": 0.4}
    shared = {key: model["decode_head"][key] for key in ("num_classes", "align_corners")}
    return {**model, "auxiliary_head": {**auxiliary, **shared, "loss_decode": loss}}


def _pose(backbone: ModelConfig, channels: list[int], classes: int, width: float, height: int) -> ModelConfig:
    """A pose network with heatmaps; its backbone is what teaches.

    Kreiss et al. 2019 leave out the max-pool, so that its maps are twice as fine; slim ones keep it, to be quick.
    """
    backbone = {**backbone, "stem_pool": width < 1}
    return {"type": "PoseNetwork", "backbone": backbone, "in_channels": channels, "num_keypoints": classes}


def _depth(backbone: ModelConfig, channels: list[int], classes: int, width: float, height: int) -> ModelConfig:
    """Sparse-to-Dense: Ma and Karaman 2018."""
    return {"type": "DepthNetwork", "backbone": backbone, "in_channels": channels[-1]}


Architecture = Callable[[ModelConfig, list[int], int, float, int], ModelConfig]
ARCHITECTURES: dict[str, Architecture] = {
    "fasterrcnn": _fasterrcnn,
    "retinanet": _retinanet,
    "semantic_fpn": _semantic_fpn,
    "deeplabv2": _deeplabv2,
    "deeplabv3": _deeplabv3,
    "pspnet": _pspnet,
    "pose": _pose,
    "depth": _depth,
}
# How many of the deepest maps they read of a backbone that is dilated from stride 8 on.
DILATED = {"deeplabv2": 1, "deeplabv3": 1, "pspnet": 2}


def dense_config(
    name: str,
    num_classes: int,
    width: float,
    image_size: Sequence[int],
    normalisation: tuple[Sequence[float], Sequence[float]],
    pretrained: str | None = None,
) -> ModelConfig:
    """The `model` of a network's config, as mmdet or mmseg build it.

    Args:
        name: One of `kt.models.names.DENSE_NETWORKS`.
        num_classes: Classes without background; number of keypoints of a pose network; of no account for depth.
        width: Factor on every channel count.
        image_size: Height and width of the images.
        normalisation: `(mean, std)` per RGB channel for images in 0..1, where no pretrained weights have their own;
            behind them 0 and 1 for a fourth channel of measured depth, which stays as it is.
        pretrained: ImageNet weights of the backbone, whose batch normalisation then stays fixed but in a PSPNet and for
            depth, and in a detector its stem and first stage as well: mmdet's and Detectron's setting, and no good for
            weights that are random.

    Raises:
        UserError: There is no such network.
    """
    if name not in DENSE_NETWORKS:
        raise UserError(f"network.name={name!r}: there is no such network{nearest(name, list(DENSE_NETWORKS))}")
    spec = DENSE_NETWORKS[name]
    options: dict[str, Any] = {}
    inputs = len(normalisation[0])
    if pretrained:
        normalisation = normalisation_of_weights(spec.backbone, pretrained)
        options = {"pretrained": pretrained, "norm_eval": spec.architecture not in ("pspnet", "depth")}
        if spec.task == "detection":
            options["frozen_stride"] = 4
    if inputs > COLOURS:
        options["in_channels"] = inputs
    mean, std = ([255 * float(value) for value in values[:COLOURS]] for values in normalisation)
    if spec.architecture == "pspnet":
        options["widening"] = False
    channels = _channels(spec.backbone, width, options.get("widening", True))
    if spec.architecture in DILATED:
        strides, options["output_stride"] = sorted(channels)[-DILATED[spec.architecture] :], 8
    elif spec.task == "depth":
        strides = [max(channels)]
    else:
        # What a feature pyramid takes, as far as the network has it.
        strides = sorted(stride for stride in channels if 4 <= stride <= 32)
    backbone = _backbone(spec.backbone, width, strides, **options)
    taken = [channels[stride] for stride in strides]
    model = ARCHITECTURES[spec.architecture](backbone, taken, num_classes, width, image_size[0])
    if spec.task == "detection":
        model["data_preprocessor"] = _detection_preprocessor(mean, std)
    else:
        model["data_preprocessor"] = {
            "type": "SegDataPreProcessor",
            "mean": mean,
            "std": std,
            "bgr_to_rgb": True,
            "pad_val": 0,
            "seg_pad_val": 255,
            "size_divisor": 32,
        }
    if spec.task == "depth":
        model["data_preprocessor"] |= {"type": "DepthPreprocessor", "size_divisor": 1, "sparse": inputs > COLOURS}
    return model


def read_config(path: str, options: Mapping[str, Any] | None, num_classes: int) -> ModelConfig:
    """The `model` of a config file of mmdet or mmseg, with the dataset's number of classes.

    Args:
        path: The file, or the name of one of the libraries' own (`kt.models.configs.read_config_file`).
        options: Dotted key -> value below `model`, as on the libraries' own command lines.
        num_classes: Set wherever the config says `num_classes`.

    Raises:
        UserError: The file cannot be read or has no model, or an option names no key of it.
    """
    config = read_config_file(path, "network.config")
    config.merge_from_dict({f"model.{key}": value for key, value in (options or {}).items()})
    model: ModelConfig = config.model.to_dict()
    _set_classes(model, num_classes)
    return model


def _set_classes(part: Any, num_classes: int) -> None:
    if isinstance(part, dict):
        if "num_classes" in part:
            part["num_classes"] = num_classes
        for value in part.values():
            _set_classes(value, num_classes)
    elif isinstance(part, list):
        for value in part:
            _set_classes(value, num_classes)


def without_pretrained(model: Any) -> Any:
    """A model's config that builds it without fetching weights, for a network whose own lie in a file."""
    if isinstance(model, dict):
        return {
            key: None if key == "pretrained" or _is_pretrained(value) else without_pretrained(value)
            for key, value in model.items()
        }
    if isinstance(model, list):
        return [without_pretrained(part) for part in model if not _is_pretrained(part)]
    return model


def _is_pretrained(value: Any) -> bool:
    return isinstance(value, dict) and value.get("type") == "Pretrained"


@contextlib.contextmanager
def _weights_only() -> Iterator[None]:
    """Keeps mmengine from running what a file of weights names, which it does with all that torch refuses to read."""
    forced = {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "0"}
    before = {name: os.environ.get(name) for name in forced}
    os.environ.update(forced)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def build_dense(model: ModelConfig, key: str = "network") -> Any:
    """Builds and initialises a model of mmdet or mmseg. No code of the files of weights that it names is run.

    Args:
        model: Its config.
        key: What error messages call it.

    Raises:
        UserError: It cannot be built, or its pretrained weights cannot be had.
    """
    import mmseg.models  # noqa: F401 - both register their classes
    from mmdet.registry import MODELS as DETECTION
    from mmseg.registry import MODELS as SEGMENTATION

    import kt.models.backbone  # noqa: F401 - as above
    import kt.models.depth  # noqa: F401 - as above
    import kt.models.pose  # noqa: F401 - as above

    kind = str(model.get("type"))
    registry = DETECTION if DETECTION.get(kind) is not None else SEGMENTATION
    if registry.get(kind) is None:
        raise UserError(f"{key}: mmdet and mmseg know no model {kind!r}")
    try:
        # Both libraries have classes of the same names (FPN, ResNet): parts come from the model's own library.
        with DefaultScope.overwrite_default_scope(registry.scope):
            network = registry.build(ConfigDict(copy.deepcopy(model)))
    except UserError:
        raise
    except (TypeError, KeyError, ValueError, AssertionError, AttributeError) as error:
        lines = (str(error) or type(error).__name__).splitlines()
        raise UserError(f"{key}: {kind} cannot be built from this config ({lines[0]})") from None
    try:
        # mmengine would report every single parameter.
        logging.disable(logging.INFO)
        with _weights_only():
            network.init_weights()
    except UnpicklingError as error:
        name = refused_code(error) or "something"
        raise UserError(
            f"{key}: a file of weights that the config names holds {name}, code that is never run here; expected one "
            "with a state dict alone"
        ) from None
    except OSError as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{key}: the pretrained weights that the config names cannot be had ({reason}); set "
            'network.options={"backbone.init_cfg": null} to start from random weights'
        ) from None
    finally:
        logging.disable(logging.NOTSET)
    # Batch normalisation over processes needs GPUs; ranks exchange running statistics as for all other networks.
    return revert_sync_batchnorm(network)


def names_for(task: str) -> list[str]:
    """The networks for a task."""
    wanted = "detection" if task == "pedestrians" else task
    return [name for name, spec in DENSE_NETWORKS.items() if spec.task == wanted] + (
        [CONFIG_NETWORK] if wanted in ("detection", "segmentation") else []
    )


def backbone_of(name: str) -> str | None:
    """The backbone of a detector, segmentor, pose or depth network of `kt`; None for a classifier or a config file."""
    spec = DENSE_NETWORKS.get(name)
    return spec.backbone if spec and spec.backbone in NETWORKS else None


__all__ = [
    "ARCHITECTURES",
    "backbone_of",
    "build_dense",
    "dense_config",
    "names_for",
    "read_config",
    "without_pretrained",
]
