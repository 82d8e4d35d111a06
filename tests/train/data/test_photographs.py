"""Decoding, cropping and resizing of photographs."""

import io

import cv2
import numpy as np
import pytest
import simplejpeg
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from train.data import photographs
from train.data.photographs import Box

HEIGHT, WIDTH = 120, 160


def smooth(height=HEIGHT, width=WIDTH):
    """An image that neither JPEG nor resizing changes much, uint8 [height, width, 3]."""
    y, x = np.mgrid[:height, :width] / np.array([height, width])[:, None, None]
    channels = [np.sin(5 * x + 2 * y), np.cos(4 * y - x), np.sin(3 * x * y)]
    return np.rint(127.5 + 120 * np.stack(channels, axis=-1)).astype(np.uint8)


def encoded(image, format="JPEG", mode="RGB", **options):
    file = io.BytesIO()
    if format == "JPEG":
        options = {"quality": 97} | options
    Image.fromarray(image).convert(mode).save(file, format, **options)
    return file.getvalue()


def crop(content, box, size=48, fast=False):
    out = np.zeros((size, size, 3), np.uint8)
    photographs.crop_and_resize(content, lambda height, width: box, out, fast=fast)
    return out


def by_pillow(image, box, size):
    """The same part of the original, resized by Pillow with antialiasing."""
    part = Image.fromarray(image).crop(
        (box.left, box.top, box.left + box.width, box.top + box.height)
    )
    return np.asarray(part.resize((size, size), Image.Resampling.BILINEAR)).astype(int)


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("box", [Box(0, 0, 120, 160), Box(10, 31, 60, 45), Box(99, 120, 21, 40)])
def test_a_part_is_what_pillow_gives(box, fast):
    error = np.abs(crop(encoded(smooth()), box, fast=fast) - by_pillow(smooth(), box, 48))
    assert error.max() <= 10
    assert error.mean() <= 2


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "CMYK"},
        {"progressive": True},
        {"subsampling": "4:4:4"},
        {"subsampling": "4:1:1"},
        {"format": "PNG"},
        {"format": "PNG", "mode": "RGBA"},
        {"format": "BMP"},
    ],
    ids=str,
)
def test_what_imagenet_holds_beside_rgb_jpegs(options):
    box = Box(10, 30, 80, 80)
    got = crop(encoded(smooth(), **options), box)
    assert np.abs(got - by_pillow(smooth(), box, 48)).max() <= 8


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_greyscale_has_three_equal_channels(format):
    box = Box(10, 30, 80, 80)
    grey = np.repeat(np.asarray(Image.fromarray(smooth()).convert("L"))[..., None], 3, axis=-1)
    got = crop(encoded(smooth(), format, mode="L"), box)
    assert np.abs(got - by_pillow(grey, box, 48)).max() <= 6


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_exif_orientation_is_ignored(format):
    """As by tf.image.decode_jpeg, which ImageNet's published figures were made with."""
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    box = Box(10, 30, 80, 80)
    got = crop(encoded(smooth(), format, exif=exif), box)
    assert np.abs(got - by_pillow(smooth(), box, 48)).max() <= 6


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"subsampling": "4:4:4"},
        {"subsampling": "4:2:2"},
        {"mode": "L"},
        {"mode": "CMYK"},
        {"progressive": True},
        {"restart_marker_rows": 1},
        {"comment": b"\xff\xc0" * 100},
    ],
    ids=str,
)
def test_leaving_out_the_rows_below_changes_nothing(options):
    """Every last row, whether or not it is the last of a block."""
    content = encoded(smooth(), **options)
    whole = simplejpeg.decode_jpeg(content, fastdct=True, fastupsample=True)
    for top in range(HEIGHT - 19):
        part = cv2.resize(whole[top : top + 20, 5:105], (48, 48), interpolation=cv2.INTER_LINEAR)
        quick = crop(content, Box(top, 5, 20, 100), fast=True)
        np.testing.assert_array_equal(quick, part)


def test_rows_below_are_left_out_where_that_is_possible():
    """The rest of the file may be anything, then."""
    content = encoded(smooth(), comment=b"x" * 999)
    wrong = content[:-600] + bytes(598) + content[-2:]
    box = Box(0, 0, 40, 50)
    np.testing.assert_array_equal(crop(wrong, box, fast=True), crop(content, box, fast=True))


def test_bytes_between_the_segments_are_passed_over(capfd):
    content = encoded(smooth())
    odd = content[:-2] + bytes(9) + content[-2:]
    box = Box(10, 30, 80, 80)
    with pytest.raises(ValueError, match="extraneous"):
        simplejpeg.decode_jpeg(odd)
    np.testing.assert_array_equal(crop(odd, box), crop(content, box))


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no image",
        encoded(smooth())[:1500],
        encoded(smooth())[:-2],
        encoded(smooth())[:100] + b"\xff\xd9",
    ],
)
def test_what_is_no_whole_image_is_an_error(content, fast):
    with pytest.raises(ValueError, match="can't decode it"):
        crop(content, Box(0, 0, 8, 8), fast=fast)


@pytest.mark.parametrize("scale", [1, 2, 4, 8])
def test_a_large_photograph_is_decoded_small(scale, monkeypatch):
    """At the smallest size at which the part still has as many pixels as are wanted."""
    image = smooth(481, 643)
    box = Box(40, 80, 50 * scale, 49 * scale)
    sizes = []

    def resize(part, *args, **kwargs):
        sizes.append(part.shape[:2])
        return cv2_resize(part, *args, **kwargs)

    cv2_resize = cv2.resize
    monkeypatch.setattr(cv2, "resize", resize)
    got = crop(encoded(image), box)
    assert sizes == [(50, 49)]
    assert np.abs(got - by_pillow(image, box, 48)).max() <= 8


def turned(image, orientation):
    """What Pillow makes of an image whose file has this EXIF orientation."""
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(image).save(file, "PNG", exif=exif)
    return np.array(ImageOps.exif_transpose(Image.open(file)))


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("orientation", range(10))  # 0 and 9 mean nothing
def test_a_photograph_is_turned_upright_where_asked_to(orientation, fast):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(smooth(), exif=exif, quality=95)
    upright = turned(smooth(), orientation)
    sizes = []

    def choose(height, width):
        sizes.append((height, width))
        return Box(10, 31, 60, 45)

    out = np.zeros((48, 48, 3), np.uint8)
    photographs.crop_and_resize(content, choose, out, fast=fast, upright=True)
    assert sizes == [upright.shape[:2]]
    assert np.abs(out - by_pillow(upright, Box(10, 31, 60, 45), 48)).max() <= 10


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_one_channel_is_grey(format):
    out = np.zeros((48, 48, 1), np.uint8)
    box = Box(10, 30, 80, 80)
    photographs.crop_and_resize(encoded(smooth(), format), lambda *_: box, out, fast=False)
    grey = (smooth() @ [0.299, 0.587, 0.114]).round().astype(np.uint8)
    assert np.abs(out[..., 0] - by_pillow(grey, box, 48)).max() <= 6


def test_a_picture_of_the_size_that_is_wanted_is_taken_as_it_is():
    image = np.random.default_rng(0).integers(0, 256, (28, 28, 3), np.uint8)
    got = crop(encoded(image, "PNG"), Box(0, 0, 28, 28), size=28)
    np.testing.assert_array_equal(got, image)


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(0, 2**40), st.integers(0, 2**30))
def test_a_random_box_is_inside_the_image(height, width, seed, step):
    (u,) = photographs.uniforms(seed, step, 5, 1)
    top, left, h, w = photographs.random_box(height, width, u)
    assert 0 <= top <= top + h <= height
    assert 0 <= left <= left + w <= width
    assert min(h, w) > 0


def test_random_boxes_have_the_areas_ratios_and_places_asked_for():
    u = photographs.uniforms(0, 0, 0, 4000)
    boxes = np.array([photographs.random_box(1000, 1000, row) for row in u])
    area, ratio = boxes[:, 2] * boxes[:, 3] / 1e6, boxes[:, 3] / boxes[:, 2]
    assert area.min() == pytest.approx(0.08, abs=0.003)
    assert area.max() > 0.97
    assert ratio.min() == pytest.approx(3 / 4, abs=0.01)
    assert ratio.max() == pytest.approx(4 / 3, abs=0.01)
    small = area < 0.5  # those always fit, so that nothing is drawn again
    assert np.mean(area[small]) == pytest.approx(0.29, abs=0.01)
    assert np.mean(np.log(ratio[small])) == pytest.approx(0, abs=0.01)
    place = boxes[:, :2] / (1001 - boxes[:, 2:])
    np.testing.assert_allclose(place.mean(axis=0), 0.5, atol=0.02)
    assert abs(np.corrcoef(place.T)[0, 1]) < 0.06


@pytest.mark.parametrize(
    ("shape", "box"),
    [((30, 3000), Box(0, 1480, 30, 40)), ((3000, 30), Box(1480, 0, 40, 30))],
)
def test_an_image_too_narrow_for_any_box_gives_its_centre(shape, box):
    for u in photographs.uniforms(0, 0, 0, 20):
        assert photographs.random_box(*shape, u) == box


@pytest.mark.parametrize(
    ("shape", "box"),
    [
        ((256, 256), Box(16, 16, 224, 224)),
        ((256, 400), Box(16, 88, 224, 224)),
        ((750, 500), Box(156, 31, 438, 438)),
        ((1, 1), Box(0, 0, 1, 1)),
    ],
)
def test_evaluation_takes_the_centre(shape, box):
    assert photographs.center_box(*shape, 0.875) == box


@given(st.integers(1, 500), st.integers(1, 500))
def test_the_whole_centre_is_the_shorter_side(height, width):
    box = photographs.center_box(height, width, 1.0)
    assert box.height == box.width == min(height, width)
    assert abs(2 * box.top + box.height - height) <= 1
    assert abs(2 * box.left + box.width - width) <= 1


def test_random_numbers_are_keyed_by_seed_step_and_index():
    whole = photographs.uniforms(7, 3, 0, 10)
    assert whole.shape == (10, photographs.UNIFORMS)
    assert whole.min() >= 0
    assert whole.max() < 1
    np.testing.assert_array_equal(photographs.uniforms(7, 3, 4, 6), whole[4:])
    others = [whole, photographs.uniforms(8, 3, 0, 10), photographs.uniforms(7, 4, 0, 10)]
    assert len(np.unique(others)) == 3 * whole.size
