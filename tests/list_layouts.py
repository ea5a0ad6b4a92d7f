"""Small datasets whose images, classes and splits stand in lists, in the layouts that are handed out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

# Dataset -> its lists and images; of every text file the content, of every image its mode. Orders are odd on purpose.
FILES: dict[str, dict[str, str]] = {
    "cub200": {
        "CUB_200_2011/classes.txt": "1 001.Albatross\n2 002.Auklet\n",
        "CUB_200_2011/images.txt": "".join(
            f"{number} {path}.jpg\n"
            for number, path in enumerate(("001.Albatross/a", "001.Albatross/b", "002.Auklet/c", "002.Auklet/d"), 1)
        ),
        "CUB_200_2011/image_class_labels.txt": "4 2\n3 2\n2 1\n1 1\n",
        "CUB_200_2011/train_test_split.txt": "1 0\n2 1\n3 1\n4 1\n",
        "CUB_200_2011/images/001.Albatross/a.jpg": "RGB",
        "CUB_200_2011/images/001.Albatross/b.jpg": "L",
        "CUB_200_2011/images/002.Auklet/c.jpg": "RGB",
        "CUB_200_2011/images/002.Auklet/d.jpg": "RGB",
        "CUB_200_2011/images/002.Auklet/unlisted.jpg": "RGB",
    },
    "stanford40": {
        "Stanford40/ImageSplits/actions.txt": "action_name\tnumber_of_images\napplauding\t3\nfixing_a_bike\t2\n",
        "Stanford40/ImageSplits/train.txt": "fixing_a_bike_002.jpg\napplauding_001.jpg\napplauding_003.jpg\n",
        "Stanford40/ImageSplits/test.txt": "applauding_002.jpg\n",
        "Stanford40/JPEGImages/applauding_001.jpg": "RGB",
        "Stanford40/JPEGImages/applauding_002.jpg": "RGB",
        "Stanford40/JPEGImages/applauding_003.jpg": "CMYK",
        "Stanford40/JPEGImages/fixing_a_bike_002.jpg": "RGB",
    },
    "mit67": {
        "mit67/TrainImages.txt": "bar/b one.jpg\nairport_inside/a.jpg\r\nbar/c_gif.JPG\n",
        "mit67/TestImages.txt": "airport_inside/d.jpg\n",
        "mit67/Images/airport_inside/a.jpg": "RGB",
        "mit67/Images/airport_inside/d.jpg": "RGB",
        "mit67/Images/bar/b one.jpg": "RGBA",
        "mit67/Images/bar/c_gif.JPG": "P",
    },
    "domainnet": {
        "domainnet/painting_train.txt": "painting/zebra/a.jpg 1\npainting/axe/b.jpg 0\npainting/axe/c.png.TIF 0\n",
        "domainnet/painting_test.txt": "painting/zebra/d.jpg 1\n",
        "domainnet/painting/zebra/a.jpg": "RGB",
        "domainnet/painting/zebra/d.jpg": "RGB",
        "domainnet/painting/axe/b.jpg": "RGB",
        "domainnet/painting/axe/c.png.TIF": "L",
    },
    "tiny_imagenet": {
        "tiny-imagenet-200/wnids.txt": "n02\nn01",
        "tiny-imagenet-200/val/val_annotations.txt": "val_0.JPEG\tn02\t0\t0\t62\t63\n",
        "tiny-imagenet-200/train/n02/images/n02_0.JPEG": "RGB",
        "tiny-imagenet-200/train/n02/n02_boxes.txt": "n02_0.JPEG\t0\t0\t62\t63\n",
        "tiny-imagenet-200/train/n01/images/n01_0.JPEG": "L",
        "tiny-imagenet-200/train/n01/images/n01_1.JPEG": "RGB",
        "tiny-imagenet-200/train/n01/images/list.txt": "no image\n",
        "tiny-imagenet-200/val/images/val_0.JPEG": "RGB",
    },
}


def make_listed(root: Path, name: str, changes: dict[str, str | None] | None = None) -> Path:
    """A dataset's folder, with other files than its own if given; None leaves one out."""
    for number, (file, content) in enumerate({**FILES[name], **(changes or {})}.items()):
        if content is None:
            continue
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        if file.endswith(".txt"):
            (root / file).write_bytes(content.encode())
        else:
            pixels = np.random.default_rng(number).integers(0, 256, (20, 30, 3), np.uint8)
            form = {"P": "GIF", "RGBA": "PNG"}.get(content, "JPEG")
            Image.fromarray(pixels).convert(content).save(root / file, form)
    return root
