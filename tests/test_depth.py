"""Depth: what networks read and give, data and their augmentation, errors, methods, and one-line refusals."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.transforms import functional as colours_of

pytest.importorskip("mmdet", reason="dense tasks need mmdet and mmseg (the extra `mm`)")

from layouts import depthfolder, nyuv2, picture, plain_depth, real

from dense_settings import SAMPLES, SIZE, make_data, make_model, make_network, make_teacher
from experiments.build import build_teacher, describe_student
from kt.data import build_data
from kt.data.dense_scenes import scene_seed
from kt.data.depth import JITTER, Approach, CutMiddle, jittered, turning
from kt.data.scenes import FARTHEST_OBJECT, STUFF, draw_scene
from kt.dense import as_teacher
from kt.errors import UserError
from kt.evaluation import pictures
from kt.evaluation.depth import depth_errors
from kt.evaluation.outcomes import Outcomes
from kt.features import Features
from kt.functional import depth_error
from kt.methods import build_method
from kt.models.backbone import StagedBackbone
from kt.models.dense import dense_config

FOCAL = 100.0


def build(root: Path | str, **dataset: Any) -> Any:
    return build_data(dataset, root, batch_size=2, seed=0, workers=0)


def samples_of(batches: Any) -> list[Any]:
    return [sample for batch in batches for sample in batch["data_samples"]]


class Answer(nn.Module):
    """A network whose depth is a function of the true one."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self.function = function

    def predict(self, batch: dict[str, Any]) -> list[Any]:
        for sample in batch["data_samples"]:
            sample.pred_depth = self.function(sample.gt_depth)
        return batch["data_samples"]


# Networks


def test_the_decoder_has_the_printed_sizes() -> None:
    """An eighth of a ResNet-50 is 256 channels deep: then half, and halves of that on maps of twice the size."""
    model = make_network("depth_resnet50", "depth", 0).eval()
    x = torch.rand(1, 3, 66, 130)
    levels = model.extract(x)
    assert levels[-1].shape == (1, 256, 3, 5)
    head = model.network.decode_head
    maps = [head.narrow(levels[-1])]
    for step in head.enlarge:
        maps.append(step(maps[-1]))
    assert [tuple(each.shape[1:]) for each in maps] == [(128 // 2**i, 3 * 2**i, 5 * 2**i) for i in range(5)]
    assert [key for key in head.state_dict() if key.endswith("bias") and "final" in key] == []
    assert maps[0].min() < 0 and all(each.min() == 0 for each in maps[1:])
    first = head.enlarge[0][0].weight
    assert first.std().item() == pytest.approx((2 / (9 * 128)) ** 0.5, rel=0.03)
    found = model.depth(levels, x)
    assert found.shape == (1, 66, 130)
    # Bilinear, corners on corners.
    answer = head(levels[-1])[0, 0].detach().numpy()
    for row, border in ((0, 0), (65, 47)):
        expected = np.interp(np.linspace(0, 79, 130), np.arange(80), answer[border])
        np.testing.assert_allclose(found[0, row].detach().numpy(), expected, rtol=1e-3, atol=1e-5)


def test_the_task_is_the_networks_own_loss_and_the_decoder_runs_once() -> None:
    model = make_model("depth kd")
    student = model.student.eval()
    batch = next(make_data("depth").train.epoch(0))
    prepared = student.prepare(batch)
    calls: list[None] = []
    student.network.decode_head.register_forward_hook(lambda *_: calls.append(None))
    ours, theirs = Features(student, prepared["inputs"]), Features(model.teacher, prepared["inputs"], graph=False)
    loss, logged = model.method.compare(ours, theirs, prepared)  # type: ignore[operator]
    assert len(calls) == 1
    own = student.network.data_preprocessor({key: batch[key] for key in ("inputs", "data_samples")}, training=True)
    losses = student.network(**own, mode="loss")
    assert logged["loss_task"].item() == pytest.approx(losses["loss_depth"].item(), rel=1e-5)
    soft = (student.network(**own) - model.teacher.network(**own)).abs().mean().item()
    assert logged["loss_soft"].item() == pytest.approx(soft, rel=1e-5)
    assert loss.item() == pytest.approx(0.1 * losses["loss_depth"].item() + 0.9 * soft, rel=1e-5)


def test_measured_depth_reaches_those_that_read_it_in_metres() -> None:
    student = make_network("depth_resnet18, sparse", "depth", 0)
    batch = next(make_data("depth").train.epoch(0))
    prepared = student.prepare(batch)
    measured = torch.stack([sample.sparse_depth for sample in batch["data_samples"]])
    assert prepared["inputs"].shape == (2, 4, *SIZE) and torch.equal(prepared["inputs"][:, 3], measured)
    own = student.network.data_preprocessor({key: batch[key] for key in ("inputs", "data_samples")}, training=True)
    torch.testing.assert_close(student.normalise(prepared["inputs"]), own["inputs"])
    assert torch.equal(own["inputs"][:, 3], measured)
    # A teacher for colours alone sees those of the same images.
    teacher = make_teacher("depth_resnet50", "depth")
    colours = prepared["inputs"][:, :3]
    assert torch.equal(teacher.normalise(prepared["inputs"]), teacher.normalise(colours))
    assert student.normaliser.in_rgb()[0][3:] == [0.0] and teacher.normaliser.in_rgb()[0][3:] == []


def test_further_inputs_leave_the_weights_for_colours_alone() -> None:
    torch.manual_seed(0)
    plain = StagedBackbone("resnet18", 0.25, out_strides=(32,))
    torch.manual_seed(0)
    wide = StagedBackbone("resnet18", 0.25, out_strides=(32,), in_channels=4)
    theirs, ours = plain.state_dict(), wide.state_dict()
    assert theirs.keys() == ours.keys()
    first = next(iter(ours))
    assert torch.equal(ours[first][:, :3], theirs[first]) and ours[first][:, 3].std() > 0
    x = torch.rand(1, 4, 64, 64)
    x[:, 3] = 0
    torch.testing.assert_close(wide.eval()(x)[0], plain.eval()(x[:, :3])[0])


def test_a_teacher_cannot_read_what_the_student_has_not(tmp_path: Path) -> None:
    teacher = make_network("depth_resnet50, sparse", "depth", 0)
    network = {"name": "depth_resnet50", "width": 0.125, "small_stem": False, "config": None, "options": None}
    config = {"student": {"network": network}, "dataset": {"image_size": SIZE}, "teacher": {"network": network}}
    describe_student(tmp_path, config, teacher, {}, make_data("depth").spec)
    torch.save(teacher.network.state_dict(), tmp_path / "student.pth")
    with pytest.raises(UserError, match="^teacher=depth_resnet50: was trained with measured depth .*depth_samples=0$"):
        build_teacher(config, make_data("depth", depth_samples=0).spec, tmp_path / "student.pth")
    assert build_teacher(config, make_data("depth").spec, tmp_path / "student.pth") is not None


def test_full_networks_train_all_that_comes_pretrained() -> None:
    imagenet = ((0.485, 0.456, 0.406, 0.0), (0.229, 0.224, 0.225, 1.0))
    config = dense_config("depth_resnet50", 1, 1.0, (228, 304), imagenet, pretrained="IMAGENET1K_V1")
    assert config["backbone"]["norm_eval"] is False and "frozen_stride" not in config["backbone"]
    assert config["backbone"]["in_channels"] == 4 and config["in_channels"] == 2048


# Errors


def test_errors_are_those_of_the_definition() -> None:
    rng = np.random.default_rng(0)
    truth = rng.uniform(0.5, 9, (6, 8)).astype(np.float32)
    truth[:2, :3] = 0
    found = (truth * rng.uniform(0.4, 2.2, truth.shape)).astype(np.float32)
    found[5, 7], found[5, 6] = -truth[5, 7], 0
    squares, absolute, relative, near, count = 0.0, 0.0, 0.0, [0, 0, 0], 0
    for d, t in zip(found.flatten().tolist(), truth.flatten().tolist(), strict=True):
        if t == 0:
            continue
        count, squares, absolute = count + 1, squares + (d - t) ** 2, absolute + abs(d - t)
        relative += abs(d - t) / t
        for k in range(3):
            near[k] += d > 0 and max(d / t, t / d) < 1.25 ** (k + 1)
    expected = {"rmse": (squares / count) ** 0.5, "mae": absolute / count, "rel": relative / count}
    expected |= {f"delta{k + 1}": 100 * near[k] / count for k in range(3)}
    assert depth_errors(found, truth) == pytest.approx(expected)
    assert depth_errors(found, 0 * truth) is None
    maps = [torch.from_numpy(each)[None] for each in (found, truth)]
    assert depth_error(*maps).item() == pytest.approx(absolute / count, rel=1e-6)
    assert depth_error(maps[0].requires_grad_(), 0 * maps[1]).item() == 0


def test_scores_are_means_over_images_and_each_images_error_is_kept(tmp_path: Path) -> None:
    settings = depthfolder(tmp_path)
    data = build(tmp_path, **settings)
    truths = [plain_depth(24, 32, i) / 1000 for i in range(3)]
    each = np.array([0.3 * np.sqrt(np.mean(truth[truth > 0] ** 2)) for truth in truths])
    outcomes = Outcomes()
    found = data.score(Answer(lambda truth: 1.3 * truth), outcomes)
    assert found["rmse"] == pytest.approx(each.mean(), rel=1e-5) and found["rel"] == pytest.approx(0.3, rel=1e-5)
    assert (found["delta1"], found["delta2"]) == (0, 100)
    assert outcomes.images["indices"].tolist() == [0, 1, 2]
    assert outcomes.images["rmse"] == pytest.approx(each, rel=1e-5)
    known = [truth[truth > 0] for truth in truths]
    assert outcomes.images["depth_mean"] == pytest.approx([part.mean() for part in known], rel=1e-5)
    assert outcomes.images["depth_std"] == pytest.approx([part.std() for part in known], rel=1e-5)
    assert outcomes.sheet is not None and not outcomes.classes and not outcomes.sheet.names
    for i, (shown, truth) in enumerate(zip(outcomes.sheet.pictures, truths, strict=True)):
        own = pictures.of_depth(i, shown.image, truth, 1.3 * truth)
        assert (shown.index, shown.note) == (i, own.note) and np.array_equal(shown.truth, own.truth)
        assert np.array_equal(shown.found, own.found) and not np.array_equal(shown.found, shown.truth)
    pooled = 0.3 * np.sqrt(np.mean(np.concatenate([truth[truth > 0] ** 2 for truth in truths])))
    assert abs(pooled - each.mean()) > 0.01 * pooled
    for split, i in (("val", 0), ("val", 1), ("val", 2)):
        picture(tmp_path / "rooms" / "depth" / split / f"{i}.png", np.zeros((24, 32), np.uint16))
        if i == 1:  # two images without any depth do not count
            rest = build(tmp_path, **settings).score(Answer(lambda truth: 1.3 * truth))
            assert rest["rmse"] == pytest.approx(each[2], rel=1e-5)
    with pytest.raises(UserError, match="^dataset: no test image has a pixel of known depth$"):
        build(tmp_path, **settings).score(Answer(lambda truth: truth))


# Data


def test_the_scenes_are_those_of_segmentation_with_their_depth() -> None:
    data = make_data("depth", augmentation="none", train_size=3, depth_samples=0)
    batches = list(data.train.epoch(0))
    for batch in batches:
        for index, image, sample in zip(batch["indices"].tolist(), batch["inputs"], batch["data_samples"], strict=True):
            scene = draw_scene(scene_seed("segmentation", "photo", "train"), index, *SIZE)
            assert np.array_equal(image.numpy(), scene.image[..., ::-1].transpose(2, 0, 1))
            depth = sample.gt_depth.numpy()
            assert np.array_equal(depth > 0, scene.depth <= FARTHEST_OBJECT)
            assert depth[depth > 0] == pytest.approx(scene.depth[depth > 0] / 10)
            assert (depth[scene.semantic == STUFF.index("sky")] == 0).all() and "sparse_depth" not in sample
    assert data.spec.task == "depth" and len(data.spec.mean) == 3


def test_measured_pixels_are_true_and_in_tests_always_the_same() -> None:
    data = make_data("depth", test_size=8)
    tests = [[sample.sparse_depth for sample in samples_of(data.test.epoch(epoch))] for epoch in (0, 1)]
    assert all(torch.equal(one, other) for one, other in zip(*tests, strict=True))
    counts = [int((sparse > 0).sum()) for sparse in tests[0]]
    assert len(set(counts)) > 1 and np.mean(counts) == pytest.approx(SAMPLES, abs=4 * (SAMPLES / 8) ** 0.5)
    for sample in samples_of(data.test.epoch(0)):
        kept = sample.sparse_depth > 0
        assert torch.equal(sample.sparse_depth[kept], sample.gt_depth[kept])
    other = build_data(
        {**vars_of(data), "depth_samples": SAMPLES, "test_size": 8}, ".", batch_size=2, seed=5, workers=0
    )
    assert torch.equal(tests[0][0], samples_of(other.test.epoch(0))[0].sparse_depth)
    first, second = (
        {int(index): sample for batch in data.train.epoch(epoch) for index, sample in pairs(batch)} for epoch in (0, 1)
    )
    assert not torch.equal(first[0].sparse_depth > 0, second[0].sparse_depth > 0)


def vars_of(data: Any) -> dict[str, Any]:
    return {"name": data.spec.name, "task": "depth", "image_size": list(SIZE), "augmentation": "flip", "train_size": 12}


def pairs(batch: dict[str, Any]) -> Any:
    return zip(batch["indices"].tolist(), batch["data_samples"], strict=True)


def a_plane(height: int, width: int, normal: tuple[float, float, float]) -> np.ndarray:
    """The depth (h, w) of the points with normal . (x, y, z) = 1, seen from the origin."""
    x, y = np.meshgrid(np.arange(width) - (width - 1) / 2, np.arange(height) - (height - 1) / 2)
    return 1 / (normal[0] * x / FOCAL + normal[1] * y / FOCAL + normal[2])


def fitted_plane(depth: np.ndarray) -> tuple[np.ndarray, float]:
    """The normal as above, and the largest error of normal . (x, y, z) = 1 over the pixels of known depth."""
    rows, columns = np.nonzero(depth)
    z = depth[rows, columns]
    middle = [(side - 1) / 2 for side in depth.shape]
    points = np.stack([(columns - middle[1]) * z / FOCAL, (rows - middle[0]) * z / FOCAL, z], axis=1)
    normal = np.linalg.lstsq(points, np.ones(len(points)), rcond=None)[0]
    return normal, float(np.abs(points @ normal - 1).max())


def test_a_plane_stays_a_plane_as_far_from_the_axis_and_nearer() -> None:
    """Enlarged by s and turned by R, (x, y, z) is (R (x, y), z / s): of the normal (a, b, c), (R (a, b), s c)."""
    normal = (0.12, -0.2, 0.3)
    depth = a_plane(120, 160, normal).astype(np.float32)
    assert fitted_plane(depth)[1] < 1e-5
    zooms, angles = [], []
    for seed in (0, 4, 5):
        np.random.seed(seed)
        moved = Approach().transform({"img": np.zeros((120, 160, 3), np.uint8), "gt_seg_map": depth.copy()})
        found, error = fitted_plane(moved["gt_seg_map"])
        assert error < 0.02
        assert np.hypot(*found[:2]) == pytest.approx(np.hypot(*normal[:2]), rel=0.03)
        zooms.append(found[2] / normal[2])
        turn = np.arctan2(found[1], found[0]) - np.arctan2(normal[1], normal[0])
        angles.append(np.degrees(turn))
    assert min(zooms) >= 1 and max(zooms) <= 1.51 and np.ptp(zooms) > 0.1
    assert max(map(abs, angles)) <= 5.5 and np.ptp(angles) > 1
    np.testing.assert_allclose(turning((41, 61), 3, 1.3) @ (30, 20, 1), (30, 20))


def test_images_move_with_their_depth_and_colours_change() -> None:
    rng = np.random.default_rng(0)
    image, depth = np.full((60, 80, 3), 40, np.uint8), np.full((60, 80), 4, np.float32)
    image[20:45, 15:50], depth[20:45, 15:50] = 200, 2
    colours = set()
    for seed in rng.integers(0, 1000, 3).tolist():
        np.random.seed(seed)
        moved = Approach().transform({"img": image.copy(), "gt_seg_map": depth.copy()})
        near, inside = moved["gt_seg_map"], moved["gt_seg_map"] > 0
        assert len(np.unique(near[inside])) == 2
        split = near[inside].mean()
        bright = moved["img"].mean(axis=2) > moved["img"][inside].mean()
        both = (near < split) & inside
        assert (both & bright).sum() / ((both | bright) & inside).sum() > 0.9
        colours.add(int(moved["img"].max()))
        assert moved["img"].dtype == np.uint8
    assert len(colours) > 1


def test_colours_change_as_torchvisions() -> None:
    image = np.random.default_rng(0).integers(60, 180, (8, 9, 3), np.uint8)
    adjust = (colours_of.adjust_brightness, colours_of.adjust_contrast, colours_of.adjust_saturation)
    for seed in range(4):
        np.random.seed(seed)
        found = jittered(image)
        np.random.seed(seed)
        expected = torch.from_numpy(image[..., ::-1].copy()).permute(2, 0, 1) / 255
        for kind in np.random.permutation(3):
            expected = adjust[kind](expected, np.random.uniform(1 - JITTER, 1 + JITTER))
        rgb = 255 * expected.permute(1, 2, 0).numpy()
        np.testing.assert_allclose(found[..., ::-1], rgb, atol=0.6)


def test_what_is_cut_is_the_middle() -> None:
    image = np.arange(60 * 80, dtype=np.float32).reshape(60, 80)
    cut = CutMiddle((30, 30)).transform({"img": image, "gt_seg_map": image})
    assert np.array_equal(cut["gt_seg_map"], image[:, 10:70]) and cut["img_shape"] == (60, 60)


def test_depthfolder_is_in_millimetres_and_zero_is_no_reading(tmp_path: Path) -> None:
    data = build(tmp_path, **depthfolder(tmp_path))
    assert (data.spec.train_size, data.spec.test_size, data.spec.num_classes) == (4, 3, 1)
    for batch in data.train.epoch(0):
        for index, sample in pairs(batch):
            assert sample.gt_depth.numpy() == pytest.approx(plain_depth(24, 32, index) / 1000)
    assert data.score(Answer(lambda truth: truth))["rmse"] == 0
    small = build(tmp_path, **{**depthfolder(tmp_path), "image_size": [12, 12]})
    assert samples_of(small.test.epoch(0))[0].gt_depth.shape == (12, 12)


def test_images_and_depth_are_cut_and_mirrored_together(tmp_path: Path) -> None:
    settings = {**depthfolder(tmp_path), "image_size": [24, 24], "augmentation": "flip"}
    truth, found = plain_depth(24, 32, 0)[:, 4:28].astype(np.float32) / 1000, set()
    grey = np.repeat((truth * 40).astype(np.uint8)[..., None], 3, axis=2)
    whole = np.pad(grey, ((0, 0), (4, 4), (0, 0)))
    for path in (tmp_path / "rooms" / "images" / "train").glob("0.*"):
        path.unlink()
    picture(tmp_path / "rooms" / "images" / "train" / "0.png", whole)
    data = build(tmp_path, **settings)
    for epoch in range(6):
        for batch in data.train.epoch(epoch):
            for (index, sample), image in zip(pairs(batch), batch["inputs"], strict=True):
                if index == 0:
                    mirrored = not np.array_equal(sample.gt_depth, truth)
                    step = -1 if mirrored else 1
                    assert np.array_equal(sample.gt_depth, truth[:, ::step])
                    assert np.array_equal(image[0], grey[:, ::step, 0])
                    found.add(mirrored)
    assert found == {True, False}


def test_without_augmentation_the_same_pixels_are_measured(tmp_path: Path) -> None:
    data = build(tmp_path, **depthfolder(tmp_path), depth_samples=50)
    first, second = ({i: each for b in data.train.epoch(epoch) for i, each in pairs(b)} for epoch in (0, 1))
    assert all(torch.equal(first[i].sparse_depth, second[i].sparse_depth) for i in range(4))
    assert (first[0].sparse_depth > 0).any()


def spoil(root: Path, what: str) -> dict[str, Any]:
    settings = depthfolder(root)
    path = root / "rooms" / "depth" / "train" / "1.png"
    if what == "missing":
        path.unlink()
    elif what == "bytes":
        path.write_bytes(b"no image")
    elif what == "empty":
        for image in (root / "rooms" / "images" / "val").iterdir():
            image.unlink()
    elif what == "8 bit":
        picture(path, np.zeros((24, 32), np.uint8))
    else:
        picture(path, plain_depth(24, 31, 0))
    return settings


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("missing", r"there is no .*rooms/depth/train/1.png; expected .*16 bit in millimetres"),
        ("bytes", r"depth/train/1.png: cannot be read as an image"),
        ("empty", r"rooms/images/val holds no images; expected .*16 bit in millimetres"),
        ("8 bit", r"depth/train/1.png: is an image of the kind L; expected 16 bit and one channel, millimetres"),
        ("size", r"depth/train/1.png: has 24 x 31 pixels; its image 1.png has 24 x 32"),
    ],
)
def test_mistakes_in_depthfolder(what: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as caught:
        list(build(tmp_path, **spoil(tmp_path, what)).train.epoch(0))
    assert "\n" not in str(caught.value)


def test_nyuv2_without_its_frame(tmp_path: Path) -> None:
    data = build(tmp_path, **nyuv2(tmp_path))
    assert (data.spec.train_size, data.spec.test_size) == (2, 1)
    (batch,) = data.test.epoch(0)
    rgb = np.random.default_rng(2).integers(0, 256, (3, 48, 64), np.uint8)
    assert np.array_equal(batch["inputs"][0].numpy(), rgb[::-1, 12:36, 16:48])
    expected = plain_depth(48, 64, 2)[12:36, 16:48] / 1000
    assert batch["data_samples"][0].gt_depth.numpy() == pytest.approx(expected)
    next(iter((tmp_path / "nyudepthv2" / "val" / "official").iterdir())).write_bytes(b"no archive")
    with pytest.raises(UserError, match=r"00002.h5: cannot be read .*; expected HDF5 with rgb and depth"):
        list(build(tmp_path, **nyuv2(tmp_path / "other")).test.epoch(0)) and list(data.test.epoch(0))


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"rgb": np.zeros((48, 64, 3), np.uint8)}, "rgb uint8 (48, 64, 3) and depth float32 (48, 64)"),
        ({"rgb": np.zeros((3, 48, 64), np.float32)}, "rgb float32 (3, 48, 64) and depth float32 (48, 64)"),
        ({"depth": np.zeros((48, 64), np.uint16)}, "rgb uint8 (3, 48, 64) and depth uint16 (48, 64)"),
        ({"depth": np.zeros((1, 48, 64), np.float32)}, "rgb uint8 (3, 48, 64) and depth float32 (1, 48, 64)"),
        ({"depth": np.zeros((64, 48), np.float32)}, "rgb uint8 (3, 48, 64) and depth float32 (64, 48)"),
    ],
)
def test_arrays_of_nyuv2_have_their_form(wrong: dict[str, np.ndarray], told: str, tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py", reason="the files of nyuv2 are HDF5")
    data = build(tmp_path, **nyuv2(tmp_path))
    (path,) = (tmp_path / "nyudepthv2" / "val" / "official").iterdir()
    with h5py.File(path, "r+") as file:
        for name, array in wrong.items():
            del file[name]
            file[name] = array
    expected = f"{path}: holds {told}; expected rgb uint8 (3, h, w) and depth (h, w) of floats"
    with pytest.raises(UserError, match=f"^{re.escape(expected)}$"):
        list(data.test.epoch(0))


def test_depth_that_is_no_number_is_not_known(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py", reason="the files of nyuv2 are HDF5")
    data = build(tmp_path, **nyuv2(tmp_path))
    (path,) = (tmp_path / "nyudepthv2" / "val" / "official").iterdir()
    with h5py.File(path, "r+") as file:
        file["depth"][14, 18:20] = np.nan, np.inf
    (batch,) = data.test.epoch(0)
    depth = batch["data_samples"][0].gt_depth
    assert depth[2, 2:4].tolist() == [0, 0] and (depth > 0).sum() > 100
    assert torch.isfinite(depth_error(torch.ones_like(depth)[None], depth[None]))


def test_nyuv2_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"name": "nyuv2", "task": "depth", "image_size": [24, 32], "augmentation": "none"}
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    with pytest.raises(UserError, match=r"^dataset=nyuv2: its files are HDF5; .*\(pip install h5py\)$"):
        build(tmp_path, **settings)
    monkeypatch.setitem(__import__("sys").modules, "h5py", io)
    with pytest.raises(UserError, match=r"there is no .*nyudepthv2/train; expected .*use scale=mini$"):
        build(tmp_path, **settings)


def test_real_depth(data_root: Path, tmp_path: Path) -> None:
    """Nineteen indoor pairs as a folder: what is read is what their files hold, and so are the errors."""
    stored = real(data_root, "depth_mini") / "depth_mini"
    images, depth = sorted((stored / "images").iterdir()), []
    for i, image in enumerate(images):
        split, truth = "train" if i < 14 else "val", stored / "depth" / f"{image.stem}.png"
        for part, path in (("images", image), ("depth", truth)):
            (tmp_path / "rooms" / part / split).mkdir(parents=True, exist_ok=True)
            (tmp_path / "rooms" / part / split / path.name).write_bytes(path.read_bytes())
        depth.append(np.asarray(Image.open(truth)))
    settings = {"name": "depthfolder", "task": "depth", "folder": "rooms", "image_size": [240, 320]}
    data = build(tmp_path, **settings, train_split="train", test_split="val", augmentation="none")
    for batch in data.train.epoch(0):
        for index, sample in pairs(batch):
            assert np.array_equal(sample.gt_depth.numpy(), depth[index].astype(np.float32) / 1000)
    found = data.score(Answer(lambda truth: torch.full_like(truth, 2.0)))
    each = []
    for millimetres in depth[14:]:
        metres = (millimetres[millimetres > 0].astype(np.float32) / 1000).astype(float)
        each.append(
            [np.sqrt(np.mean((metres - 2) ** 2)), np.mean(np.abs(metres - 2)), np.mean(np.abs(metres - 2) / metres)]
            + [100 * np.mean(np.maximum(metres / 2, 2 / metres) < 1.25**k) for k in (1, 2, 3)]
        )
    names = ("rmse", "mae", "rel", "delta1", "delta2", "delta3")
    assert found == pytest.approx(dict(zip(names, np.mean(each, axis=0), strict=True)), rel=1e-5)


# Methods


@pytest.mark.parametrize("method", ["crd", "rkd", "ofd", "m2as", "l2t", "finetune", "kd_fixed_feature"])
def test_methods_that_need_classes_refuse(method: str) -> None:
    student, teacher = make_network("depth_resnet18", "depth", 0), make_network("depth_resnet50", "depth", 1)
    with pytest.raises(
        UserError, match=f"^method={method}: teaches classifiers only; for depth choose .*kd, .*stagewise"
    ):
        build_method(method, student, teacher)


def test_kd_needs_an_answer_of_the_same_kind() -> None:
    student = make_network("depth_resnet18", "depth", 0)
    segmentor = as_teacher(make_network("semantic_fpn_resnet18", "segmentation", 1))
    with pytest.raises(UserError, match="^method=kd: the teacher gives no depth; expected a depth network"):
        build_method("kd", student, segmentor)
    with pytest.raises(UserError, match="^method=kd: teaches classifiers only; for detectors and segmentors choose"):
        build_method("kd", make_network("semantic_fpn_resnet18", "segmentation", 1), student)
    with pytest.raises(UserError, match="gives no class scores of pixels"):
        build_method("ifvd", student, make_network("depth_resnet50", "depth", 1))
