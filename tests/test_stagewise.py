"""Stage by stage: each phase changes its own stage and nothing else, costs, and the tables' configs."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.hooks import Hook
from torch import nn

from checks import bits, rows
from configs import composed, table
from dense_settings import SCHEDULE as DENSE_SCHEDULE
from experiments.build import phase_records
from experiments.meaning import identity, needed_cells, settle
from kt.cost import few_images
from kt.engine import open_groups, seed_everything
from kt.errors import UserError
from kt.methods import build_method
from kt.methods.blocks import choose_pairs, pair_blocks
from kt.methods.stagewise import Stagewise
from kt.models import build_network
from kt.stages import stages_of
from kt.train import fit
from kt.transfer import TransferModel, evaluating
from method_settings import SCHEDULE, make_classifier, make_data, make_model, make_teacher
from tables.records import find_table

CLASSES = 10
TABLES = ("fixed_features", "stage_count", "cifar100_stagewise", "imagenet_stagewise", "coco_retinanet")
# Where torchvision keeps a ResNet's four blocks and its head.
BLOCKS = (("conv1", "bn1", "layer1"), ("layer2",), ("layer3",), ("layer4",), ("fc",))


def make_pair(stages: int | None = None, student: str = "resnet18", **options: Any) -> TransferModel:
    """A slim ResNet-18 (or another student) taught by a ResNet-34 (ResNet-50, of other widths, under `wide`)."""
    teacher = make_teacher("resnet50" if options.pop("wide", False) else "resnet34", CLASSES)
    pupil = make_classifier(student, CLASSES, seed=2)
    seed_everything(3)
    return TransferModel(pupil, build_method("stagewise", pupil, teacher, stages=stages, **options), {"t": teacher})


def method_of(model: TransferModel) -> Stagewise:
    assert isinstance(model.method, Stagewise)
    return model.method


class Watch(Hook):
    """Keeps the whole state before and after every phase."""

    # After the phase has been entered.
    priority = "VERY_LOW"

    def __init__(self) -> None:
        self.states: list[tuple[str, dict[str, bytes], dict[str, bytes]]] = []

    def before_train(self, runner: Any) -> None:
        self.before = bits(runner.model.state_dict())

    def after_train(self, runner: Any) -> None:
        self.states.append((runner.train_loop.phase.name, self.before, bits(runner.model.state_dict())))

    def changed(self) -> dict[str, set[str]]:
        """Phase -> keys that it has changed."""
        return {
            name: {key for key, value in after.items() if value != before[key]} for name, before, after in self.states
        }


@pytest.fixture(scope="module")
def data() -> Any:
    return make_data()


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_a_phase_changes_its_own_stages_and_nothing_else(stages: int, data: Any, tmp_path: Path) -> None:
    """Parameters and buffers alike; K merges blocks from the end, the last phase is the head's."""
    model, watch = make_pair(stages), Watch()
    teacher = bits(model.teacher.state_dict())
    fit(model, data, tmp_path, {**SCHEDULE, "epochs": 1}, extra_hooks=[watch])
    owned = [*(BLOCKS[i] for i in range(stages - 1)), tuple(part for block in BLOCKS[stages - 1 : 4] for part in block)]
    keys = list(model.state_dict())
    expected = {
        phase: {key for key in keys if key.removeprefix("student.network.").partition(".")[0] in parts}
        for phase, parts in zip([*(f"stage{i + 1}" for i in range(stages)), "train"], [*owned, BLOCKS[4]], strict=True)
    }
    assert watch.changed() == expected
    assert set().union(*expected.values()) == set(keys)
    assert bits(model.teacher.state_dict()) == teacher


def test_a_detectors_backbone_goes_first_and_neck_and_heads_last(tmp_path: Path) -> None:
    pytest.importorskip("mmdet", reason="mmdet and mmseg are not installed (bash install.sh full)")
    import dense_settings

    model, watch = dense_settings.make_model("retinanet stagewise"), Watch()
    fit(model, dense_settings.make_data("detection"), tmp_path, DENSE_SCHEDULE, extra_hooks=[watch])
    changed = watch.changed()
    assert list(changed) == ["stage1", "stage2", "stage3", "stage4", "train"]
    prefix = "student.network.backbone.stages."
    # The stem is the first block's; the method's adapters are there for the widths that differ.
    for phase, own in (("stage1", {"0", "1"}), ("stage2", {"2"}), ("stage3", {"3"}), ("stage4", {"4"})):
        backbone = {key for key in changed[phase] if not key.startswith("method.adapters.")}
        assert backbone == {key for key in model.state_dict() if key.startswith(tuple(f"{prefix}{i}." for i in own))}
    outside = {key for key in model.state_dict() if key.startswith(("student.network.neck", "student.network.bbox"))}
    assert changed["train"] == outside != set()


def test_the_loss_is_the_mean_square_of_the_difference_at_the_blocks_end(data: Any) -> None:
    model = make_pair()
    method = method_of(model)
    batch = next(iter(data.train.epoch(0)))
    student, teacher = model.student, model.teacher
    x, y = student.normalise(batch["inputs"]), teacher.normalise(batch["inputs"])
    for number, phase in enumerate(method.phases()[:-1]):
        model.train()
        model.phase = phase
        loss, _ = model(**batch, mode="loss")
        # By the networks' own children: frozen blocks by their running statistics, the trained one by the batch's.
        expected, target = x, y
        for index, block in enumerate(BLOCKS[: number + 1]):
            for name in block:
                for network, value in ((student.network, "expected"), (teacher.network, "target")):
                    part = copy.deepcopy(getattr(network, name))
                    part.train(network is student.network and index == number)
                    result = part(expected if value == "expected" else target)
                    if name == "bn1":
                        result = nn.functional.max_pool2d(result.relu(), 3, 2, 1)
                    expected, target = (result, target) if value == "expected" else (expected, result)
        mean = ((expected - target) ** 2).sum() / expected.numel()
        torch.testing.assert_close(loss, mean, rtol=1e-4, atol=1e-6)


def test_the_teacher_runs_as_deep_as_the_phase_and_frozen_stages_without_a_graph(data: Any) -> None:
    model = make_pair()
    batch = next(iter(data.train.epoch(0)))
    ran: list[str] = []
    graphs: dict[str, bool] = {}
    for name in ("layer1", "layer2", "layer3", "layer4", "fc"):
        getattr(model.teacher.network, name).register_forward_hook(lambda *_, name=name: ran.append(name))
        getattr(model.student.network, name).register_forward_hook(
            lambda module, inputs, output, name=name: graphs.__setitem__(name, output.requires_grad)
        )
    names = ["layer1", "layer2", "layer3", "layer4"]
    for number, phase in enumerate(method_of(model).phases()):
        ran.clear()
        graphs.clear()
        open_groups(model, phase)
        model.zero_grad()
        model.train()
        model.phase = phase
        loss, _ = model(**batch, mode="loss")
        loss.backward()
        assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
        last = number == len(names)
        assert ran == ([] if last else names[: number + 1])
        assert graphs == {name: i == number for i, name in enumerate([*names, "fc"]) if i <= number}
        # Whoever looks at the student afterwards finds it as `train()` has left it.
        assert all(module.training for module in model.student.network.modules())


def test_frozen_leaves_no_trace_even_after_an_error() -> None:
    stages = stages_of(build_network("resnet18", num_classes=3, width=0.25, image_size=32))
    with pytest.raises(KeyError), evaluating(*stages[:2]):
        assert not any(module.training for stage in stages[:2] for module in stage.modules())
        assert all(module.training for module in stages[2].modules())
        raise KeyError
    assert all(module.training for stage in stages for module in stage.modules())
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("name", "small", "expected"),
    [
        ("resnet18", False, [4, 8, 16, 32]),
        ("resnet18", True, [1, 2, 4, 8]),
        ("resnet20", False, [1, 2, 4]),
        ("mobilenet_v1", False, [4, 8, 16, 32]),
        ("vgg16", False, [4, 8, 16]),
        ("deit_tiny", False, [16, 16, 16, 16]),
    ],
)
def test_blocks_lie_between_down_sampling_layers(name: str, small: bool, expected: list[int]) -> None:
    stages = stages_of(build_network(name, num_classes=3, width=0.25, image_size=32, small_stem=small))
    assert [stages[i].stride for i, _ in pair_blocks(stages, stages)] == expected
    assert [i for i, _ in pair_blocks(stages, stages)] == [j for _, j in pair_blocks(stages, stages)]


def test_cuts_of_ones_own() -> None:
    assert method_of(make_pair(cut_at=[8, 32])).spans == [(0, 2), (3, 4)]
    assert method_of(make_pair(cut_at=[2, 4, 8, 16, 32])).spans == [(0, 0), (1, 1), (2, 2), (3, 3), (4, 4)]
    assert method_of(make_pair(2)).spans == [(0, 1), (2, 4)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"stages": 5}, r"method.stages=5: expected 1 to 4"),
        ({"stages": 0}, r"method.stages=0: expected an integer >= 1"),
        ({"cut_at": [3, 32]}, r"method.cut_at=\[3, 32\]: expected some of \[2, 4, 8, 16, 32\]"),
        ({"cut_at": [4, 8]}, r"method.cut_at=\[4, 8\]: expected a stage of stride 32"),
        ({"phase_length": "half"}, r"method.phase_length=half: expected one of full, split"),
    ],
)
def test_mistakes_are_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        make_pair(**options)
    assert "\n" not in str(caught.value)


def test_the_teacher_must_reach_as_deep() -> None:
    with pytest.raises(UserError, match="teacher: expected a stage of stride 32"):
        build_method("stagewise", make_classifier("resnet18", CLASSES, 2), make_classifier("resnet20", 3, 1))


def test_stages_that_the_student_keeps_frozen_join_the_next(data: Any) -> None:
    student, teacher = make_classifier("resnet18", CLASSES, 2), make_teacher("resnet34", CLASSES)
    student.network.conv1.requires_grad_(False)
    student.network.bn1.requires_grad_(False)
    student.network.layer1.requires_grad_(False)
    method = build_method("stagewise", student, teacher)
    assert isinstance(method, Stagewise)
    assert method.spans == [(0, 2), (3, 3), (4, 4)]
    student.requires_grad_(False)
    with pytest.raises(UserError, match="keeps its last stage frozen"):
        build_method("stagewise", student, teacher)


def test_adapters_are_for_the_loss_alone(data: Any, tmp_path: Path) -> None:
    """Channels that differ are adapted on the student's side; what the next stage reads is the student's own map."""
    model = make_pair(wide=True)
    method = method_of(model)
    shapes = [tuple(adapter.weight.shape[:2]) for adapter in method.adapters]  # type: ignore[union-attr]
    assert shapes == [(theirs, ours) for ours, theirs in zip((16, 32, 64, 128), (64, 128, 256, 512), strict=True)]
    assert all(isinstance(adapter, nn.Identity) for adapter in method_of(make_pair()).adapters)
    watch = Watch()
    fit(model, data, tmp_path, {**SCHEDULE, "epochs": 1}, extra_hooks=[watch])
    for number in range(4):
        own = {key for key in watch.changed()[f"stage{number + 1}"] if key.startswith("method")}
        assert own == {f"method.adapters.{number}.weight", f"method.adapters.{number}.bias"}
    assert not any("adapters" in key for key in torch.load(tmp_path / "student.pth"))


def test_lengths_and_a_fresh_schedule_in_every_phase(data: Any, tmp_path: Path) -> None:
    epochs = {
        length: [phase.steps(8) for phase in method_of(make_pair(phase_length=length)).phases()]
        for length in ("full", "split")
    }
    assert epochs == {"full": [8, 8, 8, 8, 8], "split": [2, 2, 2, 2, 8]}
    short = method_of(make_pair(2, phase_length="split", head_length=0.25))
    assert [phase.steps(8) for phase in short.phases()] == [4, 4, 2]
    fit(make_pair(2, phase_length="split"), data, tmp_path, {**SCHEDULE, "epochs": 4})
    rates: dict[str, list[float]] = {}
    for row in rows(tmp_path):
        if row["kind"] == "train":
            rates.setdefault(row["phase"], []).append(row["lr"])
    lr, steps = SCHEDULE["lr"], len(data.train)
    for name, count in (("stage1", 2), ("stage2", 2), ("train", 4)):
        half = count * steps // 2
        assert rates[name] == pytest.approx([lr] * half + [0.1 * lr] * half)


# -------------------------------------------------------------------------------------------------------------- cost


def forward_flops(network: nn.Module, images: torch.Tensor) -> dict[str, float]:
    """Operations per image of convolutions and linear layers by top-level child, from their shapes."""
    found: dict[str, float] = {}

    def add(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
            if isinstance(module, nn.Conv2d):
                inner = module.in_channels * math.prod(module.kernel_size)
            else:
                assert isinstance(module, nn.Linear)
                inner = module.in_features
            found[name] = found.get(name, 0.0) + 2 * inner * output[0].numel()

        return hook

    twin = copy.deepcopy(network).eval()
    for key, module in twin.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(add(key.partition(".")[0]))
    with torch.no_grad():
        twin(images)
    return found


def test_operations_are_those_of_the_layers(data: Any) -> None:
    """Frozen stages and the teacher cost a forward pass, what is trained costs three, its first layer two."""
    model = make_pair()
    method = method_of(model)
    batch = few_images(next(iter(data.train.epoch(0))))
    before, generator = bits(model.state_dict()), torch.get_rng_state()
    flops = method.flops(model, batch)
    assert bits(model.state_dict()) == before and torch.equal(torch.get_rng_state(), generator)
    ours = forward_flops(model.student.network, batch["inputs"][:1])
    theirs = forward_flops(model.teacher.network, batch["inputs"][:1])

    def until(found: dict[str, float], number: int) -> float:
        return sum(found.get(part, 0.0) for block in BLOCKS[: number + 1] for part in block)

    for number in range(4):
        trained = until(ours, number) - (until(ours, number - 1) if number else 0.0)
        exact = until(ours, number) + until(theirs, number) + 2 * trained
        missing = exact - flops[f"stage{number + 1}"]
        # The gradient for a stage's input, which nobody asks for: of its first layer and its shortcut's projection.
        layer = [module for module in getattr(model.student.network, BLOCKS[number][-1])[0].modules()]
        if number:
            first, projection = layer[1], model.student.network.get_submodule(f"layer{number + 1}.0.downsample.0")
            side = 32 // 4 // 2**number
            spared = sum(
                2 * c.in_channels * math.prod(c.kernel_size) * c.out_channels * side**2 for c in (first, projection)
            )
        else:
            spared = ours["conv1"]
        assert missing == pytest.approx(spared), number
    assert flops["train"] == pytest.approx(until(ours, 3) + 2 * ours["fc"])
    assert flops["task"] == pytest.approx(3 * until(ours, 4) - ours["conv1"])
    assert flops["end_to_end"] == pytest.approx(3 * until(ours, 3) - ours["conv1"] + until(theirs, 3))
    single = make_pair(1)
    assert method_of(single).flops(single, batch)["stage1"] == pytest.approx(flops["end_to_end"])


def test_phases_cost_what_their_records_say(data: Any, tmp_path: Path) -> None:
    fit(make_pair(2), data, tmp_path, {**SCHEDULE, "epochs": 2})
    found = phase_records(tmp_path, data.train.batch_size)
    assert [(each["name"], each["epochs"], each["steps"]) for each in found] == [
        (name, 2, 2 * len(data.train)) for name in ("stage1", "stage2", "train")
    ]
    written = [row for row in rows(tmp_path) if row["kind"] == "train"]
    for each in found:
        own = [16 / row["images_per_second"] for row in written if row["phase"] == each["name"]]
        assert each["seconds"] == pytest.approx(sum(own))


# --------------------------------------------------------------------------------------------------- fixed features


def test_kd_on_fixed_features_begins_with_kd_itself(data: Any, tmp_path: Path) -> None:
    settings = {"alpha": 1.0, "task_weight": 1.0}
    fit(make_model("kd", CLASSES, **settings), data, tmp_path / "kd", SCHEDULE)
    model, watch = make_model("kd_fixed_feature", CLASSES, **settings), Watch()
    fresh = model.method.fresh_weight.clone()
    fit(model, data, tmp_path / "fixed", SCHEDULE, extra_hooks=[watch])
    plain = torch.load(tmp_path / "kd" / "student.pth")
    names = [name for name, *_ in watch.states]
    assert names == ["kd", "train"]
    after_kd, final = watch.states[0][2], watch.states[1][2]
    for key, value in bits(plain).items():
        assert after_kd[f"student.network.{key}"] == value, key
        assert (final[f"student.network.{key}"] == value) == (not key.startswith("fc.")), key
    assert watch.states[1][1]["student.network.fc.weight"] == bits({"": fresh})[""]
    assert not torch.equal(fresh, plain["fc.weight"])
    assert not torch.equal(fresh, make_model("kd", CLASSES).student.network.fc.weight)


@pytest.mark.parametrize(
    ("part", "kept"),
    [("features", {"conv1", "bn1", "layer1", "layer2", "layer3"}), ("first_block", {"conv1", "bn1", "layer1"})],
)
def test_fixed_features_stay_fixed(part: str, kept: set[str], data: Any, tmp_path: Path) -> None:
    model, watch = make_model("fixed_feature", CLASSES, frozen=part), Watch()
    fit(model, data, tmp_path, {**SCHEDULE, "epochs": 1}, extra_hooks=[watch])
    changed = {key.removeprefix("student.network.") for key in watch.changed()["train"]}
    plain = model.student.network.state_dict()
    assert changed == {key for key in plain if key.partition(".")[0] not in kept}


# ------------------------------------------------------------------------------------------------- layers of baselines


def test_baselines_compare_the_layers_they_are_told() -> None:
    student, teacher = make_classifier("resnet18", CLASSES, 2), make_classifier("resnet34", CLASSES, 1)
    every = [(i, i) for i in range(5)]
    for stages, expected in (("all", every), ("last", every[-1:]), ("blocks", every[1:]), ([3, 1], [(1, 1), (3, 3)])):
        assert choose_pairs(student, teacher, stages) == expected  # type: ignore[arg-type]
    for name in ("at", "nst"):
        assert build_method(name, student, teacher, stages="blocks").pairs == every[1:]
        assert build_method(name, student, teacher).pairs == every
    for layer, expected in ((None, [(2, 2)]), (3, [(3, 3)]), (-1, [(4, 4)]), ("blocks", every[1:])):
        method = build_method("fitnet", student, teacher, hint_layer=layer)
        assert method.pairs == expected and len(method.regressors) == len(expected)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"method.hint_layer=7: expected one of \[0, 1, 2, 3, 4\]"):
        build_method("fitnet", student, teacher, hint_layer=7)
    with pytest.raises(UserError, match="method.stages=block: .*did you mean 'blocks'"):
        build_method("nst", student, teacher, stages="block")


# ------------------------------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("scale", ["mini", "paper"])
def test_rows_are_the_printed_ones(name: str, scale: str) -> None:
    record = find_table(name)
    shown = table(name, *([] if scale == "mini" else [f"scale={scale}"])).shown
    entries = [each.entry() for each in shown]
    assert [entry["printed"] for entry in entries] == [line["id"] for line in record.rows]
    for entry, printed in zip(entries, record.rows, strict=True):
        assert (entry["role"], entry["teacher"], entry["student"]) == (
            printed["role"],
            printed["teacher"],
            printed["student"],
        )
        assert entry["ours"] == printed.get("ours", False)
    for each, printed in zip(shown, record.rows, strict=True):
        if "K" in printed and each.config["dataset"]["task"] == "classification":
            assert each.config["method"]["stages"] == printed["K"]


def test_fixed_rows_start_from_the_row_above() -> None:
    for arguments in ((), ("seed=1",), ("scale=paper",)):
        cells = {each.row.id: each.config for each in table("fixed_features", *arguments).shown}
        for fixed, start in (
            ("student_fixed", "student"),
            ("teacher_fixed", "teacher"),
            ("teacher_fixed_first_block", "teacher"),
        ):
            assert identity(needed_cells(settle(cells[fixed]))["teacher"]) == identity(cells[start]), (fixed, arguments)


def test_the_papers_settings() -> None:
    shown = {each.row.id: each.config for each in table("coco_retinanet", "scale=paper").shown}
    schedule = shown["stagewise"]["schedule"]
    wanted = {"iterations": 90000, "batch_size": 16, "lr": 0.01, "momentum": 0.9, "weight_decay": 1e-4, "gamma": 0.1}
    assert {key: schedule[key] for key in wanted} == wanted
    assert [round(share * 90) for share in schedule["milestones"]] == [60, 80]
    assert shown["stagewise"]["student"]["pretrained"] == "IMAGENET1K_V1"
    for name, stem in (("cifar100_stagewise", True), ("imagenet_stagewise", False)):
        for each in table(name, "scale=paper").shown:
            config = each.config
            assert config["student"]["network"]["small_stem"] is stem
            assert config["student"]["network"]["width"] == 1
            if config["method"]["name"] == "kd":
                method = config["method"]
                assert (method["temperature"], method["alpha"], method["task_weight"]) == (4, 1, 1)


def test_the_stem_is_an_ablation() -> None:
    """Its rows differ from the printed ones in nothing but the stem, and come when they are asked for."""
    for name, own in (("cifar100_stagewise", "stagewise"), ("stage_count", "stages_4")):
        wanted = [row for base in ("student", "teacher", own) for row in (base, f"{base}_imagenet_stem")]
        shown = {each.row.id: each.config for each in table(name, f"rows=[{','.join(wanted)}]").shown}
        for base in ("student", "teacher", own):
            config, ablated = copy.deepcopy(shown[base]), shown[f"{base}_imagenet_stem"]
            for who in ("student", "teacher"):
                if config[who]["network"]:
                    assert config[who]["network"]["small_stem"] and not ablated[who]["network"]["small_stem"]
                    config[who]["network"]["small_stem"] = False
            assert {**config, "table": None} == {**ablated, "table": None}
        assert not any(each.row.optional for each in table(name).shown)


def test_k4_of_one_table_is_the_method_of_the_other() -> None:
    counts = {each.row.id: list(each.cells) for each in table("stage_count").shown}
    methods = {each.row.id: list(each.cells) for each in table("cifar100_stagewise").shown}
    assert counts["stages_4"] == methods["stagewise"]
    assert counts["student"] == methods["student"] and counts["teacher"] == methods["teacher"]


def test_a_cells_result_says_what_each_phase_cost(tmp_path: Path) -> None:
    from experiments.cell import run_cell

    config = composed(
        "teacher=resnet20",
        "student=resnet8",
        "method=stagewise",
        "schedule.epochs=1",
        "dataset.train_size=64",
        "dataset.test_size=16",
        "dataset.image_size=32",
        "wandb.mode=disabled",
        f"output_root={tmp_path}",
    )
    result = run_cell(config)
    assert json.loads((tmp_path / "cells" / result["id"] / "result.json").read_text())["flops"] == result["flops"]
    assert [each["name"] for each in result["phases"]] == ["stage1", "stage2", "stage3", "train"]
    assert list(result["stages"]) == ["stage1", "stage2", "stage3"]
    assert set(result["flops"]) == {"stage1", "stage2", "stage3", "train", "end_to_end", "task"}
    assert all(value > 0 for value in result["flops"].values())
