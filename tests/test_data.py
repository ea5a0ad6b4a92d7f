"""Data: epochs as pure functions, augmentation, subsets, real layouts, embedded scenes."""

from __future__ import annotations

import math
import multiprocessing
import os
import pickle
import time
from pathlib import Path
from typing import Any

import layouts
import numpy as np
import pytest
import torch
from layouts import ODD, PETS, imagefolder, real
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from kt.data import DATASETS, _checked, build_data, images, loaders
from kt.data.cache import kept
from kt.data.images import SCENES_MEAN, SCENES_STD, balanced_subset
from kt.data.loaders import (
    PADDING,
    ResidentLoader,
    _mix,
    by_iterations,
    crop_flip,
    epoch_order,
    resized_crop_flip,
    uniform,
)
from kt.data.scenes import CLASSES, KEYPOINTS, STUFF, STYLES, classification_arrays, draw_scene
from kt.errors import UserError
from kt.settings import epochs_of
from method_settings import DATASET

CPU = torch.device("cpu")


def build(root: Path | str = ".", **changes: Any) -> Any:
    common = {key: changes.pop(key) for key in ("rank", "world", "workers", "device_batch") if key in changes}
    return build_data({**DATASET, **changes}, root, batch_size=10, seed=3, device=CPU, **common)


def test_an_epoch_is_a_pure_function_of_its_number() -> None:
    first, second = build(), build()
    for epoch in range(3):
        list(first.train.epoch(epoch))
    for a, b in zip(first.train.epoch(3), second.train.epoch(3), strict=True):
        assert all(torch.equal(a[key], b[key]) for key in ("inputs", "labels", "indices"))
    again, other = (next(iter(second.train.epoch(epoch))) for epoch in (3, 4))
    assert not torch.equal(again["indices"], other["indices"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "scnes"}, "dataset.name=scnes: expected one of .*did you mean 'scenes'"),
        ({"name": ...}, "dataset.name: missing; expected a text"),
        ({"name": "cityscapes", "task": ...}, "dataset.task: missing; expected one of classification, "),
        (
            {"task": "segmentation", "image_size": ...},
            "dataset.image_size: missing; expected an integer >= 8 or a list of integer >= 8",
        ),
        ({"image_size": "32"}, "dataset.image_size=32: expected an integer >= 8 or"),
        ({"subst": 10}, "dataset.subst: unknown key .did you mean 'subset'"),
        ({"validation": 1}, "dataset.validation=1: expected a number >= 0 and < 1"),
        ({"augmentation": "flip"}, "dataset.augmentation=flip: for classification expected one of none, crop_flip"),
        ({"style": "foto"}, "dataset.style=foto: expected one of photo, synthetic, painting .did you mean 'photo'"),
        ({"folder": "../pets"}, "dataset.folder=../pets: expected a folder below data_root"),
    ],
)
def test_python_users_get_the_checks_of_the_command_line(changes: dict[str, Any], words: str) -> None:
    dataset = {key: value for key, value in {**DATASET, **changes}.items() if value is not ...}
    with pytest.raises(UserError, match=f"^{words}"):
        build_data(dataset, ".", batch_size=10, seed=0)


def test_a_name_is_enough_from_python() -> None:
    """What is left out is as the choice of the command line has it."""
    data = build_data({"name": "scenes", "train_size": 65, "test_size": 8})
    assert data.spec.image_size == 48 and len(next(iter(data.train.epoch(0)))["labels"]) == 64
    own = DATASETS["scenes"].defaults
    assert _checked("scenes") == {**_checked({**own, "name": "scenes"})} and _checked("scenes")["train_size"] == 3000
    assert _checked({"name": "cifar100", "augmentation": "none"})["image_size"] == 32


@pytest.mark.parametrize(
    ("given", "options", "words"),
    [
        ("scnes", {}, "dataset.name=scnes: expected one of"),
        (["scenes"], {}, "dataset=.*: expected a dataset's name, or its settings"),
        ("scenes", {"batch_size": 0}, "batch_size=0: expected an integer >= 1"),
        ("scenes", {"batch_size": "64"}, "batch_size=64: expected an integer >= 1"),
        ("scenes", {"device_batch": 0}, "device_batch=0: expected an integer >= 1"),
    ],
)
def test_what_python_users_give_wrong_is_one_line(given: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=f"^{words}"):
        build_data(given, **options)


def test_batches() -> None:
    data = build()
    batch = next(iter(data.train.epoch(0)))
    assert batch["inputs"].shape == (10, 3, 32, 32) and batch["inputs"].dtype == torch.float32
    assert 0 <= batch["inputs"].min() < batch["inputs"].max() <= 1
    assert batch["inputs"].is_contiguous(memory_format=torch.channels_last)
    assert len(data.train) == 6 and data.spec.train_size == 64
    tested = torch.cat([b["indices"] for b in data.test.epoch(0)])
    assert tested.tolist() == list(range(32)) and len(data.test) == 4


@pytest.mark.parametrize(("world", "passes"), [(1, 1), (2, 1), (3, 1), (1, 6), (2, 3), (3, 2), (6, 1)])
def test_an_update_is_the_same_images_however_they_are_shared(world: int, passes: int) -> None:
    for size, updates, chunk in ((103, 8, 12 // world // passes), (11, 1, 11 // world // passes)):
        order = torch.randperm(size, generator=torch.Generator().manual_seed(_mix(0, 5, 0)))
        parts = [epoch_order(size, 0, 5, True, rank, world, 12, passes) for rank in range(world)]
        assert [len(part) for part in parts] == [updates * passes] * world
        found = [parts[rank][number] for number in range(updates * passes) for rank in range(world)]
        assert {len(each) for each in found} == {chunk}
        assert torch.equal(torch.cat(found), order[: updates * world * passes * chunk])
    with pytest.raises(UserError, match=r"the training set has 0 images, an update is cut into"):
        epoch_order(0, 0, 5, True, 0, world, 12, passes)


def test_what_is_drawn_a_few_batches_at_a_time_is_what_each_image_draws_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    loader = build(validation=0.06).train  # 60 of 64: numbers of images are not their places
    assert len(loader.indices) == 60 and loader.indices[-1] > 59
    alone = {int(index): uniform(3, 4, index[None], 3) for index in loader.indices}
    drawn: list[torch.Tensor] = []
    monkeypatch.setattr(loaders, "crop_flip", lambda images, draws: drawn.append(draws) or images)
    monkeypatch.setattr(loaders, "AT_ONCE", 4)  # of the six batches of an epoch
    for first in (0, 3, 5):
        drawn.clear()
        batches = list(loader.epoch(4, first))
        assert len(drawn) == len(batches) == 6 - first
        for batch, draws in zip(batches, drawn, strict=True):
            assert torch.equal(draws, torch.cat([alone[int(index)] for index in batch["indices"]], 1))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_share_a_whole_set(world: int) -> None:
    whole = [torch.cat(epoch_order(103, 0, 0, False, rank, world, 10)).tolist() for rank in range(world)]
    assert sorted(sum(whole, [])) == list(range(103))


def test_stretches_of_iterations_are_the_epochs_batches_in_order() -> None:
    loader = build(train_size=45).train  # four whole batches an epoch
    stretches = by_iterations(loader, 9, 3)
    assert (len(stretches), stretches.batch_size) == (3, 10)
    found = [batch for stretch in range(3) for batch in stretches.epoch(stretch)]
    expected = [batch for epoch in range(3) for batch in loader.epoch(epoch)][:9]
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one["indices"], other["indices"]) and torch.equal(one["inputs"], other["inputs"])
    (last,) = stretches.epoch(1, first=2)
    assert torch.equal(last["inputs"], expected[5]["inputs"])
    with pytest.raises(UserError, match="smaller than one batch"):
        by_iterations(stretches_of_nothing(), 9, 3)


@pytest.mark.parametrize(
    ("iterations", "interval", "epochs"),
    [
        *[
            (9, 3, 3),
            (9, None, 1),
            (9, 9, 1),
            (50, 200, 1),
            (100, 40, 2),
            (50, 40, 1),
            (9, 4, 1),
            (7, 2, 1),
            (12, 5, 2),
        ],
        (999_999_999_989, 2, 1),  # a prime, which must not take long
    ],
)
def test_an_interval_is_as_long_as_it_says_or_longer(iterations: int, interval: int | None, epochs: int) -> None:
    assert epochs_of({"epochs": None, "iterations": iterations, "interval": interval}) == epochs
    assert iterations % epochs == 0 and iterations // epochs >= min(interval or 1, iterations)


def stretches_of_nothing() -> Any:
    class Empty:
        batch_size, passes = 10, 1

        def __len__(self) -> int:
            return 0

    return Empty()


def _splitmix(state: int) -> tuple[int, int]:
    """The published generator on Python's integers: its next state and number."""
    state = (state + 0x9E3779B97F4A7C15) % 2**64
    z = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return state, z ^ (z >> 31)


def test_draws_follow_from_seed_epoch_and_index_alone() -> None:
    assert [_splitmix(state)[1] for state in (0, 1234567)] == [0xE220A8397B1DCDAF, 6457827717110365317]  # published
    indices = torch.tensor([5, 0, 70_000])
    found = uniform(3, 2, indices, 4)
    for column, index in zip(found.T.tolist(), indices.tolist(), strict=True):
        _, state = _splitmix((index * 0x9E3779B97F4A7C15 + _mix(3, 2, 1) - 0x9E3779B97F4A7C15) % 2**64)
        for value in column:
            state, number = _splitmix(state)
            assert value == (number >> 11) / 2**53
    assert torch.equal(uniform(3, 2, indices[2:], 4), found[:, 2:])
    many = uniform(0, 0, torch.arange(200_000), 3)
    assert len({uniform(*key, indices, 1)[0, 0].item() for key in ((3, 2), (2, 3), (3, 3), (4, 2))}) == 4
    assert ((many * 9).long().flatten().bincount() / many.numel() - 1 / 9).abs().max() < 0.002
    assert (torch.corrcoef(torch.cat([many, many.roll(1, 1)])) - torch.eye(6)).abs().max() < 0.01


@pytest.mark.parametrize("augmentation", ["crop_flip", "imagenet"])
def test_an_image_is_augmented_alike_wherever_it_goes(augmentation: str) -> None:
    found = []
    for changes in ({}, {"world": 2}, {"device_batch": 2}):
        images = {}
        for rank in range(changes.get("world", 1)):
            for batch in build(augmentation=augmentation, rank=rank, **changes).train.epoch(4):
                images |= dict(zip(batch["indices"].tolist(), batch["inputs"], strict=True))
        found.append(images)
    assert found[0].keys() == found[1].keys() == found[2].keys() and len(found[0]) == 60
    assert all(torch.equal(images[index], image) for images in found[1:] for index, image in found[0].items())


def test_crop_and_flip_image_by_image() -> None:
    images = torch.randint(0, 256, (16, 8, 8, 3), dtype=torch.uint8)
    draws = torch.rand(3, 16, generator=torch.Generator().manual_seed(0))
    found = crop_flip(images, draws).numpy()
    shifts, mirrored = np.floor(draws[:2].numpy() * 9).astype(int), draws[2].numpy() < 0.5
    assert mirrored.any() and not mirrored.all()
    for i, image in enumerate(images.numpy()):
        padded = np.pad(image, ((PADDING, PADDING), (PADDING, PADDING), (0, 0)))
        y, x = shifts[:, i]
        crop = padded[y : y + 8, x : x + 8]
        np.testing.assert_array_equal(found[i], crop[:, ::-1] if mirrored[i] else crop)


def test_resized_crop_of_everything_is_the_image_or_its_mirror() -> None:
    images = torch.rand(12, 3, 9, 9)
    found = resized_crop_flip(images, torch.rand(5, 12, generator=torch.Generator().manual_seed(0)), scale=(50.0, 60.0))
    same = [torch.allclose(a, b, atol=1e-5) for a, b in zip(found, images, strict=True)]
    mirrored = [torch.allclose(a, b.flip(2), atol=1e-5) for a, b in zip(found, images, strict=True)]
    assert any(same) and any(mirrored) and all(a or b for a, b in zip(same, mirrored, strict=True))


def test_subsets_are_balanced_and_validation_is_held_out() -> None:
    labels = np.repeat(np.arange(5), [30, 10, 20, 20, 20])
    chosen = balanced_subset(labels, 40, 5)
    assert np.bincount(labels[chosen]).tolist() == [8] * 5 and len(set(chosen)) == 40
    data = build(subset=40, validation=0.25)
    trained = torch.cat([b["indices"] for b in data.train.epoch(0)])
    held = torch.cat([b["indices"] for b in data.test.epoch(0)])
    assert (data.spec.train_size, data.spec.test_size) == (30, 10) and not set(trained.tolist()) & set(held.tolist())
    labels = torch.cat([b["labels"] for b in data.test.epoch(0)])
    assert labels.bincount().tolist() == [1] * 10
    with pytest.raises(UserError, match=r"dataset.subset=65: expected 1 to 64"):
        build(subset=65)


@pytest.mark.parametrize("key", ["train_size", "test_size"])
def test_drawn_images_have_a_number(key: str) -> None:
    with pytest.raises(UserError, match=rf"^dataset.{key}=null: expected how many images to draw, for scenes$"):
        build(**{key: None})


# Embedded scenes


def test_scenes_are_deterministic_and_fast() -> None:
    start = time.perf_counter()
    images, labels = classification_arrays(2000, seed=5)
    speed = 2000 / (time.perf_counter() - start)
    # 2,400 a second on an idle core; the bound leaves room for a busy one.
    assert speed > 400, f"{speed:.0f} images a second"
    again, _ = classification_arrays(1500, seed=5)
    np.testing.assert_array_equal(images[:1500], again)
    late, late_labels = classification_arrays(1000, seed=5, first=1000)
    np.testing.assert_array_equal(late, images[1000:])
    assert np.bincount(late_labels).tolist() == [100] * len(CLASSES)
    assert not np.array_equal(images[:10], classification_arrays(10, seed=6)[0])


def test_drawn_images_are_cached(tmp_path: Path) -> None:
    marks = [build_data(DATASET, ".", batch_size=8, seed=0, device=CPU, cache_root=tmp_path).spec for _ in range(2)]
    assert marks[0] == marks[1] == build().spec
    assert sorted(path.name.split("-")[3] for path in tmp_path.glob("*.npz")) == ["0", "1000000"]
    # Another number of images is another file.
    other = {**DATASET, "train_size": DATASET["train_size"] - 1}
    assert build_data(other, ".", batch_size=8, seed=0, device=CPU, cache_root=tmp_path).spec.train_size == 63


def _draw(folder: str, start: Any) -> None:
    """Waits for the others, then wants the same images; leaves a mark if it draws them."""

    def draw() -> dict[str, np.ndarray]:
        (Path(folder) / f"drawn by {os.getpid()}").touch()
        time.sleep(0.3)
        return {"images": np.arange(5)}

    start.wait()
    assert kept(Path(folder) / "images.npz", draw)["images"].tolist() == [0, 1, 2, 3, 4]


def test_processes_side_by_side_draw_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    start = context.Barrier(3)
    processes = [context.Process(target=_draw, args=(str(tmp_path), start)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(20)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(list(tmp_path.glob("drawn by *"))) == 1


@pytest.mark.parametrize("damage", [b"", b"no archive", None])
def test_a_damaged_cache_is_drawn_anew(tmp_path: Path, damage: bytes | None) -> None:
    path = tmp_path / "deeper" / "images.npz"
    whole = kept(path, lambda: {"images": np.arange(1000)})
    path.write_bytes(path.read_bytes()[:700] if damage is None else damage)
    again = kept(path, lambda: {"images": np.arange(1000)})
    np.testing.assert_array_equal(again["images"], whole["images"])
    np.testing.assert_array_equal(np.load(path)["images"], whole["images"])
    assert not list(path.parent.glob("*.tmp"))


def test_scene_statistics_are_the_stated_ones() -> None:
    pixels = np.concatenate([classification_arrays(4000, style=style)[0].reshape(-1, 3) for style in STYLES]) / 255
    np.testing.assert_allclose(pixels.mean(0), SCENES_MEAN, atol=0.01)
    stds = [classification_arrays(4000, style=style)[0].reshape(-1, 3).std(0) / 255 for style in STYLES]
    np.testing.assert_allclose(np.mean(stds, 0), SCENES_STD, atol=0.02)


def nearest_centroid(train: np.ndarray, labels: np.ndarray, test: np.ndarray, truth: np.ndarray) -> float:
    centres = np.stack([train[labels == c].mean(0) for c in range(len(CLASSES))])
    guesses = ((test[:, None] - centres[None]) ** 2).sum(2).argmin(1)
    return float((guesses == truth).mean())


def test_classes_are_shapes_and_not_colours() -> None:
    images, labels = classification_arrays(3000, style="synthetic")
    flat = images.reshape(3000, -1, 3) / 255.0
    colour = flat.mean(1)
    assert nearest_centroid(colour[:2000], labels[:2000], colour[2000:], labels[2000:]) < 0.3
    grey = images.mean(3)
    edges = np.abs(np.diff(grey, axis=1))[:, :, :-1] + np.abs(np.diff(grey, axis=2))[:, :-1]
    shape = (edges > 20).reshape(3000, -1).astype(float)
    assert nearest_centroid(shape[:2000], labels[:2000], shape[2000:], labels[2000:]) > 0.2


@pytest.mark.parametrize("index", range(4))
def test_a_scene_agrees_with_itself(index: int) -> None:
    scene = draw_scene(0, index)
    assert scene.image.shape == (128, 256, 3) and scene.instances
    front: set[tuple[int, int]] = set()
    for instance in reversed(scene.instances):
        pixels = set(zip(*np.nonzero(instance.amodal), strict=True))
        seen = pixels - front
        front |= pixels
        assert instance.visibility == pytest.approx(len(seen) / len(pixels))
        assert set(zip(*np.nonzero(instance.mask), strict=True)) == seen
        rows, columns = zip(*pixels, strict=True)
        assert instance.box == (min(columns), min(rows), max(columns) + 1, max(rows) + 1)
        assert (scene.semantic[instance.mask] == len(STUFF) + CLASSES.index(instance.name)).all()
        assert (scene.depth[instance.mask] == np.float32(instance.depth)).all()
        assert (instance.keypoints is not None) == (instance.name == "person")
        if instance.keypoints is not None:
            assert len(instance.keypoints) == len(KEYPOINTS)
            for x, y, state in instance.keypoints:
                if state:
                    # Limbs of far people are thinner than a pixel: a point may miss them, not the person.
                    x1, y1, x2, y2 = instance.box
                    assert x1 - 1 <= x <= x2 + 1 and y1 - 1 <= y <= y2 + 1
                    assert (state == 2) == bool(instance.mask[int(y), int(x)])
    distances = [instance.depth for instance in scene.instances]
    assert distances == sorted(distances, reverse=True)


def test_styles_share_the_geometry_and_differ_in_pixels() -> None:
    photo, flat = (draw_scene(0, 2, style=style) for style in ("photo", "synthetic"))
    np.testing.assert_array_equal(photo.semantic, flat.semantic)
    np.testing.assert_array_equal(photo.depth, flat.depth)
    assert np.abs(photo.image.astype(int) - flat.image).mean() > 5
    crops = [classification_arrays(50, style=style) for style in STYLES]
    np.testing.assert_array_equal(crops[0][1], crops[1][1])
    with pytest.raises(UserError, match="did you mean 'photo'"):
        draw_scene(0, 0, style="foto")


# Real layouts


def images_of(root: Path, world: int = 1, **settings: Any) -> dict[tuple[str, int], torch.Tensor]:
    """Every image that two epochs of training, training without augmentation, and testing give, by index."""
    found = {}
    for rank in range(world):
        data = build(root, rank=rank, world=world, **settings)
        state = torch.get_rng_state()
        loaders = {"train": data.train, "plain": data.train.plain(by_class=True), "test": data.test}
        for name, epoch in (("train", 0), ("train", 1), ("plain", 0), ("test", 0)):
            for batch in loaders[name].epoch(epoch):
                assert batch["inputs"].is_contiguous(memory_format=torch.channels_last)
                for index, label, image in zip(*(batch[key] for key in ("indices", "labels", "inputs")), strict=True):
                    found[f"{name} {epoch} {int(label)}", int(index)] = image
        assert torch.equal(state, torch.get_rng_state())  # or training would depend on who loads
    return found


def check_one_protocol(root: Path, settings: dict[str, Any]) -> dict[tuple[str, int], torch.Tensor]:
    """The images of a folder, which are the same whoever loads them from wherever."""
    wanted = images_of(root, **settings, resident=True)
    for resident, workers, world in ((False, 0, 1), (False, 2, 1), (False, 0, 2), (True, 0, 2), (None, 0, 1)):
        other = {"resident": resident, "workers": workers, "world": world}
        found = images_of(root, **settings, **other)
        assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted), other
    return wanted


AUGMENTATIONS = ("none", "crop_flip", "imagenet")


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_residency_is_speed_only(augmentation: str, tmp_path: Path) -> None:
    settings = {**imagefolder(tmp_path), "augmentation": augmentation}
    found = check_one_protocol(tmp_path, settings)
    assert {"plain 0 0", "plain 0 1", "test 0 0", "test 0 1"} < {name for name, _ in found}
    paths = sorted((tmp_path / "pets" / "train").rglob("*.png"))
    for (name, index), image in found.items():
        if name.startswith("test"):
            continue
        original = Image.open(paths[index]).convert("RGB")
        long = [int(27 * side / min(original.size)) for side in original.size]  # 24 * 256 / 224 is 27.4
        left, top = (round((side - 24) / 2) for side in long)
        expected = np.asarray(original.resize(long, Image.Resampling.BILINEAR).crop((left, top, left + 24, top + 24)))
        if name.startswith("train") and augmentation == "crop_flip":
            (down, right), mirror = divmod_draws(int(name.split()[1]), index)
            expected = np.pad(expected, ((4, 4), (4, 4), (0, 0)))[down : down + 24, right : right + 24]
            expected = expected[:, ::-1] if mirror else expected
        elif name.startswith("train") and augmentation == "imagenet":
            with torch.random.fork_rng():
                torch.manual_seed(_mix(3, int(name.split()[1]), index))
                top, left, height, width = RandomResizedCrop.get_params(original, (0.08, 1.0), (3 / 4, 4 / 3))
                mirror = torch.rand(1) < 0.5
            box = (left, top, left + width, top + height)
            expected = np.asarray(original.crop(box).resize((24, 24), Image.Resampling.BILINEAR))
            expected = expected[:, ::-1] if mirror else expected
        np.testing.assert_array_equal((image * 255).round().permute(1, 2, 0).numpy(), expected)


def divmod_draws(epoch: int, index: int) -> tuple[list[int], bool]:
    """Where `crop_flip` starts in an image and whether it mirrors it."""
    draws = uniform(3, epoch, torch.tensor([index]), 3)[:, 0].tolist()
    return [int(draw * 9) for draw in draws[:2]], draws[2] < 0.5


@pytest.mark.parametrize("name", ["caltech101", "flowers17"])
@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_residency_is_speed_only_on_real_images(name: str, augmentation: str, data_root: Path) -> None:
    settings = {"name": "imagefolder", "folder": name, "image_size": 48, "subset": 170, "validation": 0.3}
    check_one_protocol(real(data_root, name), {**settings, "augmentation": augmentation})


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_what_is_small_enough_is_resident(augmentation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {**imagefolder(tmp_path), "augmentation": augmentation}
    originals = [math.prod(ODD[i % len(ODD)][0]) for count in PETS["train"].values() for i in range(count)]
    size = 3 * (sum(originals) if augmentation == "imagenet" else len(originals) * 24 * 24)
    for limit, is_resident in ((size, True), (size - 1, False)):
        monkeypatch.setattr(images, "RESIDENT_LIMIT", limit)
        train = build(tmp_path, **settings).train
        assert (isinstance(train, ResidentLoader) or len(train.dataset.kept) == 13) == is_resident


@pytest.mark.parametrize(
    ("workers", "content"),
    # No image, an odd number in a header, and more pixels than Pillow takes.
    [(0, b"no image"), (2, b"no image"), (0, b"P6 4& 40 255\n"), (0, b"P6 40000 40000 255\n")],
)
def test_a_damaged_image_is_one_line(workers: int, content: bytes, tmp_path: Path) -> None:
    settings = imagefolder(tmp_path)
    (tmp_path / "pets" / "train" / "dog" / "3.png").write_bytes(content)
    with pytest.raises(UserError, match=r"^/[^\n]*dog/3.png: cannot be read as an image[^\n]*$"):
        list(build(tmp_path, **settings, resident=False, workers=workers).train.plain().epoch(0))


def test_mistakes_in_folders_are_one_line(tmp_path: Path) -> None:
    messages = []
    for splits in ({}, {"train": {"cat": 0}}, {"train": {"cat": 1}, "val": {"dog": 1}}):
        root = tmp_path / str(len(messages))
        with pytest.raises(UserError) as caught:
            build(root, **imagefolder(root, splits))
        messages.append(str(caught.value))
    assert "there is no folder" in messages[0] and "holds no images" in messages[1] and "other classes" in messages[2]
    assert all("\n" not in message and "or use scale=mini" in message for message in messages)
    with pytest.raises(UserError, match=r"imagenet/train.*ILSVRC 2012"):
        build(tmp_path, name="imagenet")


def test_mistakes_in_pickles_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no .*cifar-100-python/train; expected the official"):
        build(tmp_path, name="cifar100")
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    (folder / "train").write_bytes(b"no pickle")
    with pytest.raises(UserError, match="is no pickle"):
        build(tmp_path, name="cifar100")
    for name in ("train", "test", "meta"):
        (folder / name).write_bytes(pickle.dumps({b"data": np.zeros((2, 3072), np.uint8)}))
    with pytest.raises(UserError, match="the pickles lack 'fine_labels'"):
        build(tmp_path, name="cifar100")


@pytest.mark.parametrize("augmentation", ["none", "crop_flip", "imagenet"])
def test_small_images_are_enlarged_as_they_are_read(augmentation: str, tmp_path: Path) -> None:
    """Linearly between the centres of pixels, to the border's colour beyond; images are moved before that."""
    settings = layouts.make("cifar100", "classification", tmp_path)
    plain, enlarged = (
        build(tmp_path, **{**settings, "image_size": size, "augmentation": augmentation}) for size in (32, 80)
    )
    assert enlarged.spec.image_size == 80
    before, after = (next(iter(data.train.epoch(1)))["inputs"] for data in (plain, enlarged))
    assert after.shape == (10, 3, 80, 80) and after.is_contiguous(memory_format=torch.channels_last)
    if augmentation != "imagenet":
        expected, places = before.numpy(), (np.arange(80) + 0.5) * 32 / 80 - 0.5
        for axis in (2, 3):
            expected = np.apply_along_axis(lambda line: np.interp(places, np.arange(32), line), axis, expected)
        np.testing.assert_allclose(after.numpy(), expected, atol=1e-5)


def test_real_cifar100(data_root: Path) -> None:
    data = build(data_root, name="cifar100", subset=1000)
    assert (data.spec.num_classes, data.spec.train_size, data.spec.test_size) == (100, 1000, 10_000)
    assert data.spec.class_names[0] == "apple" and data.spec.class_names[-1] == "worm"
    images = torch.cat([batch["inputs"] for batch in data.test.epoch(0)])
    for found, published in ((images.mean((0, 2, 3)), data.spec.mean), (images.std((0, 2, 3)), data.spec.std)):
        torch.testing.assert_close(found, torch.tensor(published), rtol=0.02, atol=0.005)
    labels = torch.cat([batch["labels"] for batch in data.train.epoch(0)])
    assert labels.bincount(minlength=100).max() == 10


def test_a_streamed_part_gives_its_own_images(tmp_path: Path) -> None:
    settings = {**imagefolder(tmp_path), "augmentation": "none", "subset": 8, "validation": 0.25}
    wanted = images_of(tmp_path, **settings, resident=True)
    found = images_of(tmp_path, **settings, resident=False, workers=0)
    assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)
