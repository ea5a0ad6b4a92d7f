"""Detectors and segmentors: unmodified networks under every method that can teach them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

mmdet = pytest.importorskip("mmdet", reason="mmdet and mmseg are not installed (bash install.sh full)")

from mmengine.config import Config
from mmengine.registry import DefaultScope

from checks import Interrupt, bits, rows, without_speed
from dense_settings import (
    NORMALISATION,
    SCHEDULE,
    SETTINGS,
    SIZE,
    WIDTH,
    config_of,
    make_cell,
    make_data,
    make_model,
    make_network,
    make_teacher,
)
from experiments.build import build_student, build_teacher, check_described, describe_student
from kt.classifier import Classifier
from kt.data.dense import AVERAGE_PRECISIONS
from kt.dense import Backbone, DenseModel, Normaliser, as_teacher
from kt.engine import open_groups
from kt.errors import UserError
from kt.methods import build_method
from kt.models import NETWORKS, build_network
from kt.models.backbone import DeepLabV2Head, StagedBackbone
from kt.models.checkpoints import load_backbone
from kt.models.dense import build_dense, dense_config, read_config
from kt.models.names import DENSE_NETWORKS
from kt.stages import outputs_of, stages_of
from kt.train import fit
from kt.transfer import TransferModel

NAMES = sorted(SETTINGS)
TAUGHT = [name for name in NAMES if SETTINGS[name].teacher]
HYBRID = [name for name in NAMES if SETTINGS[name].method == "hybrid_forward"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Trains a setting once without interruption: `(folder, model, teachers' bits before, data)`."""
    done: dict[str, Any] = {}

    def train(name: str) -> Any:
        if name not in done:
            folder = tmp_path_factory.mktemp("run")
            model, data = make_model(name), make_data(SETTINGS[name].task)
            before = {key: bits(teacher.state_dict()) for key, teacher in model.teachers.items()}
            fit(model, data, folder, SCHEDULE)
            done[name] = (folder, model, before, data)
        return done[name]

    return train


@pytest.mark.parametrize("name", NAMES)
def test_trains(name: str, trained: Any) -> None:
    folder, model, _, _ = trained(name)
    phases = [phase.name for phase in model.method.phases()]
    assert list(dict.fromkeys(row["phase"] for row in rows(folder) if row["kind"] == "train")) == phases
    written = [row for row in rows(folder) if row["kind"] == "train" and row["phase"] == "train"]
    assert [row["step"] for row in written] == [1, 2, 3, 4]
    fresh = bits(make_model(name).student.network.state_dict())
    after = bits(model.student.network.state_dict())
    assert fresh.keys() == after.keys() and fresh != after
    if name in HYBRID:
        for row in written:
            expected = 2 * row["l3"] / (row["l1"] + row["l2"])
            assert row["balance"] == pytest.approx(expected, rel=1e-5)
            assert row["loss"] == pytest.approx(3 * row["l3"], rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_resumes_to_the_same_bits(name: str, trained: Any, tmp_path: Path) -> None:
    folder, *_, data = trained(name)
    with pytest.raises(KeyboardInterrupt):
        fit(make_model(name), data, tmp_path, SCHEDULE, extra_hooks=[Interrupt(3)])
    fit(make_model(name), data, tmp_path, SCHEDULE)
    assert bits(torch.load(tmp_path / "student.pth")) == bits(torch.load(folder / "student.pth"))
    assert without_speed(tmp_path) == without_speed(folder)


@pytest.mark.parametrize("name", TAUGHT)
def test_leaves_the_teacher_alone(name: str, trained: Any) -> None:
    _, model, before, _ = trained(name)
    assert {key: bits(teacher.state_dict()) for key, teacher in model.teachers.items()} == before
    assert not any("teacher" in key for key in model.state_dict() if "_to_teacher" not in key)


@pytest.mark.parametrize("name", NAMES)
def test_every_trained_parameter_gets_a_gradient(name: str) -> None:
    """DDP then needs no search for unused parameters; and no map that a head reads is left without its adapter."""
    model = make_model(name)
    batch = next(make_data(SETTINGS[name].task).train.epoch(0))
    for phase in model.method.phases():  # type: ignore[operator]
        if phase.loss is None:
            continue  # it goes under no DDP
        open_groups(model, phase)
        model.zero_grad()
        model.phase = phase
        loss, _ = model.train()(**batch, step=0, total=1, mode="loss")
        loss.backward()
        lacking = [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert lacking == [], phase.name


@pytest.mark.parametrize("name", NAMES)
def test_exports_into_the_plain_model(name: str, trained: Any, tmp_path: Path) -> None:
    """What mmdet or mmseg build from the student's config takes the weights strictly and predicts the same."""
    folder, model, _, data = trained(name)
    setting = SETTINGS[name]
    own = config_of(setting.student, setting.task)
    config = {"student": {"network": {"name": setting.student}}, "dataset": {"image_size": SIZE}}
    describe_student(tmp_path, config, model.student, own, data.spec)
    from mmdet.registry import MODELS as DETECTION
    from mmseg.registry import MODELS as SEGMENTATION

    read = Config.fromfile(tmp_path / "student_config.py")
    registry = DETECTION if setting.task in ("detection", "pedestrians") else SEGMENTATION
    with DefaultScope.overwrite_default_scope(registry.scope):
        plain = registry.build(read.model)
    plain.load_state_dict(torch.load(folder / "student.pth"), strict=True)
    batch = next(data.test.epoch(0))
    data_of = {key: batch[key] for key in ("inputs", "data_samples")}
    theirs = plain.eval().test_step(copy.deepcopy(data_of))
    ours = model.student.eval().predict(copy.deepcopy(data_of))
    for one, other in zip(theirs, ours, strict=True):
        if setting.task == "depth":
            assert torch.equal(one.pred_depth, other.pred_depth)
        elif setting.task == "segmentation":
            assert torch.equal(one.pred_sem_seg.data, other.pred_sem_seg.data)
        else:
            assert torch.equal(one.pred_instances.bboxes, other.pred_instances.bboxes)
            assert torch.equal(one.pred_instances.scores, other.pred_instances.scores)


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_end_with_equal_parameters(name: str, processes: Any) -> None:
    _, (first, second) = processes("dense_settings", name)
    assert first[4] == second[4] == ""
    assert first[2] == second[2] != first[1]
    assert first[3] == second[3]


def test_two_processes_are_one_with_the_doubled_batch(processes: Any, tmp_path: Path) -> None:
    """On a network without batch statistics; the dynamic balance is that of all ranks' losses."""
    name = "segmentor hybrid_forward, comparable"
    shared, answers = processes("dense_settings", name)
    assert [answer[4] for answer in answers] == ["", ""]
    model, data, schedule = make_cell(name, 0, 1)
    start = {key: value.clone() for key, value in model.student.network.state_dict().items()}
    fit(model, data, tmp_path, schedule)
    one, two = (torch.load(folder / "student.pth") for folder in (tmp_path, shared))
    for key, value in one.items():
        moved = (value - start[key]).abs().max()
        assert moved > 0, key
        assert (value - two[key]).abs().max() < 0.002 * moved, key
    for alone, other in zip(rows(tmp_path), rows(shared), strict=True):
        if alone["kind"] == "train":
            assert other["balance"] == pytest.approx(alone["balance"], rel=5e-6)


# ------------------------------------------------------------------------------------------------ routes and inputs


def test_the_routed_plain_pass_is_the_networks_own_loss() -> None:
    for name in ("deeplabv2_vgg16", "semantic_fpn_resnet18", "deeplabv3_resnet50"):
        model = make_network(name, "segmentation", 0).eval()
        batch = next(make_data("segmentation").train.epoch(0))
        prepared = model.prepare(copy.deepcopy(batch))
        ours = model.task(model.extract(prepared["inputs"]), prepared).loss
        own = model.network.data_preprocessor(
            {"inputs": batch["inputs"], "data_samples": batch["data_samples"]}, training=True
        )
        theirs, _ = model.network.parse_losses(model.network.loss(own["inputs"], own["data_samples"]))
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)


@pytest.mark.parametrize("bgr", [False, True])
def test_canonical_images_become_the_networks_own_input(bgr: bool) -> None:
    """Also where images of a batch differ in size: padding is what the network's preprocessor pads with."""
    config = dense_config("fasterrcnn_resnet18", 8, WIDTH, SIZE, NORMALISATION)
    config["data_preprocessor"] |= {"bgr_to_rgb": not bgr, "pad_value": 3.0}
    model = DenseModel(build_dense(config))
    data = make_data("detection")
    batch = next(data.train.epoch(0))
    batch["inputs"] = [batch["inputs"][0], batch["inputs"][1][:, :20, :40]]
    own = model.network.data_preprocessor(copy.deepcopy(batch), training=True)["inputs"]
    canonical = model.prepare(copy.deepcopy(batch))["inputs"]
    torch.testing.assert_close(model.normaliser(canonical), own)
    rgb = batch["inputs"][0].flip(0) / 255
    torch.testing.assert_close(canonical[0, :, : rgb.shape[1], : rgb.shape[2]], rgb)


def test_a_route_ends_with_its_pass_and_a_copy_has_its_own() -> None:
    model = make_network("semantic_fpn_resnet18", "segmentation", 0).eval()
    batch = model.prepare(next(make_data("segmentation").train.epoch(0)))
    levels = model.extract(batch["inputs"])
    twin = copy.deepcopy(model)
    model.task([level * 0 for level in levels], batch)
    x = model.normaliser(batch["inputs"])
    for fresh, level in zip(model.network.backbone(x), (levels[i] for i in model.outputs), strict=True):
        assert torch.equal(fresh, level)
    with torch.no_grad():
        next(iter(twin.network.backbone.parameters())).zero_()
    assert not torch.equal(twin.network.backbone(x)[0], model.network.backbone(x)[0])


@pytest.mark.parametrize("name", HYBRID)
def test_hybrid_passes_leave_running_statistics_alone(name: str) -> None:
    """After one step they are those of the plain pass alone."""
    taught, alone = make_model(name), make_model(name)
    batch = next(make_data(SETTINGS[name].task).train.epoch(0))
    taught.phase = taught.method.phases()[-1]  # type: ignore[operator]
    taught.train()(**copy.deepcopy(batch), mode="loss")
    alone.train()
    prepared = alone.student.prepare(copy.deepcopy(batch))
    alone.student.task(alone.student.extract(prepared["inputs"]), prepared)
    for (key, one), (_, other) in zip(
        taught.student.network.named_buffers(), alone.student.network.named_buffers(), strict=True
    ):
        assert torch.equal(one, other), key


def test_every_level_that_heads_read_comes_from_the_path() -> None:
    """With teacher stages that put out zeros, what a pyramid reads from them is the adapters' biases alone."""
    model = make_model("semantic fpn hybrid_forward")
    for stage in model.teacher.stages:
        for step in stage.steps:
            if isinstance(step, nn.Module):
                step.register_forward_hook(lambda module, inputs, output: torch.zeros_like(output))
    method: Any = model.method
    batch = model.student.prepare(next(make_data("segmentation").train.epoch(0)))
    seen: list[list[torch.Tensor]] = []
    task = model.student.task
    model.student.task = lambda levels, batch: (seen.append(list(levels)), task(levels, batch))[1]  # type: ignore[method-assign]
    model.train()
    method.loss(model, batch)
    plain, first, second = seen
    strides = [stage.stride for stage in model.student.stages]
    for index in model.student.reads:
        for number, levels in ((1, first), (2, second)):
            border = next(b for b, group in enumerate(method.groups) if index in group["student"])
            from_teacher = method.paths[number - 1][border] == "teacher"
            constant = bool((levels[index].std(dim=(2, 3)) < 1e-6).all())
            assert constant == from_teacher, (number, strides[index])
            assert levels[index].shape == plain[index].shape


# -------------------------------------------------------------------------------------------------------- backbones


def mm_backbones() -> list[tuple[str, Any]]:
    from mmdet.models.backbones import MobileNetV2, ResNet, ResNetV1d, ResNeXt
    from mmseg.models import backbones as mmseg

    three: dict[str, Any] = {"num_stages": 3, "strides": (1, 2, 2), "dilations": (1, 1, 1), "out_indices": (1, 2)}
    dilated: dict[str, Any] = {"strides": (1, 2, 2, 1, 1, 1, 1), "dilations": (1, 1, 1, 2, 2, 4, 4)}
    return [
        ("mmdet ResNet-18", lambda: ResNet(18)),
        ("mmdet ResNet-50, two maps", lambda: ResNet(50, **three)),
        ("mmdet ResNetV1d", lambda: ResNetV1d(depth=50)),
        ("mmdet ResNeXt", lambda: ResNeXt(depth=50, groups=32, base_width=4)),
        ("mmdet MobileNetV2", lambda: MobileNetV2(out_indices=(1, 2, 4, 6))),
        ("mmseg ResNetV1c, dilated", lambda: mmseg.ResNetV1c(depth=18, strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4))),
        ("mmseg MobileNetV2", lambda: mmseg.MobileNetV2(out_indices=(1, 2, 4, 6), **dilated)),
        ("kt StagedBackbone", lambda: StagedBackbone("mobilenet_v1", 0.25)),
    ]


@pytest.mark.parametrize("name", [name for name, _ in mm_backbones()])
def test_stages_of_a_backbone_are_its_forward(name: str) -> None:
    torch.manual_seed(0)
    network = dict(mm_backbones())[name]()
    network.eval()
    keys = list(network.state_dict())
    x = torch.randn(2, 3, 64, 96)
    expected = network(x)
    maps, y = [], x
    stages = stages_of(network)
    for stage in stages:
        pre, y = stage.both(y)
        maps.append(y)
        assert y.shape[1] == stage.channels
    for index, level in zip(outputs_of(network), expected, strict=True):
        torch.testing.assert_close(maps[index], level, rtol=0, atol=0)
    assert list(network.state_dict()) == keys
    strides = [stage.stride for stage in stages]
    assert strides == sorted(strides) and strides[0] == 2


def test_an_unknown_backbone_is_a_users_mistake() -> None:
    from mmdet.models.backbones import RegNet

    with pytest.raises(UserError, match="RegNet: its stages are unknown"):
        stages_of(RegNet("regnetx_400mf"))


@pytest.mark.parametrize("output_stride", [8, 16])
def test_dilation_is_that_of_torchvision(output_stride: int) -> None:
    from torchvision.models import resnet50

    torch.manual_seed(0)
    reference = resnet50(replace_stride_with_dilation=[False, output_stride == 8, True]).eval()
    backbone = StagedBackbone("resnet50", out_strides=(32,), output_stride=output_stride).eval()
    state = reference.state_dict()
    backbone.load_state_dict({key: state[plain] for key, plain in backbone.plain_names.items()})
    x = y = torch.randn(1, 3, 64, 96)
    for name in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"):
        y = getattr(reference, name)(y)
    torch.testing.assert_close(backbone(x)[0], y)


def test_a_dilated_vgg_is_that_of_tsai_et_al() -> None:
    """Without its fourth pool, the convolutions behind it dilated by 2."""
    reference = build_network("vgg16", 1, WIDTH)
    backbone = StagedBackbone("vgg16", WIDTH, out_strides=(16,), output_stride=8)
    state = reference.state_dict()
    backbone.load_state_dict({key: state[plain] for key, plain in backbone.plain_names.items()})
    x = y = torch.randn(1, 3, 64, 64)
    for number, layer in enumerate(reference.features[:30]):  # type: ignore[index]
        if number in (24, 26, 28):
            y = nn.functional.conv2d(y, layer.weight, layer.bias, padding=2, dilation=2)
        elif number != 23:
            y = layer(y)
    assert y.shape[-2:] == (8, 8)
    torch.testing.assert_close(backbone(x)[0], y)
    with pytest.raises(UserError, match=r"out_strides=\[32\]: vgg16 has the strides"):
        StagedBackbone("vgg16", out_strides=(32,))


def test_the_deeplab_v2_head_is_a_sum_of_dilated_classifiers() -> None:
    with DefaultScope.overwrite_default_scope("mmseg"):
        head = DeepLabV2Head(in_channels=4, in_index=0, num_classes=3, dilations=(1, 2))
    x = torch.randn(1, 4, 9, 9)
    expected = sum(
        nn.functional.conv2d(x, convolution.weight, convolution.bias, padding=rate, dilation=rate)
        for rate, convolution in zip((1, 2), head.pyramid, strict=True)
    )
    torch.testing.assert_close(head([x]), expected)


def test_fully_connected_layers_before_the_pyramid_are_dilated_convolutions() -> None:
    with DefaultScope.overwrite_default_scope("mmseg"):
        head = DeepLabV2Head(in_channels=4, in_index=0, num_classes=3, dilations=(1,), fc_channels=6)
    x, layers = torch.randn(1, 4, 12, 12), dict(head.named_modules())
    y = x
    for key in ("fc.0", "fc.2"):
        y = nn.functional.conv2d(y, layers[key].weight, layers[key].bias, padding=4, dilation=4).relu()
    torch.testing.assert_close(head([x]), head.pyramid[0](y))


SLIM = {
    "backbone.depth": 18,
    "backbone.init_cfg": None,
    "backbone.base_channels": 8,
    "backbone.frozen_stages": 1,
    "neck.in_channels": [8, 16, 32, 64],
}


def stock(name: str, options: dict[str, Any], num_classes: int) -> Any:
    """The model of one of mmdet's own configs, slimmed."""
    folder = Path(mmdet.__file__).parent / ".mim" / "configs"
    return read_config(str(folder / name), options, num_classes)


def test_a_stock_config_trains_unchanged_under_hybrid_forward(tmp_path: Path) -> None:
    model = stock("retinanet/retinanet_r50_fpn_1x_coco.py", SLIM, 8)
    assert model["bbox_head"]["num_classes"] == 8 and model["backbone"]["type"] == "ResNet"
    student, teacher = DenseModel(build_dense(model)), make_teacher("fasterrcnn_resnet18", "detection")
    method = build_method("hybrid_forward", student, teacher, balance="dynamic")
    transfer = TransferModel(student, method, {"teacher": teacher})
    frozen = bits(student.network.backbone.layer1.state_dict())
    head = bits(student.network.bbox_head.state_dict())
    metrics = fit(transfer, make_data("detection"), tmp_path, {**SCHEDULE, "iterations": 2})
    assert {"ap", "ap50", "ap75"} <= set(metrics) <= set(AVERAGE_PRECISIONS)
    assert bits(student.network.backbone.layer1.state_dict()) == frozen
    assert bits(student.network.bbox_head.state_dict()) != head


@pytest.fixture
def no_downloads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backbones with pretrained weights are built with random ones."""

    def build(name: str, num_classes: int, width: float, pretrained: str | None) -> nn.Module:
        return build_network(name, num_classes, width)

    monkeypatch.setattr("kt.models.backbone.build_network", build)


def test_weights_bring_their_normalisation_into_a_detector_and_back(no_downloads: None, tmp_path: Path) -> None:
    """Into its preprocessor, its exported config, and the teacher that is read from its files."""
    network = {"name": "fasterrcnn_mobilenet_v1", "width": WIDTH, "small_stem": False, "config": None, "options": None}
    student = {"network": network, "pretrained": NETWORKS["mobilenet_v1"].weights}
    config = {"seed": 0, "student": student, "teacher": {"network": network}, "dataset": {"image_size": SIZE}}
    spec = make_data("detection").spec
    detector, model = build_student(config, spec, None)
    describe_student(tmp_path, config, detector, model, spec)
    torch.save(detector.network.state_dict(), tmp_path / "student.pth")
    own = Config.fromfile(tmp_path / "student_config.py").model.data_preprocessor
    assert [own.mean, own.std] == [[127.5] * 3] * 2
    for each in (detector, build_teacher(config, spec, tmp_path / "student.pth")):
        assert isinstance(each, DenseModel)
        assert each.normaliser.mean.unique().tolist() == each.normaliser.std.unique().tolist() == [127.5]
        assert each.network.data_preprocessor.mean.unique().tolist() == [127.5]
    drawn, _ = build_student({**config, "student": {"network": network}}, spec, None)
    torch.testing.assert_close(drawn.normaliser.in_rgb(), (list(spec.mean), list(spec.std)), rtol=0, atol=0)


def test_a_description_gives_the_normalisation_of_a_network_that_reads_bgr() -> None:
    assert Normaliser([103.53, 116.28, 123.675], [1.0, 2.0, 255.0], bgr=True).in_rgb() == (
        [0.485, 0.456, 0.406],
        [1.0, round(2 / 255, 6), round(1 / 255, 6)],
    )


@pytest.mark.parametrize("name", DENSE_NETWORKS)
def test_weights_freeze_the_stem_and_first_stage_of_detectors_alone(name: str, no_downloads: None) -> None:
    spec = DENSE_NETWORKS[name]
    for weights in (NETWORKS[spec.backbone].weights, None):
        config = dense_config(name, 8, WIDTH, SIZE, NORMALISATION, weights)
        model = DenseModel(build_dense(config)).train()
        frozen = [stage.stride for stage in model.stages if not any(p.requires_grad for p in stage.parameters())]
        assert frozen == ([2, 4] if weights and spec.task == "detection" else [])
        assert not any(part.training for stage in model.stages for part in stage.modules() if stage.stride in frozen)


def test_frozen_stages_of_a_detector_stay_frozen(tmp_path: Path) -> None:
    model = stock("_base_/models/faster-rcnn_r50_fpn.py", SLIM, 8)
    student = DenseModel(build_dense(model))
    transfer = TransferModel(student, build_method("none", student, None))
    stem = bits(student.network.backbone.conv1.state_dict())
    fit(transfer, make_data("detection"), tmp_path, {**SCHEDULE, "iterations": 2})
    assert bits(student.network.backbone.conv1.state_dict()) == stem


@pytest.mark.parametrize(
    "path,options,message",
    [
        ("nowhere.py", {}, "network.config=.*nowhere.py: there is no such file"),
        ("broken.py", {}, "network.config=.*broken.py: cannot be read as a config"),
        ("empty.py", {}, "network.config=.*empty.py: expected a config with a `model`"),
        ("retinanet_r50_fpn_1x_cocoo", {}, "there is no such file; .* 'retinanet_r50_fpn_1x_coco.py'"),
        ("mmdet::voc0712.py", {}, "expected one of mmdet::_base_/datasets/voc0712.py, mmdet::dsdl/voc0712.py"),
    ],
)
def test_wrong_config_files_are_users_mistakes(path: str, options: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("model = {")
    (tmp_path / "empty.py").write_text("lr = 1")
    with pytest.raises(UserError, match=message) as caught:
        read_config(str(tmp_path / path) if path.endswith(".py") and "::" not in path else path, options, 3)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["retinanet_r50_fpn_1x_coco", "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py"])
def test_configs_of_the_libraries_go_by_name(name: str) -> None:
    assert read_config(name, SLIM, 8) == stock("retinanet/retinanet_r50_fpn_1x_coco.py", SLIM, 8)


def test_a_described_network_has_to_learn_from_the_data() -> None:
    student, data = (
        DenseModel(build_dense(stock("_base_/models/faster-rcnn_r50_fpn.py", SLIM, 8))),
        make_data("detection"),
    )
    before = bits(student.state_dict())
    check_described(student, data, "own.py")
    assert bits(student.state_dict()) == before and student.training
    words = "student.network.config=own.py: describes no network for"
    with pytest.raises(
        UserError, match=f"^{words} segmentation that could be trained [(]AttributeError: [^\n]*gt_inst"
    ):
        check_described(student, make_data("segmentation"), "own.py")
    student.network.rpn_head.rpn_conv = nn.Conv2d(9, 9, 1)
    with pytest.raises(UserError, match=f"^{words} detection that could be trained [(]RuntimeError: [^\n]*channels"):
        check_described(student, data, "own.py")


def test_a_model_that_cannot_be_built_is_a_users_mistake() -> None:
    with pytest.raises(UserError, match="mmdet and mmseg know no model 'FasterRNN'"):
        build_dense({"type": "FasterRNN"})
    model = stock("_base_/models/faster-rcnn_r50_fpn.py", SLIM, 8)
    del model["neck"]["in_channels"]
    with pytest.raises(UserError, match="FasterRCNN cannot be built from this config"):
        build_dense(model)


# ------------------------------------------------------------------------------------------------------ checkpoints


def openpifpaf_key(key: str, release: str) -> str:
    """A torchvision ResNet's key as OpenPifPaf's files have it."""
    stem = {"conv1": 0, "bn1": 1}
    first, _, rest = key.partition(".")
    if release == "0.8":
        place = f"input_block.{stem[first]}" if first in stem else f"block{int(first[-1]) + 1}"
    else:
        place = f"net.{stem[first]}" if first in stem else f"net.{int(first[-1]) + 3}"
    return f"base_net.{place}.{rest}"


FORMS = [
    "torchvision",
    "mmdet",
    "openpifpaf 0.8",
    "openpifpaf 0.3",
    "kt",
    "module.model.backbone.",
    "net.",
    "architecture.",
]


@pytest.mark.parametrize("form", FORMS)
def test_backbones_load_from_whatever_they_are_part_of(form: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = build_network("resnet18", num_classes=5, width=WIDTH)
    state: dict[str, torch.Tensor] = dict(source.state_dict())
    body = {key: value for key, value in state.items() if not key.startswith("fc.")}
    backbone = StagedBackbone("resnet18", WIDTH)
    if form == "mmdet":
        state = {f"backbone.{key}": value for key, value in body.items()} | {"neck.x": torch.zeros(1)}
    elif form.startswith("openpifpaf"):
        state = {openpifpaf_key(key, form.split()[1]): value for key, value in body.items()}
        state["head_nets.0.conv.weight"] = torch.zeros(1)
    elif form == "kt":
        state = {f"backbone.{key}": state[plain] for key, plain in backbone.plain_names.items()}
    elif form.endswith("."):
        state = {form + key: value for key, value in body.items() if not key.endswith("num_batches_tracked")}
    torch.save({"state_dict": state} if form == "mmdet" else state, tmp_path / "file.pth")
    load_backbone(backbone, tmp_path / "file.pth", "teacher.checkpoint")
    for key, plain in backbone.plain_names.items():
        assert torch.equal(backbone.state_dict()[key], source.state_dict()[plain])


class Shell(torch.nn.Module):
    """A network whose parts have the names of OpenPifPaf's."""

    def __init__(self) -> None:
        super().__init__()
        body = build_network("resnet18", num_classes=5, width=WIDTH)
        blocks = {f"block{i + 1}": getattr(body, f"layer{i}") for i in range(1, 5)}
        stem = torch.nn.Sequential(body.conv1, body.bn1, body.relu, body.maxpool)
        self.base_net = torch.nn.ModuleDict({"input_block": stem, **blocks})


def test_a_file_of_openpifpaf_says_how_it_is_converted(tmp_path: Path) -> None:
    """A pickled module: its class would have to be imported."""
    backbone, source, path = StagedBackbone("resnet18", WIDTH), Shell(), tmp_path / "resnet18.pkl"
    torch.save({"model": source, "epoch": 3}, path)
    with pytest.raises(
        UserError, match=r"holds test_dense.Shell, code that is never run here; .*: import torch"
    ) as caught:
        load_backbone(backbone, path, "teacher.checkpoint")
    assert "\n" not in str(caught.value)
    exec(str(caught.value).partition("installed: ")[2], {})
    load_backbone(backbone, path.with_suffix(".weights.pth"), "teacher.checkpoint")
    last = backbone.state_dict()["stages.4.0.1.conv2.weight"]
    assert torch.equal(last, source.state_dict()["base_net.block5.1.conv2.weight"])


def test_a_checkpoint_without_this_backbone_is_refused(tmp_path: Path) -> None:
    torch.save(build_network("resnet34", num_classes=5, width=WIDTH).state_dict(), tmp_path / "file.pth")
    backbone = StagedBackbone("resnet50", WIDTH)
    shapes = r"layer1.0.conv1.weight|stages\S+ is \(.*\) in the file and \(.*\) in the network"
    with pytest.raises(UserError, match=f"teacher.checkpoint=.*does not hold this backbone .*({shapes})") as caught:
        load_backbone(backbone, tmp_path / "file.pth", "teacher.checkpoint")
    assert "\n" not in str(caught.value)


def test_a_classifier_can_teach_a_detector() -> None:
    torch.manual_seed(0)
    classifier = Classifier(build_network("resnet18", num_classes=5, width=WIDTH)).eval()
    teacher = as_teacher(classifier)
    assert isinstance(teacher, Backbone)
    images = torch.rand(2, 3, 64, 64)
    for one, other in zip(teacher.extract(images), classifier.extract(images), strict=True):
        torch.testing.assert_close(one, other)
    padded = torch.nn.functional.pad(images, (0, 32), value=float("nan"))
    assert torch.isfinite(teacher.extract(padded)[-1]).all()


@pytest.mark.parametrize("name", ["ab", "crd", "l2t"])
def test_methods_for_classifiers_refuse_detectors(name: str) -> None:
    student = make_network("fasterrcnn_resnet18", "detection", 0)
    with pytest.raises(UserError, match="choose at, distpro, distpro_search, fitnet, hybrid_forward, ifvd, kcd, l2, "):
        build_method(name, student, make_teacher("fasterrcnn_resnet18", "detection"))


def test_a_hint_stage_before_a_detectors_training_is_refused() -> None:
    student = make_network("fasterrcnn_resnet18", "detection", 0)
    with pytest.raises(UserError, match="^method.init_fraction=0.5: expected null; KD teaches classifiers only$"):
        build_method("fitnet", student, make_teacher("fasterrcnn_resnet18", "detection"), init_fraction=0.5)
