"""Knowledge transfer from a plain config of mmdet, trained by mmengine's own runner."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("mmdet", reason="detectors need mmdet (the extra `mm`)")

from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.runner import CheckpointLoader, Runner
from torch.utils.data import Dataset

from checks import bits, keeping
from configs import composed
from dense_settings import CLASSES, NORMALISATION, SIZE, WIDTH, make_data, make_network
from kt.errors import UserError
from kt.mm import KnowledgeTransfer
from kt.models.dense import build_dense, dense_config

CONFIG = """
default_scope = "mmdet"
custom_imports = dict(imports=["kt.mm"])
model = dict(type="KnowledgeTransfer", student={student}, teacher=dict(model={teacher}, checkpoint={checkpoint!r}),
             method=dict(type="hybrid_forward", balance="dynamic"))
optim_wrapper = dict(optimizer=dict(type="SGD", lr=0.001), clip_grad=dict(max_norm=10))
"""


class Samples(Dataset):
    """A few packed samples, as mmdet's datasets give them."""

    def __init__(self) -> None:
        batch = next(make_data("detection").train.epoch(0))
        self.samples = list(zip(batch["inputs"], batch["data_samples"], strict=True))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        inputs, sample = self.samples[index]
        return {"inputs": inputs, "data_samples": sample}


def student_config() -> dict[str, Any]:
    return dense_config("retinanet_resnet18", CLASSES["detection"], WIDTH, SIZE, NORMALISATION)


def write(folder: Path) -> Config:
    """A config file with a segmentor that teaches a detector."""
    teacher = make_network("deeplabv2_resnet101", "segmentation", seed=1)
    torch.save(teacher.network.state_dict(), folder / "teacher.pth")
    theirs = dense_config("deeplabv2_resnet101", CLASSES["segmentation"], WIDTH, SIZE, NORMALISATION)
    text = CONFIG.format(student=student_config(), teacher=theirs, checkpoint=str(folder / "teacher.pth"))
    (folder / "config.py").write_text(text)
    return Config.fromfile(folder / "config.py")


def test_mmengines_runner_trains_it(tmp_path: Path) -> None:
    config = write(tmp_path)
    loader = {"dataset": Samples(), "batch_size": 2, "num_workers": 0, "collate_fn": {"type": "pseudo_collate"}}
    runner = Runner(
        config.model,
        str(tmp_path / "work"),
        train_dataloader={**loader, "sampler": {"type": "DefaultSampler", "shuffle": True}},
        train_cfg={"by_epoch": True, "max_epochs": 2},
        optim_wrapper={"type": "OptimWrapper", **config.optim_wrapper},
        default_scope="mmdet",
        experiment_name=tmp_path.name,
    )
    model: Any = runner.model
    before = bits(model.transfer.teacher.state_dict())
    fresh = bits(model.transfer.student.state_dict())
    runner.train()
    assert bits(model.transfer.teacher.state_dict()) == before
    assert bits(model.transfer.student.state_dict()) != fresh
    balance, total, l3 = (
        float(runner.message_hub.get_scalar(f"train/{name}").current()) for name in ("kt/balance", "loss", "kt/l3")
    )
    assert balance > 0 and total == pytest.approx(3 * l3, rel=1e-5)

    with DefaultScope.overwrite_default_scope("mmdet"):
        plain = build_dense(student_config())
    path = str(tmp_path / "work" / "epoch_2.pth")
    keys = CheckpointLoader.load_checkpoint(path)["state_dict"]
    assert all(key.startswith(("student.network.", "method.adapters.")) for key in keys)
    plain.init_cfg = {"type": "Pretrained", "checkpoint": path, "prefix": "student.network."}
    plain._is_init = False
    plain.init_weights()
    for key, value in model.transfer.student.network.state_dict().items():
        assert torch.equal(value, plain.state_dict()[key]), key


def test_nothing_stays_random_and_phases_need_the_engine(tmp_path: Path) -> None:
    config = write(tmp_path)
    with DefaultScope.overwrite_default_scope("mmdet"):
        with pytest.raises(UserError, match="teacher.checkpoint: expected the file"):
            KnowledgeTransfer(config.model.student, config.model.method, {"model": config.model.teacher.model})
        with pytest.raises(UserError, match="teacher=none"):
            KnowledgeTransfer(config.model.student, config.model.method)
        with pytest.raises(UserError, match="method='hybrid'"):
            KnowledgeTransfer(config.model.student, {"type": "hybrid"})


def test_a_teachers_checkpoint_comes_before_the_weights_that_its_config_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write(tmp_path).model
    theirs = {**model.teacher.model, "init_cfg": {"type": "Pretrained", "checkpoint": "nowhere.pth"}}
    state = torch.load(tmp_path / "teacher.pth")
    with DefaultScope.overwrite_default_scope("mmdet"):
        monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
        monkeypatch.setattr("torch.hub.download_url_to_file", lambda _, to, **__: torch.save(state, to))
        for checkpoint in (str(tmp_path / "teacher.pth"), "https://example.org/theirs.pth"):
            teacher = {"model": theirs, "checkpoint": checkpoint}
            made: Any = KnowledgeTransfer(model.student, model.method, teacher)
            assert bits(made.transfer.teacher.network.state_dict()) == bits(state)
        with pytest.raises(UserError, match="^teacher.config=mmdet::retinanet/retinanet_r51.py: there is no such file"):
            teacher = {"config": "mmdet::retinanet/retinanet_r51.py", "checkpoint": "teacher.pth"}
            KnowledgeTransfer(model.student, model.method, teacher)


def test_activation_checkpointing_keeps_less_and_changes_no_loss(tmp_path: Path) -> None:
    model, batch = write(tmp_path).model, next(make_data("detection").train.epoch(0))
    losses, kept = [], []
    with DefaultScope.overwrite_default_scope("mmdet"):
        for on in (False, True):
            torch.manual_seed(0)
            made: Any = KnowledgeTransfer(model.student, model.method, model.teacher, activation_checkpointing=on)
            with keeping() as sizes:
                found = made.train()(batch["inputs"], batch["data_samples"], mode="loss")
            found["loss"].backward()
            losses.append(bits({name: each for name, each in found.items() if isinstance(each, torch.Tensor)}))
            losses[-1] |= bits({name: each.grad for name, each in made.named_parameters() if each.grad is not None})
            kept.append(sum(sizes.values()))
    assert losses[0] == losses[1] and kept[1] < kept[0] / 1.5


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def test_no_code_in_the_files_that_a_config_names_is_run(tmp_path: Path) -> None:
    model = write(tmp_path).model
    torch.save({"state_dict": {}, "more": Evil(tmp_path / "made")}, tmp_path / "evil.pth")
    student = {**model.student, "init_cfg": {"type": "Pretrained", "checkpoint": str(tmp_path / "evil.pth")}}
    with DefaultScope.overwrite_default_scope("mmdet"):
        for each, teacher in (
            (student, model.teacher),
            (model.student, {**model.teacher, "checkpoint": str(tmp_path / "evil.pth")}),
        ):
            with pytest.raises(UserError, match="holds posix.mkdir, code that is never run here") as caught:
                KnowledgeTransfer(each, model.method, teacher)
            assert "\n" not in str(caught.value) and not (tmp_path / "made").exists()


def test_the_recipe_of_the_detection_teacher_is_that_of_mmdet() -> None:
    """Its epochs are eight passes over the 2,975 images."""
    import mmdet

    folder = Path(mmdet.__file__).parent / ".mim" / "configs" / "cityscapes"
    theirs = Config.fromfile(folder / "faster-rcnn_r50_fpn_1x_cityscapes.py")
    ours = composed("student=fasterrcnn_resnet50", "dataset=cityscapes_det")["schedule"]
    optimizer, (warmup, steps) = theirs.optim_wrapper.optimizer, theirs.param_scheduler
    assert {key: ours[key] for key in ("lr", "momentum", "weight_decay")} == {
        key: optimizer[key] for key in ("lr", "momentum", "weight_decay")
    }
    passes = theirs.train_cfg.max_epochs * theirs.train_dataloader.dataset.times
    assert ours["iterations"] * ours["batch_size"] == pytest.approx(passes * 2975, rel=0.01)
    assert ours["milestones"] == [steps.milestones[0] / steps.end]
    assert ours["warmup_epochs"] * ours["interval"] == warmup.end
