"""Knowledge consistent distillation: streaming consistency, transforms, the reset, composition, cells, claims."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from checks import bits, rows
from configs import composed, rows_of, table
from experiments import cell
from experiments.build import snapshots_of
from experiments.meaning import identity, needed_cells, settle
from experiments.table import read_rows
from kt.classifier import Classifier
from kt.consistency import StreamingConsistency
from kt.engine import seed_everything
from kt.errors import UserError
from kt.features import Features, Transformed, pair_levels
from kt.functional import METRICS, channel_consistency, channel_divergence, feature_l2, match_channels
from kt.methods import build_method
from kt.methods.kcd import ChannelTransform, pooled, read_transform, shrunk_groups
from kt.models import build_network
from kt.phase import MAIN
from kt.settings import KCD
from kt.store import folder_of
from kt.train import fit
from kt.transfer import TransferModel
from method_settings import SCHEDULE, make_classifier, make_data, make_model, make_teacher
from results import write_cell
from tables.judging import Context, judge_all
from tables.panels import HeatMaps, as_png, as_svg
from tables.plotting import drawings
from tables.records import find_table
from tables.stated import network_key


@pytest.fixture(scope="module")
def data() -> Any:
    return make_data()


# Consistency


@pytest.mark.parametrize("metric", METRICS)
def test_streaming_equals_the_direct_computation(metric: str) -> None:
    generator = torch.Generator().manual_seed(3)
    student = torch.randn(301, 6, generator=generator, dtype=torch.float64) * 3 + 5
    teacher = torch.randn(301, 9, generator=generator, dtype=torch.float64) * torch.arange(1, 10) - 7
    sums = StreamingConsistency(metric, teacher=9, student=6)
    for ours, theirs in zip(student.split(37), teacher.split(37), strict=True):
        sums.update(ours, theirs)
    assert sums.samples == 301
    torch.testing.assert_close(sums.matrix(), channel_consistency(student, teacher, metric), rtol=1e-9, atol=1e-12)


def test_streaming_divergence_survives_large_activations() -> None:
    feature = torch.tensor([[900.0], [-900.0], [905.0]], dtype=torch.float64)
    sums = StreamingConsistency("kl", 1, 1)
    for row in feature:
        sums.update(row[None], row[None] / 2)
    torch.testing.assert_close(sums.matrix(), channel_consistency(feature, feature / 2, "kl"))


def test_constant_channels_are_consistent_with_nothing() -> None:
    """Though sums of squares leave them a variance of rounding errors."""
    sums = StreamingConsistency("correlation", 4, 1)
    varying = torch.randn(900, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for batch in varying.split(7):
        constant = torch.tensor([[0.1, 0.7, 333.3]], dtype=torch.float64).expand(len(batch), 3)
        sums.update(batch, torch.cat([constant, batch], 1))
    expected = torch.tensor([[0.0], [0.0], [0.0], [1.0]], dtype=torch.float64)
    torch.testing.assert_close(sums.matrix(), expected, atol=1e-6, rtol=0)


def test_memory_does_not_grow_with_the_samples() -> None:
    sums = StreamingConsistency("correlation", 4, 3)

    def held() -> int:
        return sum(t.numel() for t in vars(sums._sums).values() if isinstance(t, Tensor))

    before = held()
    for _ in range(20):
        sums.update(torch.randn(50, 3), torch.randn(50, 4))
    assert held() == before


@pytest.mark.parametrize("shape", [(3, 3), (5, 3), (5, 1), (6, 4)])
def test_bipartite_is_the_best_of_all_assignments(shape: tuple[int, int]) -> None:
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(shape[0]), dtype=torch.float64)
    places = range(shape[1])
    best = max(
        sum(matrix[i, j] for i, j in zip(chosen, places, strict=True))
        for chosen in itertools.permutations(range(shape[0]), shape[1])
    )
    matched = match_channels(matrix, "bipartite")
    assert len(set(matched.tolist())) == shape[1]
    torch.testing.assert_close(matrix[matched, torch.arange(shape[1])].sum(), best)


def test_formulas() -> None:
    ours, theirs = torch.tensor([[1.0, 2.0], [0.0, 4.0]]), torch.tensor([[1.0, 0.0], [3.0, 4.0]])
    assert feature_l2(ours, theirs, "sum").item() == (4 + 9) / 2
    assert feature_l2(ours, theirs, "mean").item() == (4 + 9) / 4
    p, q = torch.softmax(theirs, 1), torch.softmax(ours, 1)
    expected = (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(channel_divergence(ours, theirs), expected)
    with pytest.raises(ValueError, match="reduction 'max'"):
        feature_l2(ours, theirs, "max")


def test_groups_shrink_on_a_log_scale() -> None:
    assert [shrunk_groups(k, 1000, 10) for k in (1, 10, 100, 1000)] == [1, 2, 5, 10]
    assert [shrunk_groups(k, 1000, 1000) for k in (1, 10, 100, 1000)] == [1, 10, 100, 1000]
    assert shrunk_groups(7, None, 10) == 7


# Transforms


def test_each_sample_takes_the_channels_of_its_group() -> None:
    transform = ChannelTransform(2, 2)
    transform.channels.copy_(torch.tensor([[2, 0], [1, 1]]))
    feature = torch.arange(24.0).view(2, 3, 2, 2)
    found = transform(feature, torch.tensor([1, 0]))
    assert torch.equal(found[0], feature[0, [1, 1]]) and torch.equal(found[1], feature[1, [2, 0]])


def test_only_the_last_stage_of_a_view_is_transformed() -> None:
    teacher, images = make_teacher("resnet20", 4).eval(), torch.rand(2, 3, 32, 32)

    def order(maps: Tensor) -> Tensor:
        return maps[:, [2, 0, 1]]

    for read in ("before", "level"):
        plain = Features(teacher, images, graph=False)
        *first, last = (getattr(plain, read)(index) for index in range(3))
        view = Transformed(plain, order)
        *seen, transformed = (getattr(view, read)(index) for index in range(3))
        assert all(one is other for one, other in zip(first, seen, strict=True))
        assert torch.equal(transformed, order(last))
    *_, last, feature = (view.at(level, activated=True) for level in pair_levels(teacher, teacher, pooled=True)[1])
    assert torch.equal(last, order(plain.levels[-1])) and torch.equal(feature.flatten(1), plain.pooled)
    assert torch.equal(view.levels[-1], order(plain.levels[-1])) and torch.equal(view.logits, teacher(images))


def test_features_are_of_normalised_images_and_without_a_graph_where_none_is_wanted() -> None:
    plain = build_network("resnet8", num_classes=4, width=0.25, image_size=32).eval()
    network, images = Classifier(plain, ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))), torch.rand(2, 3, 32, 32)
    seen = (images - torch.tensor([0.4, 0.5, 0.6])[:, None, None]) / torch.tensor([0.2, 0.3, 0.4])[:, None, None]
    for graph in (True, False):
        features = Features(network, images, graph=graph)
        read = features.before(-1), features.level(0), features.pooled, features.logits
        torch.testing.assert_close(features.logits, plain(seen))
        assert [each.requires_grad for each in read] == [graph] * 4


def test_a_network_runs_once_and_only_as_deep_as_asked() -> None:
    teacher, images, calls = make_teacher("resnet20", 4).eval(), torch.rand(2, 3, 32, 32), []
    for number, stage in enumerate(teacher.stages):
        convolution = next(module for module in stage.modules() if isinstance(module, nn.Conv2d))
        convolution.register_forward_hook(lambda *_, number=number: calls.append(number))
    features = Features(teacher, images, graph=False)
    view = Transformed(features, lambda maps: maps)
    view.level(1), features.level(0), features.level(1)
    assert calls == [0, 1]
    torch.testing.assert_close(view.before(-1).relu(), features.level(2))
    assert torch.equal(features.logits, teacher.head(features.level(-1)))
    assert calls == [0, 1, 2]
    with pytest.raises(RuntimeError, match="stage 1 has run: ask for its pre-activation before"):
        features.before(1)
    assert not any(level.requires_grad for level in features.levels)


def permuted_copy(student: Classifier, order: Tensor) -> Classifier:
    """The same function with the last stage's channels in another order: its channel i is the student's `order[i]`."""
    twin = make_classifier("resnet8", student.head.classifier.out_features, seed=2)
    state = {key: value.clone() for key, value in student.network.state_dict().items()}
    block = max(int(key.split(".")[1]) for key in state if key.startswith("layer3."))
    for key, value in state.items():
        name = key.removeprefix(f"layer3.{block}.")
        if name in ("conv2.weight", "downsample.0.weight") or name.startswith(("bn2.", "downsample.1.")):
            state[key] = value[order] if value.dim() else value
    state["fc.weight"] = state["fc.weight"][:, order]
    twin.network.load_state_dict(state)
    return twin


@pytest.mark.parametrize("metric", METRICS)
def test_a_permuted_student_gives_its_permutation_back(metric: str, data: Any, tmp_path: Path) -> None:
    """Through the pipeline: solo student, pass over the data, matching, reset, distillation, the file in the folder."""
    solo = make_teacher("resnet8", data.spec.num_classes, seed=2)
    channels = solo.stages[-1].channels
    order = torch.randperm(channels, generator=torch.Generator().manual_seed(5))
    teacher = permuted_copy(solo, order)
    images = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(teacher.eval()(images), solo.eval()(images), rtol=1e-4, atol=1e-5)
    student = make_classifier("resnet8", data.spec.num_classes, seed=2)
    method = build_method("kcd", student, teacher, metric=metric, base={"name": "l2", "weight": 1.0})
    model = TransferModel(student, method, {"solo": solo, "teacher": teacher})
    fit(model, data, tmp_path, {**SCHEDULE, "epochs": 1})
    kept = read_transform(tmp_path)
    assert torch.equal(kept["transform"]["channels"][0], torch.argsort(order))
    assert kept["images"] == data.spec.train_size and kept["seconds"] > 0
    with torch.no_grad():
        seen = Transformed(Features(model.teacher, images), method.transform).before(-1).mean((2, 3))
        torch.testing.assert_close(seen, pooled(solo, images), rtol=1e-4, atol=1e-5)


def test_several_groups_are_matched_each_on_its_own_classes(data: Any, tmp_path: Path) -> None:
    model = make_model("kcd", data.spec.num_classes, groups=5, update_every=None)
    solo = make_teacher("resnet8", data.spec.num_classes, seed=4)
    model = TransferModel(model.student, model.method, {"solo": solo, "teacher": model.teacher})
    fit(model, data, tmp_path, {**SCHEDULE, "epochs": 1})
    features: dict[str, list[Tensor]] = {"labels": [], "ours": [], "theirs": []}
    with torch.no_grad():
        for batch in data.train.plain().epoch(0):
            features["labels"].append(batch["labels"])
            features["ours"].append(pooled(model.teachers["solo"], batch["inputs"]))
            features["theirs"].append(pooled(model.teacher, batch["inputs"]))
    labels, ours, theirs = (torch.cat(found) for found in features.values())
    groups = labels // (data.spec.num_classes // 5)
    for group in range(5):
        chosen = groups == group
        matrix = channel_consistency(ours[chosen].double(), theirs[chosen].double(), "correlation")
        found = model.method.transform.channels[group]
        best = match_channels(matrix, "bipartite")
        places = torch.arange(len(best))
        torch.testing.assert_close(matrix[found, places].sum(), matrix[best, places].sum(), rtol=1e-4, atol=1e-4)


def test_an_adapter_orders_all_teacher_channels() -> None:
    student, teacher = make_classifier("resnet20_half", 4, 0), make_teacher("resnet8x4", 4)
    ours, theirs = student.stages[-1].channels, teacher.stages[-1].channels
    assert ours < theirs
    base = {"name": "l2", "match": "adapter"}
    method: Any = build_method("kcd", student, teacher, strategy="random", match="adapter", base=base)
    assert sorted(method.transform.channels[0].tolist()) == list(range(theirs))
    feature = torch.randn(2, ours, 3, 3)
    assert torch.equal(method.base.adapter(feature)[:, :ours], feature)


def test_plain_loaders_give_every_image_once_without_augmentation(data: Any) -> None:
    seen = torch.cat([batch["indices"] for batch in data.train.plain().epoch(0)])
    assert sorted(seen.tolist()) == list(range(data.spec.train_size))
    ordered = list(data.train.plain(by_class=True).epoch(0))
    labels = torch.cat([batch["labels"] for batch in ordered])
    assert torch.equal(labels, labels.sort().values)
    pixels = torch.cat([batch["inputs"] for batch in ordered])
    indices = torch.cat([batch["indices"] for batch in ordered])
    expected = data.train.images[indices].permute(0, 3, 1, 2).float() / 255
    torch.testing.assert_close(pixels, expected)


@pytest.mark.parametrize(("every", "epochs"), [(None, [0]), (2, [0, 2, 4]), (0.5, [0, 2]), (0.01, [0, 1, 2, 3, 4])])
def test_a_dynamic_transform_is_found_again(
    every: float | None, epochs: list[int], data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    model = make_model("kcd", data.spec.num_classes, update_every=every)
    model = TransferModel(model.student, model.method, {"solo": make_teacher("resnet8", 10), "teacher": model.teacher})
    match = model.method.match_teacher

    def watched(model: Any, loop: Any, student: Any) -> None:
        found.append((loop.epoch, student is model.student))
        match(model, loop, student)

    monkeypatch.setattr(model.method, "match_teacher", watched)
    fit(model, data, tmp_path, {**SCHEDULE, "epochs": 5 if every != 0.5 else 4})
    assert found == [(epoch, epoch > 0) for epoch in epochs]


# The reset and composition


@pytest.mark.parametrize("given", [True, False])
def test_distillation_starts_from_the_initial_weights_bit_for_bit(given: bool, data: Any, tmp_path: Path) -> None:
    """Whether the solo student is handed over or trained in a first phase."""
    model = make_model("kcd", data.spec.num_classes, update_every=None)
    if given:
        solo = make_teacher("resnet8", data.spec.num_classes, seed=9)
        model = TransferModel(model.student, model.method, {"solo": solo, "teacher": model.teacher})
    start = bits(model.student.network.state_dict())
    method, found = model.method, {}
    reset = method.reset

    def watched(model: TransferModel) -> None:
        found["before"] = bits(model.student.network.state_dict())
        reset(model)
        found["after"] = bits(model.student.network.state_dict())

    method.reset = watched
    fit(model, data, tmp_path, SCHEDULE)
    assert found["after"] == start
    assert (found["before"] == start) is given


@pytest.mark.parametrize(
    ("name", "options", "how"),
    [
        ("l2", {"weight": 1.0}, {}),
        ("fitnet", {"hint_layer": -1, "init_fraction": 0.5}, {"regressor": "first"}),
        ("ab", {"stages": "last"}, {"connector": "first"}),
    ],
)
def test_identity_is_the_plain_method_on_the_teacher_s_first_channels(
    name: str, options: dict[str, Any], how: dict[str, str], data: Any, tmp_path: Path
) -> None:
    results = []
    around = {"strategy": "identity", "base": {"name": name, **options, **dict.fromkeys(how, "none")}}
    for whole, settings in ((name, {**options, **how}), ("kcd", around)):
        student = make_classifier("resnet20_half", data.spec.num_classes, 2)
        teacher = make_teacher("resnet20", data.spec.num_classes)
        assert student.stages[-1].channels < teacher.stages[-1].channels
        model = TransferModel(student, build_method(whole, student, teacher, **settings), {"teacher": teacher})
        fit(model, data, tmp_path / whole, SCHEDULE)
        results.append(bits(torch.load(tmp_path / whole / "student.pth")))
    assert results[0] == results[1]


def test_a_base_that_compares_no_channels_needs_a_loss_beside_it() -> None:
    student, teacher = make_classifier("resnet8", 4, 0), make_teacher("resnet20", 4)
    with pytest.raises(UserError, match=r"method.beside=null: rkd does not compare channels"):
        build_method("kcd+rkd", student, teacher)
    with pytest.raises(UserError, match="not itself built around another"):
        build_method("kcd", student, teacher, base={"name": "kcd"})
    with pytest.raises(UserError, match=r"its base is 'ab'; expected 'fitnet'"):
        build_method("kcd+fitnet", student, teacher, base={"name": "ab"})
    with pytest.raises(UserError, match=r"method.base=ab: expected a group of keys"):
        build_method("kcd+fitnet", student, teacher, base="ab")
    with pytest.raises(UserError, match=r"method.base.name=3: expected the name of a method"):
        build_method("kcd", student, teacher, base={"name": 3})
    assert build_method("kcd", student, teacher, base={"weight": 2.0}).base.weights == {"l2": 2.0}
    with pytest.raises(UserError, match=r"strategy=bipartit: .*did you mean 'bipartite'"):
        build_method("kcd", student, teacher, strategy="bipartit")
    method = build_method("kcd", student, teacher, base={"name": "hybrid_forward"}, beside={})
    with pytest.raises(
        UserError, match="method.base: its phase 'train' has no loss that could be computed on the view"
    ):
        method.phases()
    wide = make_classifier("resnet8x4", 4, 0)
    with pytest.raises(UserError, match="fewer than the student's"):
        build_method("kcd", wide, teacher)


def test_rkd_sees_the_teacher_as_it_is_and_both_networks_run_once(data: Any) -> None:
    model = make_model("kcd+rkd", data.spec.num_classes, strategy="random")
    phase = model.method.phases()[-1]
    batch = next(data.train.epoch(0))
    calls = []
    for network in (model.student, model.teacher):
        network.network.conv1.register_forward_hook(lambda *_: calls.append(1))
    _, logged = phase.loss(model.eval(), batch)
    assert len(calls) == 2
    alone = build_method("rkd", model.student, model.teacher)
    _, expected = alone.loss(TransferModel(model.student, alone, {"teacher": model.teacher}).eval(), batch)
    torch.testing.assert_close(logged["loss_distance"], expected["loss_distance"])


def test_rco_follows_the_anchors_in_equal_shares(data: Any, tmp_path: Path) -> None:
    model = make_model("rco", data.spec.num_classes)
    seen = []
    choose = model.method.choose_anchor

    def watched(model: TransferModel, loop: Any) -> None:
        choose(model, loop)
        seen.append((loop.epoch, model.method.anchor))

    model.method.choose_anchor = watched
    fit(model, data, tmp_path, {**SCHEDULE, "epochs": 4})
    assert seen == [(0, "anchor0"), (1, "anchor0"), (2, "teacher"), (3, "teacher")]
    alone = TransferModel(model.student, model.method, {"teacher": model.teacher})
    with pytest.raises(UserError, match="expected snapshots of the teacher's training"):
        fit(alone, data, tmp_path / "none", SCHEDULE)


def test_full_width_mobilenet_keeps_its_last_convolution() -> None:
    assert build_network("mobilenet_v2_half", num_classes=10, image_size=32).last_channel == 1280  # type: ignore[attr-defined]


# Around a hint and around boundaries


def distilled(name: str, base: dict[str, Any], best: bool) -> Tensor:
    """The student's weights, in double precision, after some steps of each of a base's phases on a transformed teacher.

    A free layer between the two starts in the transform's order: as it is drawn, one order is as likely as another.
    """
    student, teacher, solo = (
        make_classifier("resnet8", 10, 2),
        make_teacher("resnet20", 10),
        make_teacher("resnet8", 10),
    )
    seed_everything(3)
    method: Any = build_method(name, student, teacher, strategy="identity", base=base)
    model = TransferModel(student, method, {"teacher": teacher}).double().train()
    images = torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    batch = {"inputs": images, "labels": torch.arange(16) % 10}
    with torch.no_grad():
        consistency = channel_consistency(pooled(solo.double().eval(), images), pooled(teacher, images), "correlation")
        order = match_channels(consistency, "bipartite" if best else "random")
        method.transform.channels.copy_(order[None])
        for layer in method.base.modules():
            if isinstance(layer, nn.Conv2d):
                for parameter in layer.parameters():
                    parameter.copy_(parameter[order])
    for phase in method.phases():
        groups = phase.trains[MAIN].groups(model)
        optimizer = torch.optim.SGD(groups, lr=0.01, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            phase.loss(model, batch)[0].backward()
            optimizer.step()
    return torch.cat([parameter.detach().flatten() for parameter in student.parameters()])


@pytest.mark.parametrize(
    ("name", "changes", "free"),
    [
        ("kcd+fitnet", (), {"regressor": "conv_bn_relu"}),
        ("kcd+fitnet", ("method.base.init_fraction=0.1",), {"regressor": "conv"}),
        ("kcd+ab", (), {"connector": "conv_bn"}),
    ],
)
def test_another_transform_is_another_student_unless_a_free_layer_absorbs_it(
    name: str, changes: tuple[str, ...], free: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(KCD, "check", lambda *_: None)  # it refuses such a layer
    own = composed(f"method={name}", *changes)["method"]["base"]
    differences = []
    for base in ({**own, **free}, own):
        matched, random = (distilled(name, base, best) for best in (True, False))
        differences.append((matched - random).abs().max().item())
    assert differences[0] < 1e-12 and differences[1] > 1e-3, differences


@pytest.mark.parametrize(("regressor", "grows"), [("conv", True), ("none", False), ("conv_bn_relu", False)])
def test_only_a_bare_convolution_diverges_at_the_paper_s_rate_and_weight(
    regressor: str, grows: bool, data: Any
) -> None:
    """Which is why nothing normalises what is compared as it is: the student's own last normalisation is enough."""
    model = make_model("fitnet", data.spec.num_classes, hint_layer=-1, regressor=regressor, init_fraction=0.5).train()
    hint = model.method.phases()[0]
    optimizer = torch.optim.SGD(hint.trains[MAIN].groups(model), lr=0.1, momentum=0.9)
    losses = []
    for batch in itertools.chain.from_iterable(data.train.epoch(epoch) for epoch in range(2)):
        losses.append(hint.loss(model, batch)[0])
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    first, *_, last = (loss.item() for loss in losses)
    assert (not last < 1e6 * first) if grows else last < first


@pytest.mark.parametrize("name", ["cifar100_kcd", "imagenet_kcd", "kcd_consistency"])
def test_rows_around_fitnets_and_ab_differ_by_the_transform_alone(name: str) -> None:
    configs = {shown.id: shown.config for shown in table(name, "scale=mini").shown}
    around = {row: config for row, config in configs.items() if config["method"]["name"] in ("kcd+fitnet", "kcd+ab")}
    assert len(around) == (2 if name == "kcd_consistency" else 4)
    for row, config in around.items():
        networks = (config[who]["network"] for who in ("student", "teacher"))
        student, teacher = (make_classifier(network["name"], 10, 0) for network in networks)
        fewer = student.stages[-1].channels < teacher.stages[-1].channels
        plain, base = configs[row.removeprefix("kcd_")]["method"], config["method"]["base"]
        key = "regressor" if "regressor" in base else "connector"
        assert (plain, base[key]) == ({**base, key: "first" if fewer else "none"}, "none")
        build_method(**plain, student=student, teacher=teacher)


# Cells

PAIR = ("teacher=resnet20", "student=resnet8", "dataset.image_size=24", "dataset.train_size=96", "dataset.test_size=32")
SMALL = (*PAIR, "schedule.epochs=2", "schedule.batch_size=32", "wandb.mode=disabled", "device=cpu")


def test_needs_are_typed_and_shared() -> None:
    alone = identity(composed("method=none", *SMALL))
    needs = needed_cells(settle(composed("method=kcd", *SMALL)))
    assert identity(needs["solo"]) == alone
    assert set(needs) == {"teacher", "solo"}

    def needed(*changes: str) -> dict[str, Any]:
        return needed_cells(settle(composed("method=kcd", *SMALL, *changes)))

    assert set(needed("method.strategy=random")) == {"teacher"}
    assert set(needed("method.student_state=initial")) == {"teacher"}
    assert needed("method.solo_offset=2", "seed=3")["solo"]["seed"] == 5
    source = needed("method.teacher_offset=1")["source"]
    assert (source["seed"], source["schedule"]["epochs"]) == (1, 2)
    assert needed("method.teacher_state=initial")["source"]["schedule"]["epochs"] == 0
    for name in ("solo", "source"):
        made = composed("method=kcd", "method.teacher_offset=1", f"cell={name}", *SMALL)
        assert identity(made) == identity(needed("method.teacher_offset=1")[name])
    with pytest.raises(UserError, match="cell=source: this cell needs no such cell; expected one of student,"):
        settle(composed("method=kcd", "cell=source", *SMALL))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cells")


def run(root: Path, *overrides: str) -> tuple[Path, dict[str, Any]]:
    result = cell.run_cell(composed(*SMALL, f"output_root={root}", *overrides))
    return folder_of(root, result["id"]), result


def test_a_cell_keeps_its_transform_and_starts_where_its_solo_student_did(root: Path) -> None:
    folder, result = run(root, "method=kcd")
    assert read_transform(folder)["transform"]["channels"].shape == (1, result["channels"]["compared"])
    assert result["transform"]["images"] == 96 and result["transform"]["seconds"] > 0
    assert [path.name for path in (folder / "phases").iterdir()] == ["0-train"]
    solo = folder_of(root, result["needs"]["solo"])
    # The same first batch under the same weights: the task loss of the first step is the same number.
    first = [next(row for row in rows(where) if row["kind"] == "train") for where in (folder, solo)]
    assert first[0]["loss_task"] == first[1]["loss"]


def test_rco_takes_the_snapshots_of_the_teacher_s_cell(root: Path) -> None:
    folder, result = run(root, "method=rco")
    teacher = folder_of(root, result["needs"]["teacher"])
    snapshots = snapshots_of(teacher / "snapshots")
    assert [path.stem for path in snapshots] == ["epoch_1", "epoch_2"]
    assert bits(torch.load(snapshots[-1])) == bits(torch.load(teacher / "student.pth"))
    outside = root / "outside.pth"
    outside.write_bytes((teacher / "student.pth").read_bytes())
    with pytest.raises(UserError, match="expected snapshots of the teacher's training"):
        run(root, "method=rco", f"teacher.checkpoint={outside}")


def test_analyses(root: Path) -> None:
    overlaps, maps, folders = {}, {}, {}
    for method, evaluation in (("kcd", "channel_overlap"), ("l2", "channel_overlap"), ("none", "channel_overlap")):
        folder, _ = run(root, f"method={method}", f"evaluation={evaluation}")
        overlaps[method] = json.loads((folder / "evaluations" / f"{evaluation}.json").read_text())
        maps[method], folders[method] = np.load(folder / "evaluations" / "activation_maps.npz")["other"], folder
    assert all(0 <= found[f"overlap_top{k}"] <= 100 for found in overlaps.values() for k in (10, 20, 50, 100))
    # What a student is compared with is the teacher as the method shows it.
    (channels,) = read_transform(folders["kcd"])["transform"]["channels"].numpy()
    np.testing.assert_array_equal(maps["kcd"], maps["l2"][channels])
    assert (maps["kcd"] != maps["l2"]).any()
    assert overlaps["kcd"]["labels"]["overlap_top100"] == f"overlap of top {round(100 * 16 / 1280)} of 16"
    distances = {}
    for method, evaluation in (
        ("kcd", "consistency_solo"),
        ("kcd", "consistency"),
        ("l2", "consistency_solo"),
        ("l2", "consistency"),
    ):
        folder, _ = run(root, f"method={method}", f"evaluation={evaluation}")
        distances[method, evaluation] = json.loads((folder / "evaluations" / f"{evaluation}.json").read_text())
    # Matching by correlation brings the student alone closer, and imitation closer still.
    solo = distances["l2", "consistency_solo"]["l2_distance"]
    assert distances["l2", "consistency"]["l2_distance"] < solo
    assert distances["kcd", "consistency_solo"]["l2_distance"] != solo
    assert distances["kcd", "consistency"] != distances["kcd", "consistency_solo"]


# Tables and claims

TABLES = (
    *("kcd_strategies", "kcd_metrics", "kcd_initialization", "kcd_untrained", "kcd_dynamic", "kcd_num_transforms"),
    *("cifar100_kcd", "imagenet_kcd", "coco_fpn_kcd", "kcd_channel_overlap", "kcd_consistency"),
)


@pytest.mark.parametrize("name", TABLES)
def test_tables_have_every_printed_row(name: str) -> None:
    record = find_table(name)
    printed = [row for row in read_rows(name, rows_of(name)) if row.printed]
    assert [row.id for row in printed] == [line["id"] for line in record.rows]
    for row, line in zip(printed, record.rows, strict=True):
        assert row.ours is line.get("ours", False) or line["method"] in ("kcd", "unknown"), row
        # Analyses run on the cells that have what they compare.
        if "evaluation" not in row.overrides:
            assert row.method == line["method"], row
            for student in row.overrides.get("student", ()):
                assert student == network_key(line["student"])


def test_claims_say_what_they_lack() -> None:
    record = find_table("kcd_untrained")
    (claim,) = judge_all(Context(record, [], {}, Path("nowhere")))
    assert claim["verdict"] == "unknown"
    assert claim["evidence"] == (
        "Needs the rows S_T and S0_T0 and S0_T and S_T0: +table=kcd_untrained rows=S_T,S0_T0,S0_T,S_T0."
    )


def test_figure_1_is_drawn_from_the_maps_that_analyses_left(tmp_path: Path) -> None:
    record, found = find_table("kcd_channel_overlap"), []
    for number, row_id in enumerate(("student_teacher", "two_students", "transformed")):
        folder = write_cell(tmp_path, row_id, {"top1": 1.0}, evaluations={"channel_overlap": {"overlap_top10": 1.0}})
        maps = np.full((4, 2, 2), float(number))
        np.savez(
            folder / "evaluations" / "activation_maps.npz", student=np.zeros((4, 2, 2)), other=maps, shown_class="boy"
        )
        found.append(
            {"id": row_id, "label": row_id, "axes": {}, "cells": [{"id": row_id, "seed": 0, "status": "done"}]}
        )
    (drawing,) = drawings(Context(record, found, {}, tmp_path))
    assert drawing.figure["id"] == "figure1"
    maps, differences = drawing.panels
    assert isinstance(maps, HeatMaps) and isinstance(differences, HeatMaps)
    assert list(maps.pictures) == ["S1", "S2", "T", "T(T)"]
    assert {name: values.mean() for name, values in differences.pictures.items()} == {
        "T - S1": 0,
        "T(T) - S1": 2,
        "S1 - S2": -1,
    }
    assert maps.pictures["T"].shape == (4, 4)
    png, svg = as_png(differences), as_svg(differences)
    assert png.startswith(b"\x89PNG") and svg.startswith("<svg") and "width=" not in svg.split(">")[0]
    assert "class boy" in drawing.caption


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("kcd+at", r"^method\.beside=null: at does not compare channels"),
        ("at+kd", r"^method\.base: unknown key for method at\+kd; it has form, stages, weight"),
        ("kcd+kcd", r"^method\.base\.name=kcd: expected a method that is not itself built around another"),
        ("kcd+fitnet", r"^method\.base\.regressor=conv_bn_relu: a free 1x1 convolution .*; expected none or first$"),
        ("kcd+ab", r"^method\.base\.connector=conv_bn: a free 1x1 convolution .*; expected none or first$"),
    ],
)
def test_a_method_around_another_that_does_not_fit_says_so(name: str, words: str) -> None:
    pair = make_model("kd", 10)
    with pytest.raises(UserError, match=words):
        build_method(name, pair.student, pair.teacher)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (("method=kcd+fitnet", "method.base.regressor=conv"), r"^method\.base\.regressor=conv: a free 1x1"),
        (("method=kcd+ab", "method.base.connector=conv_bn"), r"^method\.base\.connector=conv_bn: a free 1x1"),
        (
            ("method=kcd+ab", "method.match=adapter"),
            r"^method\.match=adapter: ab has no adapter .*expected rectangular$",
        ),
    ],
)
def test_a_free_layer_is_refused_before_anything_trains(changes: tuple[str, ...], words: str) -> None:
    with pytest.raises(UserError, match=words):
        composed("teacher=resnet20", "student=resnet8", *changes)


@pytest.mark.parametrize(
    ("name", "options", "student", "words"),
    [
        ("fitnet", {"regressor": "none"}, "resnet20_half", r"16 channels, the student's 8; .* first 8\) or a convo"),
        ("ab", {"connector": "none"}, "resnet20_half", r"^method\.connector=none: the teacher's map has"),
        ("ab", {"connector": "first"}, "resnet8x4", r"^method\.connector=first: .*; expected a convolution$"),
        (
            "kcd+fitnet",
            {"base": {"regressor": "none"}},
            "resnet20",
            "fitnet compares stage 1 of the student; expected the",
        ),
    ],
)
def test_maps_that_cannot_be_compared_as_they_are_say_so(
    name: str, options: dict[str, Any], student: str, words: str
) -> None:
    options = {"hint_layer": -1, **options} if name == "fitnet" else options
    with pytest.raises(UserError, match=words):
        build_method(name, make_classifier(student, 10, 0), make_teacher("resnet20", 10), **options)
