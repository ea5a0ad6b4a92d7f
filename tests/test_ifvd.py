"""IFVD: its formulas against loops in NumPy, the tap of the decode head, and what it is around."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.special import rel_entr, softmax

pytest.importorskip("mmseg", reason="mmdet and mmseg are not installed (bash install.sh full)")

import mmseg
from mmengine.config import Config
from mmengine.registry import DefaultScope

from configs import composed, table
from dense_settings import CLASSES, NORMALISATION, SIZE, WIDTH, make_data, make_model, make_network
from experiments.build import build_teacher
from experiments.meaning import identity, needs_of, settle
from kt.engine import Engine, measured_loop
from kt.errors import UserError
from kt.features import Features
from kt.functional import class_similarity, intra_class_variation, pixel_soft_target
from kt.methods import build_method
from kt.methods.ifvd import labels_of
from kt.mm import KnowledgeTransfer
from kt.models.dense import dense_config
from kt.settings import Schedule, defaults
from method_settings import make_classifier

# ------------------------------------------------------------------------------------------------------------ formulas


def drawn(images: int = 3, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features of a student and of a wider teacher, and labels of which some are ignored."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        torch.randn(images, channels, 5, 6, generator=generator, dtype=torch.float64) for channels in (3, 7)
    )
    labels = torch.randint(classes + 1, (images, 5, 6), generator=generator)
    return student, teacher, torch.where(labels == classes, 255, labels)


def loop_of(feature: NDArray, labels: NDArray, classes: int) -> NDArray:
    """The definition, pixel by pixel."""
    found = np.ones(labels.shape)
    for n, y, x in np.ndindex(*labels.shape):
        if labels[n, y, x] < classes:
            own = feature[n][:, labels[n] == labels[n, y, x]].mean(1)
            pixel = feature[n, :, y, x]
            found[n, y, x] = pixel @ own / (np.linalg.norm(pixel) * np.linalg.norm(own))
    return found


def test_class_similarity_is_the_definition() -> None:
    student, teacher, labels = drawn()
    for feature in (student, teacher):
        expected = loop_of(feature.numpy(), labels.numpy(), 4)
        np.testing.assert_allclose(class_similarity(feature, labels, 4).numpy(), expected, rtol=1e-10)
    ours, theirs = (loop_of(each.numpy(), labels.numpy(), 4) for each in (student, teacher))
    found = intra_class_variation(student, teacher, labels, 4)
    assert found.item() == pytest.approx(((ours - theirs) ** 2).mean(), rel=1e-10)


def test_one_class_of_constant_features_does_not_vary() -> None:
    student, teacher = torch.rand(2, 3, 1, 1).expand(2, 3, 5, 6), torch.rand(2, 7, 1, 1).expand(2, 7, 5, 6)
    labels = torch.zeros(2, 5, 6, dtype=torch.long)
    assert intra_class_variation(student, teacher, labels, 4).item() == pytest.approx(0, abs=1e-12)


def test_the_order_of_pixels_within_a_class_is_of_no_account() -> None:
    student, teacher, labels = drawn(1)
    before = intra_class_variation(student, teacher, labels, 4)
    order = torch.arange(30)
    for label in labels.unique():
        places = (labels.flatten() == label).nonzero().flatten()
        order[places] = places.roll(1)
    moved = [each.flatten(2)[:, :, order].view_as(each) for each in (student, teacher)]
    assert (order != torch.arange(30)).sum() > 20
    torch.testing.assert_close(intra_class_variation(*moved, labels, 4), before)


def test_an_ignored_image_gives_nothing() -> None:
    """Nor does a pixel whose features are all zero give anything that is no number."""
    student, teacher, labels = drawn(2)
    student[1, :, 0, 0] = 0
    labels[0] = 255
    student.requires_grad_()
    intra_class_variation(student[:1], teacher[:1], labels[:1], 4).backward()
    assert student.grad is not None and student.grad.abs().max() == 0
    loss = intra_class_variation(student, teacher, labels, 4)
    loss.backward()
    assert loss > 0 and torch.isfinite(student.grad).all()
    alone = intra_class_variation(student[1:], teacher[1:], labels[1:], 4)
    assert loss.item() == pytest.approx(alone.item() / 2)


def test_soft_labels_are_a_mean_over_pixels_and_classes() -> None:
    ours, theirs = torch.randn(2, 2, 5, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = rel_entr(softmax(theirs.numpy(), 1), softmax(ours.numpy(), 1)).mean()
    assert pixel_soft_target(ours, theirs).item() == pytest.approx(expected, rel=1e-10)
    assert pixel_soft_target(ours, ours + 3).item() == pytest.approx(0, abs=1e-12)


def test_a_map_has_the_labels_of_the_nearest_pixels() -> None:
    batch = make_network("pspnet_resnet18", "segmentation", 0).prepare(next(make_data("segmentation").train.epoch(0)))
    truth = np.stack([sample.gt_sem_seg.data[0].numpy() for sample in batch["data_samples"]])
    truth[0, 8, 8] = 255
    batch["data_samples"][0].gt_sem_seg.data[0, 8, 8] = 255
    found = labels_of(batch, torch.Size((4, 8)))
    np.testing.assert_array_equal(found.numpy(), truth[:, ::8, ::8])
    assert found[0, 1, 1] == 255 and len(found.unique()) > 2


# ------------------------------------------------------------------------------------------------------------- networks


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("pspnet_resnet101", "pspnet/pspnet_r101-d8_4xb2-80k_cityscapes-512x1024.py"),
        ("pspnet_resnet18", "pspnet/pspnet_r18-d8_4xb2-80k_cityscapes-512x1024.py"),
        ("pspnet_mobilenet_v2", "mobilenet_v2/mobilenet-v2-d8_pspnet_4xb2-80k_cityscapes-512x1024.py"),
    ],
)
def test_heads_are_those_of_mmseg(name: str, theirs: str) -> None:
    read = Config.fromfile(Path(mmseg.__file__).parent / ".mim" / "configs" / theirs).model
    ours = dense_config(name, 19, 1.0, (512, 1024), NORMALISATION)
    for head in ("decode_head", "auxiliary_head"):
        with DefaultScope.overwrite_default_scope("mmseg"):
            one, other = (
                mmseg.registry.MODELS.build({**each[head], "norm_cfg": {"type": "BN"}}) for each in (ours, read)
            )
        shapes = [{key: value.shape for key, value in each.state_dict().items()} for each in (one, other)]
        assert shapes[0] == shapes[1]
        assert one.loss_decode.loss_weight == other.loss_decode.loss_weight
        assert one.dropout_ratio == other.dropout_ratio
    maps = [stage.channels for stage in make_network(name, "segmentation", 0).stages]
    assert maps[-1] == {"pspnet_resnet101": 256, "pspnet_resnet18": 64, "pspnet_mobilenet_v2": 40}[name]


def test_the_decode_head_is_tapped_where_it_classifies() -> None:
    """Behind its dropout; the student's in the very pass that gives its loss, the teacher's without its other parts."""
    model = make_model("pspnet ifvd+reviewkd")
    batch = model.student.prepare(next(make_data("segmentation").train.epoch(0)))
    head, calls = model.student.network.decode_head, []
    head.bottleneck.register_forward_hook(lambda *_: calls.append(1))
    ours = Features(model.student.train(), batch["inputs"])
    ours.task(batch)
    features, logits = ours.pixels
    assert len(calls) == 1
    assert 0 < (features.abs().sum((2, 3)) == 0).float().mean() < 0.5
    torch.testing.assert_close(head.conv_seg(features), logits)
    for network in (model.student.eval(), model.teacher):
        found = Features(network, batch["inputs"], graph=False).pixels
        maps = network.network.backbone(network.normalise(batch["inputs"]))
        torch.testing.assert_close(found.features, network.network.decode_head._forward_feature(maps))
        torch.testing.assert_close(found.logits, network.network.decode_head(maps))
    assert not head.conv_seg._forward_hooks and not model.teacher.network.decode_head.conv_seg._forward_hooks


def test_maps_of_another_size_are_resized() -> None:
    """Those of a semantic FPN are twice as large as a PSPNet's."""
    student, teacher = (
        make_network(f"{name}_resnet18", "segmentation", 0).eval() for name in ("pspnet", "semantic_fpn")
    )
    method = build_method("ifvd", student, teacher)
    batch = student.prepare(next(make_data("segmentation").train.epoch(0)))
    ours, theirs = (Features(network, batch["inputs"], graph=False) for network in (student, teacher))
    size = ours.pixels.features.shape[2:]
    assert theirs.pixels.features.shape[2:] == torch.Size(2 * side for side in size)
    features, logits = (F.interpolate(each, size, mode="bilinear", align_corners=False) for each in theirs.pixels)
    terms = method.terms(ours, theirs, batch)
    expected = intra_class_variation(ours.pixels.features, features, labels_of(batch, size), CLASSES["segmentation"])
    torch.testing.assert_close(terms["variation"], expected)
    torch.testing.assert_close(terms["soft"], pixel_soft_target(ours.pixels.logits, logits))


# ---------------------------------------------------------------------------------------------------------- composition


def loop_for(name: str, folder: Path, **options: Any) -> tuple[Any, dict[str, Any]]:
    """A setting's loop before its first step, and a prepared batch."""
    model = make_model(name, **options)
    raw = next(make_data("segmentation").train.epoch(0))
    engine = Engine({**defaults(Schedule), "epochs": 1, "batch_size": 2}, torch.device("cpu"), folder)
    loop = measured_loop(model, model.method.phases()[-1], raw, engine)
    return loop, model.student.prepare(loop.numbered(raw))


def without_dropout(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout2d):
            module.p = 0.0


@pytest.mark.parametrize("name", ["pspnet ifvd+reviewkd", "pspnet ifvd+distpro", "pspnet ifvd+distpro_search"])
def test_the_loss_is_a_sum_on_one_pass_over_each_network(name: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"weight": 30.0, "soft_weight": 7.0}
    if name.endswith("reviewkd"):
        changes["base"] = {"ramp": 0.0, "weight": 3.0}
    loop, batch = loop_for(name, tmp_path, **changes)
    without_dropout(loop.model)
    loop.model.train()
    twin = copy.deepcopy(loop.model)
    ours, theirs = twin.method.features(twin, batch)
    task = ours.task(batch)
    labels = labels_of(batch, ours.pixels.features.shape[2:])
    variation = intra_class_variation(ours.pixels.features, theirs.pixels.features, labels, CLASSES["segmentation"])
    soft = pixel_soft_target(ours.pixels.logits, theirs.pixels.logits)
    assert variation > 1e-3 and soft > 1e-5
    passes: list[str] = []
    for who, network in (("ours", loop.model.student), ("theirs", loop.model.teacher)):
        last = network.network.decode_head.bottleneck
        last.register_forward_hook(lambda *_, who=who: passes.append(who))
    if loop.phase.step is not None:
        logged = loop.phase.step(loop, batch)
    else:
        loss, logged = loop.phase.loss(loop.model, batch)
        logged = {"loss": loss, **logged}
    further = 3.0 * logged["loss_review"] if "loss_review" in logged else 3.0 * logged["loss_pathways"]
    assert logged["loss_variation"].item() == pytest.approx(variation.item(), rel=1e-4)
    assert logged["loss_soft"].item() == pytest.approx(soft.item(), rel=1e-4)
    expected = task.loss + 30 * variation + 7 * soft + further
    assert logged["loss"].item() == pytest.approx(expected.item(), rel=1e-4) and further > 0
    # The search has its held-out images, on whose label loss the logits learn.
    assert passes.count("theirs") == 1 and passes.count("ours") == 1 + name.endswith("search")


def test_a_search_looks_ahead_along_the_whole_loss(tmp_path: Path) -> None:
    seen = {}
    for weight in (0.0, 30.0):
        loop, batch = loop_for("pspnet ifvd+distpro_search", tmp_path / str(weight), weight=weight)
        search, found = loop.model.method.base, []
        inside = search.hypergradient
        search.hypergradient = lambda *args, inside=inside, found=found: found.append(args[-1]) or inside(*args)
        torch.manual_seed(0)
        loop.phase.step(loop, batch)
        seen[weight] = torch.cat([each.flatten() for each in found[0]])
    assert (seen[30.0] - seen[0.0]).norm() > 0.01 * seen[0.0].norm()


PAIR = ("teacher=pspnet_resnet101", "student=pspnet_mobilenet_v2", "dataset=scenes_seg")


def test_what_is_replayed_around_was_searched_around() -> None:
    search = needs_of(settle(composed("method=ifvd+distpro", "method.weight=100", *PAIR)))["search"]
    direct = composed("method=ifvd+distpro_search", "method.weight=100", *PAIR)
    assert identity(search.config) == identity(direct)  # type: ignore[union-attr]
    equal = ("method=ifvd+distpro", "method.base.process=equal", *PAIR)
    assert set(needs_of(settle(composed(*equal)))) == {"teacher"}
    searched = ("method.base.search.seed=1", "schedule@method.base.search.schedule=scenes_small")
    assert identity(composed(*equal)) == identity(composed(*equal, *searched))
    replayed = [identity(composed("method=ifvd+distpro", *PAIR, *more)) for more in ((), searched)]
    assert replayed[0] != replayed[1]


def test_segmentors_have_four_maps_and_sixteen_pathways() -> None:
    """Whatever their stages: a MobileNet v2 has a fifth one, of stride 2."""
    pair = [make_network(f"pspnet_{name}", "segmentation", 0) for name in ("mobilenet_v2", "resnet18")]
    method: Any = build_method("distpro", *pair, process="equal")
    assert [len(each.stages) for each in pair] == [5, 5]
    assert sorted(map(str, method.pathways)) == [f"t{i}-s{j}-complex" for i in range(1, 5) for j in range(1, 5)]
    assert [level.channels for level in method.ours] == [stage.channels for stage in pair[0].stages[1:]]
    chosen: Any = build_method("distpro", *pair, process="equal", connections=[[4, 2], [4, 1], [4, 2]])
    assert list(map(str, chosen.pathways)) == ["t4-s1-complex", "t4-s2-complex"]
    assert build_method("reviewkd", *pair).levels[-1].channels == 40  # type: ignore[union-attr]


def test_both_tables_share_a_teacher_and_one_search() -> None:
    cells = [
        settle(job.config)
        for name in ("cityscapes_distpro", "distpro_pathway_direction")
        for job in table(name, "seed=0,1").jobs.values()
    ]
    needs = [need for cell in cells if cell["method"]["name"] != "none" for need in needs_of(cell).items()]
    found = {name: {identity(need.config) for other, need in needs if other == name} for name, _ in needs}  # type: ignore[union-attr]
    assert {name: len(ids) for name, ids in found.items()} == {"teacher": 1, "search": 1}


def test_a_teacher_from_a_file_comes_with_its_head(tmp_path: Path) -> None:
    source = make_network("pspnet_resnet18", "segmentation", seed=5)
    torch.save(source.network.state_dict(), tmp_path / "teacher.pth")
    network = {"name": "pspnet_resnet18", "width": WIDTH, "config": None, "options": None}
    config = {"teacher": {"network": network}, "dataset": {"image_size": SIZE}, "method": {"name": "ifvd"}}
    teacher: Any = build_teacher(config, make_data("segmentation").spec, tmp_path / "teacher.pth")
    torch.testing.assert_close(teacher.network.state_dict(), source.network.state_dict())


def test_it_is_at_home_in_mmsegs_configs(tmp_path: Path) -> None:
    """The ramp of knowledge review follows mmengine's own count of iterations."""
    torch.save(make_network("pspnet_resnet18", "segmentation", 1).network.state_dict(), tmp_path / "teacher.pth")
    config = dense_config("pspnet_resnet18", CLASSES["segmentation"], WIDTH, SIZE, NORMALISATION)
    teacher = {"model": config, "checkpoint": str(tmp_path / "teacher.pth")}
    model = KnowledgeTransfer(config, {"type": "ifvd+reviewkd", "base": {"ramp": 0.5}}, teacher)
    batch = next(make_data("segmentation").train.epoch(0))
    from mmengine.logging import MessageHub

    hub = MessageHub.get_instance(tmp_path.name)
    found = []
    for step in (0, 2):
        hub.update_info("iter", step)
        hub.update_info("max_iters", 8)
        found.append(model(batch["inputs"], batch["data_samples"], mode="loss"))
    assert found[0]["kt/review"] == 0 < found[1]["kt/review"]
    assert found[1]["loss"] > found[1]["kt/task"] > 0 < found[1]["kt/variation"]


# --------------------------------------------------------------------------------------------------------------- errors


def test_only_segmentors_with_the_same_classes() -> None:
    student, detector = (
        make_network(name, task, 0)
        for name, task in (("pspnet_resnet18", "segmentation"), ("fasterrcnn_resnet18", "detection"))
    )
    classifier = make_classifier("resnet8", 13, 0)
    for pair, words in (
        ((student, detector), "the teacher FasterRCNN gives no class scores of pixels; expected a segmentor"),
        ((classifier, classifier), "the student CifarResNet gives no class scores"),
        ((classifier, student), "the teacher is no classifier, as the student is"),
        ((make_network("deeplabv2_resnet101", "segmentation", 0), student), "the student EncoderDecoder gives no"),
    ):
        with pytest.raises(UserError, match=f"^method=ifvd: {words}"):
            build_method("ifvd", *pair)
    with pytest.raises(UserError, match=r"^method\.base\.name=hybrid_forward: its loss is no sum"):
        build_method("ifvd+hybrid_forward", student, student)
    for connections, wrong in (([[4, 1], [5, 1]], r"\[5, 1\]"), ([[4]], r"\[4\]")):
        with pytest.raises(UserError, match=rf"^method\.connections={wrong}: expected pairs .* of 1 to 4 and 1 to 4"):
            build_method("distpro", student, student, connections=connections, process="equal")
    with pytest.raises(
        UserError, match=r"^method\.connections=\[\]: expected one of all, rising or a list .* length >= 1"
    ):
        build_method("distpro", student, student, connections=[], process="equal")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("method=ifvd", "dataset=scenes_det", "student=fasterrcnn_resnet18"), "=ifvd: for segmentation only"),
        (("method=ifvd", "dataset=scenes", "student=resnet18"), "=ifvd: for segmentation only"),
        (("method=ifvd", "method.base={name:nst,weight:1,stages:all}", *PAIR[1:]), "base.name=nst: expected null"),
        (("method=ifvd", "method.base={name:ifvd}", *PAIR[1:]), "base.name=ifvd: expected one of none, "),
        (("method=ifvd+distpro", "method.base.process=last", *PAIR[1:]), "base.process=last: expected one of"),
    ],
)
def test_a_mistake_is_one_line(overrides: tuple[str, ...], words: str) -> None:
    with pytest.raises(UserError, match=rf"^method\S*{words}") as caught:
        settle(composed(*overrides, "teacher=pspnet_resnet101"))
    assert "\n" not in str(caught.value)
