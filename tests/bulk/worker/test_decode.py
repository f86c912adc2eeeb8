"""Child processes decode to the same pixels and errors as this process."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from pipeline.bulk.worker.decode import DecodeError, DecodeLimits, DecoderPool
from pipeline.data import images
from pipeline.data.labels import VOC

SmallImage = Callable[[int], tuple[str, bytes, bytes]]


@pytest.fixture(scope="module")
def decoders() -> Iterator[DecoderPool]:
    made = DecoderPool(2, DecodeLimits(max_pixels=20_000), VOC)
    yield made
    made.close()


def test_pixels_equal_those_decoded_in_this_process(
    decoders: DecoderPool, small_image: SmallImage
) -> None:
    for number in range(12):
        _, data, _ = small_image(number)
        np.testing.assert_array_equal(decoders.image(data), images.decode(data))


def test_label_ids_equal_what_pillow_stored(decoders: DecoderPool, small_image: SmallImage) -> None:
    for number in range(6):
        _, _, data = small_image(number)
        with Image.open(io.BytesIO(data)) as label:
            expected = np.array(label)
        np.testing.assert_array_equal(decoders.label(data, expected.shape), expected)


def test_undecodable_bytes_give_the_same_error_kind_as_in_process(
    decoders: DecoderPool, small_image: SmallImage
) -> None:
    whole = small_image(1)[1]
    for data in (b"", b"a letter", whole[: len(whole) // 2], b"%PDF-1.4", whole[:20]):
        with pytest.raises(images.ImageError) as here:
            images.decode(data)
        with pytest.raises(DecodeError) as there:
            decoders.image(data)
        assert (there.value.kind, str(there.value)) == (here.value.kind, str(here.value))
    buffer = io.BytesIO()
    Image.new("L", (201, 100)).save(buffer, "PNG")
    with pytest.raises(DecodeError, match="over max_pixels, 20000") as large:
        decoders.image(buffer.getvalue())
    assert large.value.kind == "too_large"


def test_every_error_of_a_label_is_of_kind_label(
    decoders: DecoderPool, small_image: SmallImage
) -> None:
    _, image, label = small_image(1)
    for data, size in ((label, (5, 7)), (b"", (5, 7)), (image, (128, 96)), (label[:60], (128, 96))):
        with pytest.raises(DecodeError) as wrong:
            decoders.label(data, size)
        assert wrong.value.kind == "label"
        assert "\n" not in str(wrong.value)


def test_many_threads_share_a_few_children(decoders: DecoderPool, small_image: SmallImage) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: decoders.image(small_image(i)[1]), range(50)))
    for number, pixels in enumerate(found):
        np.testing.assert_array_equal(pixels, images.decode(small_image(number)[1]))
    assert len(decoders.pids()) == 2
