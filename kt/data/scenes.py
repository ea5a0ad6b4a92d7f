"""Embedded street scenes: drawn, never downloaded, the same for the same (seed, index, style) everywhere.

One description of a scene gives everything a vision task asks for: the image, boxes with visibility, instance masks, a
semantic map, a depth map, person keypoints, and a class crop. Objects are unions of simple parts given in an object
frame (x to the right, y downwards, both about -1..1); `paint` draws one object into many images at once, and both the
scenes and the crops are made with it.

Styles share all geometry: `synthetic` is flat-shaded and clean, `photo` adds light, texture, blur and sensor noise,
`painting` has few colours, laid on in strokes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from kt.errors import UserError, nearest

Array = NDArray[np.float32]
Mask = NDArray[np.bool_]

CLASSES = (
    "person",
    "cyclist",
    "car",
    "truck",
    "bus",
    "tram",
    "traffic light",
    "traffic sign",
    "tree",
    "building",
)
STUFF = ("sky", "road", "sidewalk")
STYLES = ("synthetic", "photo", "painting")  # the index is part of seeds
KEYPOINTS = ("head", "left shoulder", "right shoulder", "left hip", "right hip", "left foot", "right foot")

# A part: (shape, centre x, centre y, half width, half height, colour role). Later parts cover earlier ones. A limb is a
# diagonal of its box; it rises to the right where one of the halves is negative.
Part = tuple[str, float, float, float, float, str]

_VEHICLE_WHEELS: tuple[Part, ...] = (
    ("ellipse", -0.55, 0.82, 0.17, 0.17, "dark"),
    ("ellipse", 0.55, 0.82, 0.17, 0.17, "dark"),
)
PARTS: dict[str, tuple[Part, ...]] = {
    "person": (
        ("box", -0.10, 0.62, 0.08, 0.38, "lower"),
        ("box", 0.12, 0.62, 0.08, 0.38, "lower"),
        ("box", 0.0, -0.08, 0.22, 0.36, "body"),
        ("box", -0.28, -0.05, 0.06, 0.32, "body"),
        ("box", 0.28, -0.05, 0.06, 0.32, "body"),
        ("ellipse", 0.0, -0.70, 0.17, 0.22, "skin"),
    ),
    "cyclist": (
        ("ring", -0.55, 0.62, 0.36, 0.36, "dark"),
        ("ring", 0.55, 0.62, 0.36, 0.36, "dark"),
        ("box", 0.0, 0.50, 0.50, 0.05, "metal"),
        ("box", 0.45, 0.25, 0.05, 0.30, "metal"),
        ("box", -0.05, -0.05, 0.20, 0.36, "body"),
        ("box", 0.20, -0.10, 0.24, 0.06, "body"),
        ("ellipse", 0.05, -0.62, 0.16, 0.20, "skin"),
    ),
    "car": (
        ("box", 0.0, 0.45, 0.98, 0.28, "body"),
        ("trapezoid", -0.05, 0.02, 0.62, 0.24, "body"),
        ("trapezoid", -0.05, 0.04, 0.50, 0.16, "glass"),
        *_VEHICLE_WHEELS,
    ),
    "truck": (
        ("box", -0.30, -0.05, 0.66, 0.68, "body"),
        ("box", 0.66, 0.18, 0.28, 0.46, "lower"),
        ("box", 0.72, 0.02, 0.20, 0.17, "glass"),
        *_VEHICLE_WHEELS,
    ),
    "bus": (
        ("box", 0.0, 0.0, 0.97, 0.75, "body"),
        ("box", 0.0, -0.28, 0.88, 0.22, "glass"),
        ("box", -0.30, -0.28, 0.03, 0.22, "body"),
        ("box", 0.30, -0.28, 0.03, 0.22, "body"),
        *_VEHICLE_WHEELS,
    ),
    "tram": (
        ("box", 0.0, 0.12, 0.97, 0.66, "body"),
        ("box", 0.0, -0.08, 0.92, 0.18, "glass"),
        ("box", 0.0, 0.42, 0.97, 0.07, "lower"),
        ("box", 0.0, -0.72, 0.03, 0.24, "dark"),
        ("box", 0.0, -0.93, 0.34, 0.04, "dark"),
    ),
    "traffic light": (
        ("box", 0.0, 0.60, 0.06, 0.40, "metal"),
        ("box", 0.0, -0.35, 0.26, 0.62, "dark"),
        ("ellipse", 0.0, -0.75, 0.15, 0.15, "red"),
        ("ellipse", 0.0, -0.35, 0.15, 0.15, "amber"),
        ("ellipse", 0.0, 0.05, 0.15, 0.15, "green"),
    ),
    "traffic sign": (
        ("box", 0.0, 0.50, 0.05, 0.50, "metal"),
        ("ellipse", 0.0, -0.45, 0.48, 0.48, "body"),
        ("ellipse", 0.0, -0.45, 0.34, 0.34, "white"),
        ("box", 0.0, -0.45, 0.22, 0.07, "dark"),
    ),
    "tree": (
        ("box", 0.0, 0.62, 0.11, 0.38, "wood"),
        ("ellipse", 0.0, -0.30, 0.62, 0.62, "leaf"),
        ("ellipse", -0.34, 0.02, 0.40, 0.34, "leaf"),
        ("ellipse", 0.36, -0.02, 0.40, 0.36, "leaf"),
    ),
    "building": (
        ("box", 0.0, 0.10, 0.80, 0.90, "body"),
        ("trapezoid", 0.0, -0.88, 0.86, 0.12, "lower"),
        *(("box", x, y, 0.12, 0.13, "glass") for x in (-0.48, 0.0, 0.48) for y in (-0.45, 0.0, 0.45)),
    ),
}
# Where keypoints of a person lie in the object frame.
PERSON_KEYPOINTS: tuple[tuple[float, float], ...] = (
    (0.0, -0.70),
    (-0.22, -0.40),
    (0.22, -0.40),
    (-0.12, 0.27),
    (0.12, 0.27),
    (-0.10, 0.95),
    (0.12, 0.95),
)
# Width over height and height in metres.
SHAPE: dict[str, tuple[float, float]] = {
    "person": (0.55, 1.7),
    "cyclist": (0.9, 1.7),
    "car": (1.9, 1.5),
    "truck": (1.8, 3.2),
    "bus": (2.2, 3.1),
    "tram": (2.4, 3.4),
    "traffic light": (0.5, 3.0),
    "traffic sign": (0.6, 2.6),
    "tree": (0.9, 5.0),
    "building": (0.9, 9.0),
}
LIMB = 0.075  # half the thickness of one, in the object frame
ROLES = ("body", "lower", "dark", "glass", "metal", "skin", "wood", "leaf", "white", "red", "amber", "green")
_FIXED: dict[str, tuple[float, float, float]] = {
    "dark": (0.10, 0.10, 0.12),
    "glass": (0.45, 0.58, 0.68),
    "metal": (0.45, 0.45, 0.47),
    "skin": (0.78, 0.60, 0.48),
    "wood": (0.38, 0.27, 0.18),
    "leaf": (0.22, 0.45, 0.20),
    "white": (0.92, 0.92, 0.90),
    "red": (0.85, 0.15, 0.12),
    "amber": (0.90, 0.65, 0.15),
    "green": (0.15, 0.75, 0.35),
}


@dataclass(frozen=True)
class Subjects:
    """What crops are of.

    Attributes:
        names: Of the classes.
        parts: What each is made of.
        aspects: Width over height of each.
    """

    names: tuple[str, ...]
    parts: tuple[tuple[Part, ...], ...]
    aspects: tuple[float, ...]


OBJECTS = Subjects(CLASSES, tuple(PARTS[name] for name in CLASSES), tuple(SHAPE[name][0] for name in CLASSES))


def check_style(style: str) -> str:
    """The style itself.

    Raises:
        UserError: There is no such style.
    """
    if style not in STYLES:
        raise UserError(f"dataset.style={style!r}: expected one of {', '.join(STYLES)}{nearest(style, STYLES)}")
    return style


def draw_colours(rng: np.random.Generator, n: int) -> Array:
    """Colours of all roles for n objects, (n, roles, 3): clothes and paint at random, materials varied a little."""
    colours = np.empty((n, len(ROLES), 3), np.float32)
    for i, role in enumerate(ROLES):
        if role in _FIXED:
            colours[:, i] = np.asarray(_FIXED[role], np.float32) + rng.normal(0, 0.06, (n, 3))
        else:
            colours[:, i] = rng.uniform(0.08, 0.92, (n, 3))
    return np.clip(colours, 0, 1)


@dataclass
class Pose:
    """Where n objects stand: image coordinates of their frames, arrays of shape (n,).

    Attributes:
        x, y: Centre in pixels.
        half_width, half_height: Scale of the object frame in pixels; a negative half width mirrors.
        tilt: Rotation in radians.
    """

    x: Array
    y: Array
    half_width: Array
    half_height: Array
    tilt: Array

    def to_frame(self, xs: Array, ys: Array) -> tuple[Array, Array]:
        """Pixel coordinates (n, h, w) in the object frames."""
        pick = (slice(None), None, None)
        dx, dy = xs - self.x[pick], ys - self.y[pick]
        cos, sin = np.cos(self.tilt)[pick], np.sin(self.tilt)[pick]
        return (cos * dx + sin * dy) / self.half_width[pick], (cos * dy - sin * dx) / self.half_height[pick]

    def to_image(self, u: float, v: float) -> tuple[Array, Array]:
        """Pixel coordinates (n,) of one point of the object frame."""
        a, b = u * self.half_width, v * self.half_height
        return self.x + np.cos(self.tilt) * a - np.sin(self.tilt) * b, self.y + np.sin(self.tilt) * a + np.cos(
            self.tilt
        ) * b


def part_mask(part: Part, u: Array, v: Array) -> Mask:
    """Which points of the object frame a part covers."""
    shape, cx, cy, hw, hh, _ = part
    if shape == "limb":
        along = np.clip(((u - cx) * hw + (v - cy) * hh) / (hw * hw + hh * hh), -1, 1)
        return (u - cx - along * hw) ** 2 + (v - cy - along * hh) ** 2 <= LIMB * LIMB
    a, b = (u - np.float32(cx)) / np.float32(hw), (v - np.float32(cy)) / np.float32(hh)
    if shape == "box":
        return (np.abs(a) <= 1) & (np.abs(b) <= 1)
    if shape == "trapezoid":  # two thirds as wide at the top
        return (np.abs(b) <= 1) & (np.abs(a) <= (5 + b) / 6)
    square = a * a + b * b
    if shape == "ring":
        return (square <= 1) & (square >= 0.55)
    return square <= 1


def paint(images: Array, parts: Sequence[Part], pose: Pose, colours: Array, xs: Array, ys: Array) -> Mask:
    """Draws one object into each of n images, in place.

    Args:
        images: (n, h, w, 3) in 0..1.
        parts: What it is made of.
        pose: n poses.
        colours: (n, roles, 3).
        xs, ys: Pixel centres, broadcastable to (n, h, w).

    Returns:
        The objects' whole silhouettes, (n, h, w).
    """
    u, v = pose.to_frame(xs, ys)
    silhouette = np.zeros(images.shape[:3], bool)
    for part in parts:
        mask = part_mask(part, u, v)
        number, row, column = np.nonzero(mask)
        images[number, row, column] = colours[number, ROLES.index(part[5])]
        silhouette |= mask
    return silhouette


def _grid(height: int, width: int) -> tuple[Array, Array]:
    ys, xs = np.mgrid[0:height, 0:width].astype(np.float32) + np.float32(0.5)
    return xs[None], ys[None]


def _backdrop(rng: np.random.Generator, n: int, xs: Array, ys: Array, horizon: Array) -> Array:
    """Sky above and ground below a horizon in pixels (n,), each with a colour of its own per image."""
    sky = np.array([0.55, 0.68, 0.82], np.float32) + rng.normal(0, 0.12, (n, 3)).astype(np.float32)
    ground = rng.uniform(0.22, 0.55, (n, 1)).astype(np.float32) + rng.normal(0, 0.05, (n, 3)).astype(np.float32)
    below = np.broadcast_to(ys >= horizon[:, None, None], (n, ys.shape[1], xs.shape[2]))
    return np.clip(np.where(below[..., None], ground[:, None, None], sky[:, None, None]), 0, 1).astype(np.float32)


def _stylise(rng: np.random.Generator, images: Array, style: str) -> NDArray[np.uint8]:
    """The last step from ideal colours to 8-bit pixels."""
    if style == "photo":
        n, h, w, _ = images.shape
        ramp = np.linspace(-0.5, 0.5, w, dtype=np.float32)[None, None, :, None]
        slope = rng.normal(0, 0.35, (n, 1, 1, 1)).astype(np.float32)
        gain = rng.uniform(0.65, 1.15, (n, 1, 1, 1)).astype(np.float32)
        tint = rng.normal(1, 0.06, (n, 1, 1, 3)).astype(np.float32)
        images = images * (gain * (1 + slope * ramp)) * tint
        soft = images.copy()
        soft[:, 1:-1] = (images[:, :-2] + 2 * images[:, 1:-1] + images[:, 2:]) / 4
        blurred = soft.copy()
        blurred[:, :, 1:-1] = (soft[:, :, :-2] + 2 * soft[:, :, 1:-1] + soft[:, :, 2:]) / 4
        strength = rng.uniform(0, 1, (n, 1, 1, 1)).astype(np.float32)
        images = images + strength * (blurred - images)
        images = images + rng.standard_normal(images.shape, np.float32) * rng.uniform(0.01, 0.07, (n, 1, 1, 1)).astype(
            np.float32
        )
    elif style == "painting":
        images = _painted(rng, images)
    return (np.clip(images, 0, 1) * 255 + 0.5).astype(np.uint8)


def _painted(rng: np.random.Generator, images: Array) -> Array:
    """Few levels of each colour, laid on in slanted strokes of one shade that fray the edges."""
    n, h, w, _ = images.shape
    noise = rng.standard_normal((n, h, w), np.float32)
    strokes = np.sum([np.roll(noise, (step, -step), (1, 2)) for step in range(6)], 0) / np.float32(np.sqrt(6))
    rows = np.clip(np.arange(h)[:, None] + np.rint(0.6 * strokes).astype(int), 0, h - 1)
    images = images[np.arange(n)[:, None, None], rows, np.arange(w)] + 0.05 * strokes[..., None]
    levels = rng.integers(4, 7, (n, 1, 1, 1))
    return ((np.floor(images * levels) + 0.5) / levels).astype(np.float32)


def classification_arrays(
    count: int,
    image_size: int = 32,
    seed: int = 0,
    style: str = "photo",
    first: int = 0,
    chunk: int = 1000,
    subjects: Subjects = OBJECTS,
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Crops around the main object of scenes, with clutter behind it and often something in front of it.

    Image i depends on (seed, style, `first + i`) only as long as `first` is a multiple of `chunk`.

    Args:
        count: How many.
        image_size: Side in pixels.
        seed: Of the whole set.
        style: One of `STYLES`.
        first: Index of the first image.
        chunk: Images drawn together.
        subjects: What the crops are of; what stands behind and in front of it are `OBJECTS`.

    Returns:
        Images (count, image_size, image_size, 3) and labels (count,), classes in balance.
    """
    check_style(style)
    images = np.empty((count, image_size, image_size, 3), np.uint8)
    labels = np.empty(count, np.int64)
    for start in range(0, count, chunk):
        part_images, part_labels = _crops(image_size, seed, style, (first + start) // chunk, chunk, subjects)
        taken = min(chunk, count - start)
        images[start : start + taken], labels[start : start + taken] = part_images[:taken], part_labels[:taken]
    return images, labels


def _crops(
    size: int, seed: int, style: str, block: int, n: int, subjects: Subjects
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    rng = np.random.default_rng((seed, block))
    xs, ys = _grid(size, size)
    labels = rng.permutation(np.arange(n) % len(subjects.names)).astype(np.int64)
    images = _backdrop(rng, n, xs, ys, rng.uniform(0.2, 0.8, n).astype(np.float32) * size)
    others = rng.integers(len(CLASSES), size=(2, n))
    _paint_by_class(rng, images, OBJECTS, others[0], xs, ys, _random_pose(rng, n, size, (0.15, 0.45), 0.5))
    aspects = np.array(subjects.aspects)[labels]
    _paint_by_class(rng, images, subjects, labels, xs, ys, _random_pose(rng, n, size, (0.55, 1.05), 0.12, aspects))
    # Half of the objects have something smaller in front of them.
    hidden = rng.random(n) < 0.5
    front = _random_pose(rng, n, size, (0.15, 0.35), 0.45)
    front.y[~hidden] = -10 * size
    _paint_by_class(rng, images, OBJECTS, others[1], xs, ys, front)
    return _stylise(np.random.default_rng((seed, block, 1)), images, style), labels


def _random_pose(
    rng: np.random.Generator,
    n: int,
    size: int,
    scale: tuple[float, float],
    shift: float,
    aspects: NDArray[np.float64] | None = None,
) -> Pose:
    """Poses of n objects whose longer side is `scale` of the image, `shift` of it off the centre at most."""
    long = rng.uniform(*scale, n) * size / 2
    aspect = np.ones(n) if aspects is None else aspects
    aspect = aspect * np.exp(rng.normal(0, 0.15, n))
    mirror = np.where(rng.random(n) < 0.5, -1.0, 1.0)
    x, y = (size * (0.5 + rng.uniform(-shift, shift, n)) for _ in range(2))
    width, height = long * np.minimum(1, aspect) * mirror, long * np.minimum(1, 1 / aspect)
    return Pose(*(value.astype(np.float32) for value in (x, y, width, height, rng.normal(0, 0.08, n))))


def _paint_by_class(
    rng: np.random.Generator,
    images: Array,
    subjects: Subjects,
    labels: NDArray[np.int64],
    xs: Array,
    ys: Array,
    pose: Pose,
) -> None:
    colours = draw_colours(rng, len(images))
    for number, parts in enumerate(subjects.parts):
        chosen = np.nonzero(labels == number)[0]
        if len(chosen):
            part = images[chosen]
            fields = (pose.x, pose.y, pose.half_width, pose.half_height, pose.tilt)
            paint(part, parts, Pose(*(value[chosen] for value in fields)), colours[chosen], xs, ys)
            images[chosen] = part


def place_arrays(
    count: int, image_size: int, seed: int, style: str, mixes: Sequence[Mapping[str, float]], chunk: int
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Square scenes in which what stands there is the class, in the camera of `draw_scene`.

    Args:
        count, image_size, seed, style, chunk: As for `classification_arrays`.
        mixes: Of each class the shares of what stands there.

    Returns:
        Images (count, image_size, image_size, 3) and labels (count,), classes in balance.
    """
    check_style(style)
    shares = np.array([[mix.get(name, 0) for name in CLASSES] for mix in mixes], float)
    blocks = [_places(image_size, seed, style, shares, block, chunk) for block in range(-(-count // chunk))]
    images, labels = (np.concatenate(parts)[:count] for parts in zip(*blocks, strict=True))
    return images, labels


def _places(
    size: int, seed: int, style: str, shares: NDArray[np.float64], block: int, n: int
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    rng = np.random.default_rng((seed, 9, block))
    xs, ys = _grid(size, size)
    labels = rng.permutation(np.arange(n) % len(shares)).astype(np.int64)
    horizon = rng.uniform(0.35, 0.5, n) * size
    images = _backdrop(rng, n, xs, ys, horizon.astype(np.float32))
    bounds = (shares / shares.sum(1, keepdims=True)).cumsum(1)[labels]
    metres, aspects = np.array([SHAPE[name][1] for name in CLASSES]), np.array(OBJECTS.aspects)
    # From far to near.
    for distance in 1 / np.sort(rng.uniform(1 / FARTHEST_IN_PLACE, 1 / NEAREST_OBJECT, (OBJECTS_IN_PLACE, n)), 0):
        objects = (rng.random((n, 1)) >= bounds).sum(1)
        scale = FOCAL * size / distance
        half_height = scale * metres[objects] / 2
        x, mirror = rng.uniform(0, size, n), rng.choice([-1, 1], n)
        y = horizon + scale * CAMERA_HEIGHT - half_height
        values = (x, y, mirror * half_height * aspects[objects], half_height, np.zeros(n))
        pose = Pose(*(value.astype(np.float32) for value in values))
        _paint_by_class(rng, images, OBJECTS, objects, xs, ys, pose)
    return _stylise(np.random.default_rng((seed, 9, block, 1)), images, style), labels


@dataclass
class Instance:
    """One object of a scene.

    Attributes:
        name: Its class.
        mask: Its visible pixels, (h, w).
        amodal: All its pixels inside the image, hidden ones included.
        box: x1, y1, x2, y2 in pixels around the amodal mask.
        visibility: Visible over all pixels.
        depth: Distance in metres.
        keypoints: For a person, (7, 3): x, y and whether it is visible (2), hidden (1) or outside the image (0).
    """

    name: str
    mask: Mask
    amodal: Mask
    box: tuple[int, int, int, int]
    visibility: float
    depth: float
    keypoints: Array | None = None


@dataclass
class Scene:
    """Everything about one drawn street scene.

    Attributes:
        image: (h, w, 3), 8 bit RGB.
        semantic: (h, w): index into STUFF + CLASSES.
        depth: (h, w) in metres.
        instances: From far to near.
    """

    image: NDArray[np.uint8]
    semantic: NDArray[np.uint8]
    depth: Array
    instances: list[Instance] = field(default_factory=list)


# A camera 1.5 m above a flat street, looking along it: focal length in image heights.
CAMERA_HEIGHT, FOCAL, FARTHEST = 1.5, 1.1, 80.0
# Metres between which objects stand. Their heights in pixels are spread evenly, not their distances: else most of them
# would be too small for any detector that trains in minutes.
NEAREST_OBJECT, FARTHEST_OBJECT = 5.0, 45.0
# In the small images of places they stand nearer, and so many of them.
FARTHEST_IN_PLACE, OBJECTS_IN_PLACE = 25.0, 6


def draw_scene(
    seed: int, index: int, height: int = 128, width: int = 256, style: str = "photo", crowd: int = 0
) -> Scene:
    """The scene number `index`; styles differ in pixels and in nothing else.

    Args:
        seed: Of the whole set.
        index: Number of the scene.
        height, width: In pixels.
        style: One of `STYLES`.
        crowd: So many persons at most join the objects of every class; how many is drawn for each scene.
    """
    check_style(style)
    rng = np.random.default_rng((seed, 7, index))
    xs, ys = _grid(height, width)
    focal = FOCAL * height
    horizon = np.array([rng.uniform(0.35, 0.5) * height], np.float32)
    image = _backdrop(rng, 1, xs, ys, horizon)
    drop = np.maximum(ys[0] - horizon[0], 1e-3)
    depth = np.where(ys[0] > horizon[0], np.minimum(focal * CAMERA_HEIGHT / drop, FARTHEST), FARTHEST)
    depth = np.broadcast_to(depth, (height, width)).astype(np.float32).copy()
    semantic = np.full((height, width), STUFF.index("sky"), np.uint8)
    ground = np.broadcast_to(ys[0] >= horizon[0], (height, width))
    semantic[ground] = STUFF.index("road")
    half_street = 6.0 * focal / depth
    walk = ground & (np.abs(xs[0] - width / 2) > half_street)
    semantic[walk] = STUFF.index("sidewalk")
    image[0][walk] = np.clip(image[0][walk] + 0.12, 0, 1)

    count = int(rng.integers(5, 12))
    names = [CLASSES[i] for i in rng.integers(len(CLASSES), size=count)]
    if crowd:
        # Mixed in, or the nearest objects would always be persons.
        names = [str(name) for name in rng.permutation(names + ["person"] * int(rng.integers(crowd + 1)))]
        count = len(names)
    distances = 1 / np.sort(rng.uniform(1 / FARTHEST_OBJECT, 1 / NEAREST_OBJECT, count))
    drawn: list[tuple[str, Mask, Pose, float]] = []
    for name, distance in zip(names, distances, strict=True):
        aspect, metres = SHAPE[name]
        half_height = focal * metres / distance / 2
        # Houses and trees line the street, everything else is on it.
        side = 9.0 if name in ("building", "tree") else rng.uniform(0, 5)
        x = width / 2 + rng.choice([-1, 1]) * side * focal / distance
        y = horizon[0] + focal * CAMERA_HEIGHT / distance - half_height
        mirror = rng.choice([-1, 1])
        values = (x, y, mirror * half_height * aspect, half_height, 0.0)
        pose = Pose(*(np.array([value], np.float32) for value in values))
        silhouette = paint(image, PARTS[name], pose, draw_colours(rng, 1), xs, ys)[0]
        if silhouette.sum() < 4:
            continue
        drawn.append((name, silhouette, pose, float(distance)))
        semantic[silhouette] = len(STUFF) + CLASSES.index(name)
        depth[silhouette] = distance

    covered = np.zeros((height, width), bool)
    instances: list[Instance] = []
    for name, silhouette, pose, distance in reversed(drawn):
        visible = silhouette & ~covered
        covered |= silhouette
        rows, columns = np.nonzero(silhouette)
        box = (int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1)
        points = _keypoints(pose, visible) if name == "person" else None
        share = float(visible.sum() / silhouette.sum())
        instances.append(Instance(name, visible, silhouette, box, share, distance, points))
    pixels = _stylise(np.random.default_rng((seed, 8, index)), image, style)[0]
    return Scene(pixels, semantic, depth, instances[::-1])


def _keypoints(pose: Pose, visible: Mask) -> Array:
    height, width = visible.shape
    points = np.zeros((len(KEYPOINTS), 3), np.float32)
    for i, (u, v) in enumerate(PERSON_KEYPOINTS):
        x, y = (float(value[0]) for value in pose.to_image(u, v))
        if 0 <= x < width and 0 <= y < height:
            points[i] = x, y, 2 if visible[int(y), int(x)] else 1
    return points
