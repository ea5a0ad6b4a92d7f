"""Embedded stand-ins for small datasets and for domains."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs import composed
from experiments.groups import choices, dataset_choice
from kt.data import scenes
from kt.data.fingerprint import state_of
from kt.data.images import Images, Labelled
from kt.data.names import DATASETS, read_dataset
from kt.data.scene_sets import ACTIONS, KINDS
from kt.data.scenes import STYLES, Pose, paint, part_mask, place_arrays
from kt.errors import UserError

CLASSES = {"scenes_kinds": 12, "scenes_actions": 8, "scenes_places": 8, "scenes_domains": 10}


def read(name: str, cache: Path | None = None, **changes: Any) -> Images:
    found: Images = read_dataset({**dataset_choice(name), **changes}, Path("."), cache)
    return found


def arrays(source: Images) -> tuple[Labelled, Labelled]:
    assert isinstance(source.train, Labelled) and isinstance(source.test, Labelled)
    return source.train, source.test


def test_every_stand_in_is_drawn() -> None:
    stand_ins = {name: dataset_choice(name)["stand_in"] for name in choices("dataset")}
    assert {name for name in DATASETS if stand_ins.get(name) in CLASSES} == {
        "cub200",
        "stanford40",
        "mit67",
        "domainnet",
    }
    for stand_in in filter(None, stand_ins.values()):
        assert DATASETS[dataset_choice(stand_in)["name"]].code


def test_a_recipe_may_change_another_one() -> None:
    own = {"epochs": 32, "batch_size": 32, "evaluate_every": 8}
    base = composed("dataset=scenes")["schedule"]
    assert composed("dataset=scenes_places")["schedule"] == {**base, **own}
    assert composed("dataset=scenes_domains")["schedule"] == {**base, "epochs": 7}
    assert composed("dataset=scenes_places", "scale.fraction=0.1")["schedule"]["epochs"] == 3


@pytest.mark.parametrize("name", CLASSES)
def test_a_set_is_drawn_in_seconds_in_balance_and_alike(name: str, tmp_path: Path) -> None:
    began = time.perf_counter()
    train, test = arrays(read(name, tmp_path))
    assert time.perf_counter() - began < 20  # two or three on an idle core
    settings = dataset_choice(name)
    for split, part in (("train", train), ("test", test)):
        count = settings[f"{split}_size"]
        assert part.images.shape == (count, 48, 48, 3) and len(np.unique(part.images[:50], axis=0)) == 50
        assert np.bincount(part.labels).tolist() == [count // CLASSES[name]] * CLASSES[name]
    assert not np.array_equal(train.images[:100], test.images[:100])
    again, _ = arrays(read(name, tmp_path, train_size=240))
    np.testing.assert_array_equal(again.images, train.images[:240])
    kept, _ = arrays(read(name, tmp_path))
    np.testing.assert_array_equal(kept.images, train.images)
    assert "code" in (state_of(settings, tmp_path, tmp_path).summary or {})


@pytest.mark.parametrize("name", ["scenes_kinds", "scenes_actions", "scenes_places"])
def test_styles_of_a_set_share_its_scenes(name: str) -> None:
    found = [arrays(read(name, style=style, train_size=120, test_size=120))[0] for style in STYLES]
    for other in found[1:]:
        np.testing.assert_array_equal(other.labels, found[0].labels)
        assert np.abs(other.images.astype(int) - found[0].images).mean() > 5
    with pytest.raises(UserError, match="did you mean 'photo'"):
        read(name, style="foto")


def test_domains_are_other_scenes_in_another_style() -> None:
    found = [
        arrays(read("scenes_domains", domain=domain, train_size=100, test_size=100))[0]
        for domain in ("clipart", "painting", "real")
    ]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert not np.array_equal(found[first].labels, found[second].labels)
    # A clean drawing has few colours, a painting few levels of each channel, a photograph many of both.
    colours = [np.mean([len(np.unique(image.reshape(-1, 3), axis=0)) for image in part.images]) for part in found]
    levels = [max(len(np.unique(image[..., 0])) for image in part.images) for part in found]
    assert colours[0] < 40 and colours[2] > 300 and levels[1] <= 8 < levels[0] < levels[2]
    with pytest.raises(UserError, match=r"dataset\.domain=null: expected one of clipart, painting, real"):
        read("scenes_domains", domain=None)


def test_a_limb_is_what_is_near_a_line() -> None:
    xs, ys = scenes._grid(40, 40)
    u, v = xs / 20 - 1, ys / 20 - 1
    points = np.linspace((-0.6, 0.5), (0.2, -0.3), 2000)
    near = np.sqrt(((u[..., None] - points[:, 0]) ** 2 + (v[..., None] - points[:, 1]) ** 2).min(-1))
    clear = np.abs(near - scenes.LIMB) > 1e-3
    mask = part_mask(("limb", -0.2, 0.1, 0.4, -0.4, "skin"), u, v)
    np.testing.assert_array_equal(mask[clear], (near <= scenes.LIMB)[clear])
    assert 0 < mask.sum() < 200


@pytest.mark.parametrize("subjects", [KINDS, ACTIONS], ids=["kinds", "actions"])
def test_no_two_classes_look_alike(subjects: scenes.Subjects) -> None:
    """The closest pair, in the same colours at the same size, differs in a twentieth of its pixels."""
    xs, ys = scenes._grid(48, 48)
    colours = np.linspace(0, 1, len(scenes.ROLES) * 3, dtype=np.float32).reshape(1, -1, 3)
    drawn = []
    for parts in subjects.parts:
        image = np.full((1, 48, 48, 3), 2, np.float32)
        pose = Pose(*(np.array([value], np.float32) for value in (24, 24, 22, 22, 0)))
        silhouette = paint(image, parts, pose, colours, xs, ys)
        drawn.append((image[0], silhouette[0]))
    for i, (one, mask) in enumerate(drawn):
        for other, other_mask in drawn[:i]:
            assert (one != other).any(-1).sum() > (mask | other_mask).sum() / 20


def test_places_have_what_their_mix_says() -> None:
    """Trees are green, traffic lights are not; the mix of half of both lies between."""
    mixes = ({"tree": 1.0}, {"traffic light": 1.0}, {"tree": 1.0, "traffic light": 1.0})
    images, labels = place_arrays(240, 48, 0, "synthetic", mixes, 120)
    red, green, blue = (images[..., channel].astype(int) for channel in range(3))
    leaves = ((green > red + 25) & (green > blue + 25)).mean((1, 2))
    trees, lights, both = (leaves[labels == label].mean() for label in range(3))
    assert trees > both + 0.05 > lights + 0.1


@pytest.mark.parametrize("name", CLASSES)
def test_classes_are_shapes_and_not_colours(name: str) -> None:
    """What a nearest centroid of 3 colours knows, and what that of the edges knows, over chance."""
    train, test = arrays(read(name, **({} if name == "scenes_domains" else {"style": "synthetic"})))
    classes = CLASSES[name]

    def accuracy(features: list[np.ndarray]) -> float:
        centres = np.stack([features[0][train.labels == label].mean(0) for label in range(classes)])
        guesses = [((row - centres) ** 2).sum(1).argmin() for row in features[1]]
        return float((np.array(guesses) == test.labels).mean())

    colours, edges = [], []
    for part in (train, test):
        colours.append(part.images.reshape(len(part.images), -1, 3).mean(1))
        grey = part.images.mean(3)
        steps = np.abs(np.diff(grey, axis=1))[:, :, :-1] + np.abs(np.diff(grey, axis=2))[:, :-1]
        edges.append((steps > 20).reshape(len(grey), -1).astype(float))
    assert accuracy(colours) < 2.5 / classes
    assert accuracy(edges) > 1.7 / classes
