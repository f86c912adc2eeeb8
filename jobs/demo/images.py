"""The demo's images, read from installed packages.

No image is stored in this repository and none is downloaded: the wheels of scikit-image and
scikit-learn contain them, and the ``demo`` extra installs both. ``labels/<stem>.png`` beside this
file is the ground truth of each image.

chelsea.png          A cat's head and chest, close up. By Stefan van der Walt, CC0.
astronaut.png        Eileen Collins in a space suit; a flag, a model shuttle and a helmet around
                     her. NASA, Great Images database, public domain.
motorcycle_left.png  A motorbike in a garage, left image of a stereo pair; a bench and part of a
                     child's bicycle behind it. Middlebury 2014 stereo data, whose page grants
                     "permission to use and publish all images" and asks for a citation:
                     D. Scharstein et al., "High-resolution stereo datasets with subpixel-accurate
                     ground truth", GCPR 2014.
rocket.jpg           A Falcon 9 with DSCOVR on its launch pad. SpaceX, public domain as
                     scikit-image states it.
china.jpg            A pavilion above a lake. By danielbuechele on Flickr, CC BY 2.0.
flower.jpg           A dahlia in a garden. By vultilion on Flickr (scikit-learn's note names
                     danielbuechele but links to vultilion's photograph), CC BY 2.0.

The two CC BY images need that credit, and a note of what was changed, wherever they are shown.
"""

from importlib.util import find_spec
from pathlib import Path

# File name -> the package that contains it, and the folder inside that package.
IMAGES: dict[str, tuple[str, str]] = {
    "chelsea.png": ("skimage", "data"),
    "astronaut.png": ("skimage", "data"),
    "motorcycle_left.png": ("skimage", "data"),
    "rocket.jpg": ("skimage", "data"),
    "china.jpg": ("sklearn", "datasets/images"),
    "flower.jpg": ("sklearn", "datasets/images"),
}

_DISTRIBUTION = {"skimage": "scikit-image", "sklearn": "scikit-learn"}


class ImageMissingError(RuntimeError):
    """The package of an image is not installed, or does not contain the image."""


def image_path(name: str) -> Path:
    """Return the path of an image on disk; its package is found, not imported."""
    package, folder = IMAGES[name]
    spec = find_spec(package)
    roots = spec.submodule_search_locations if spec else None
    for root in roots or ():
        path = Path(root) / folder / name
        if path.is_file():
            return path
    why = "has no such file" if roots else "is not installed"
    raise ImageMissingError(
        f"{name}: {_DISTRIBUTION[package]} {why}; install the demo's packages with "
        "pip install -e '.[demo]'"
    )


def demo_images() -> dict[str, bytes]:
    """Return the bytes of each image by file name, in the order of IMAGES."""
    return {name: image_path(name).read_bytes() for name in IMAGES}
