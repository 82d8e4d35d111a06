"""Every format against pixels that were known before they were encoded, or against OpenCV."""

import io

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from train.data import pixels

RGB = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
GREY = RGB[..., 0]
ALPHA = np.random.default_rng(1).integers(0, 256, (20, 30), np.uint8)


def encoded(image, format, **options):
    file = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(file, format, **options)
    return file.getvalue()


def decode(content, channels=3, upright=True):
    return pixels.decode(content, channels, upright=upright)


@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("PNG", {}),
        ("BMP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("WEBP", {"lossless": True}),
    ],
)
def test_lossless_formats_give_the_pixels_that_were_encoded(format, options):
    np.testing.assert_array_equal(decode(encoded(RGB, format, **options)), RGB)


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "GIF"])
def test_grey_has_three_equal_channels_or_one(format):
    content = encoded(GREY, format)
    np.testing.assert_array_equal(decode(content), np.repeat(GREY[..., None], 3, axis=-1))
    np.testing.assert_array_equal(decode(content, channels=1), GREY[..., None])


def test_rgb_becomes_grey_by_itu_r_601():
    grey = RGB.astype(float) @ [0.299, 0.587, 0.114]
    assert np.abs(decode(encoded(RGB, "PNG"), channels=1)[..., 0] - grey).max() <= 1


@pytest.mark.parametrize("format", ["JPEG", "WEBP"])
def test_lossy_formats_are_as_opencv_has_them(format):
    y, x = np.mgrid[:64, :96] / 40
    smooth = np.rint(127 + 100 * np.stack([np.sin(x + y), np.cos(2 * x), np.sin(3 * y)], -1))
    content = encoded(smooth.astype(np.uint8), format, quality=95)
    by_opencv = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
    assert np.abs(decode(content).astype(int) - by_opencv).max() <= 3


def test_a_palette_is_looked_up():
    colors = np.random.default_rng(2).integers(0, 256, (16, 3), np.uint8)
    numbers = np.random.default_rng(3).integers(0, 16, (20, 30), np.uint8)
    image = Image.fromarray(numbers)
    image.putpalette(colors.tobytes())
    for format in ("PNG", "GIF", "BMP", "TIFF"):
        np.testing.assert_array_equal(decode(encoded(image, format)), colors[numbers])


def test_one_bit_is_black_and_white():
    content = encoded(Image.fromarray(GREY > 127), "PNG")
    np.testing.assert_array_equal(decode(content, 1)[..., 0], np.where(GREY > 127, 255, 0))


@pytest.mark.parametrize("image", [RGB, np.repeat(GREY[..., None], 3, axis=-1)], ids=["RGB", "L"])
@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
def test_transparent_parts_are_shown_on_white(image, format):
    transparent = Image.fromarray(np.dstack([image, ALPHA]))
    options = {"lossless": True, "exact": True} if format == "WEBP" else {}
    shown = 255 + (image.astype(float) - 255) * ALPHA[..., None] / 255
    assert np.abs(decode(encoded(transparent, format, **options)) - shown).max() <= 1


def test_a_transparent_colour_of_a_palette_is_shown_on_white():
    image = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8))
    image.putpalette([200, 10, 20, 30, 40, 50])
    for format in ("PNG", "GIF"):
        got = decode(encoded(image, format, transparency=1))
        np.testing.assert_array_equal(got[0], [[200, 10, 20], [255, 255, 255]])


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_of_16_bits_the_upper_8_are_taken(format):
    deep = np.random.default_rng(4).integers(0, 1 << 16, (20, 30), np.uint16)
    np.testing.assert_array_equal(decode(encoded(deep, format), 1)[..., 0], deep >> 8)


def test_of_16_bits_rgb_the_upper_8_are_taken():
    deep = np.random.default_rng(4).integers(0, 1 << 16, (20, 30, 3), np.uint16)
    content = cv2.imencode(".png", deep)[1].tobytes()  # which stores BGR as RGB
    np.testing.assert_array_equal(decode(content), deep[..., ::-1] >> 8)


def test_cmyk_is_the_colour_that_it_prints():
    """Without a profile: the light that the inks leave, and black takes from all."""
    y, x = np.mgrid[:40, :64] / 30
    inks = np.rint(120 + 100 * np.stack([np.sin(x), np.cos(y), np.sin(x + y), np.cos(x)], -1))
    image = Image.frombytes("CMYK", (64, 40), inks.astype(np.uint8).tobytes())
    prints = (255 - inks[..., :3]) * (255 - inks[..., 3:]) / 255
    for format, tolerance in (("TIFF", 1), ("JPEG", 8)):
        options = {"quality": 98, "subsampling": 0} if format == "JPEG" else {}
        content = encoded(image, format, **options)
        assert np.abs(decode(content) - prints).max() <= tolerance


def test_the_first_frame_of_an_animation_is_taken():
    frames = [Image.fromarray(np.full((8, 9), level, np.uint8)) for level in (10, 200, 90)]
    for format, options in (("GIF", {}), ("WEBP", {"lossless": True}), ("TIFF", {})):
        content = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
        np.testing.assert_array_equal(decode(content, 1), np.full((8, 9, 1), 10))


@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
def test_exif_orientation_turns_the_picture(format):
    """6: the stored first row is the right side, the stored first column the top."""
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"lossless": True} if format == "WEBP" else {}
    content = encoded(RGB, format, exif=exif, **options)
    np.testing.assert_array_equal(decode(content), np.rot90(RGB, -1))
    if format != "TIFF":  # whose own tag it is, so that Pillow always turns it
        np.testing.assert_array_equal(decode(content, upright=False), RGB)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_jpeg_turns_as_pillow_turns_it(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(RGB, "JPEG", exif=exif)
    stored = np.array(Image.open(io.BytesIO(content)))
    upright = np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(content))))
    np.testing.assert_array_equal(pixels.jpeg_turn(content).apply(stored), upright)


@pytest.mark.parametrize("content", [b"", encoded(RGB, "PNG"), encoded(RGB, "JPEG")])
def test_what_has_no_orientation_is_upright(content):
    assert pixels.jpeg_turn(content) == pixels.UPRIGHT


def test_damaged_exif_is_passed_over():
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encoded(RGB, "JPEG", exif=exif)
    position = content.index(b"Exif\0\0") + 6
    damaged = content[:position] + b"\xff" * 8 + content[position + 8 :]
    assert pixels.jpeg_turn(damaged) == pixels.UPRIGHT


@pytest.mark.parametrize("format", ["PNG", "GIF", "BMP", "TIFF", "WEBP", "JPEG"])
def test_a_damaged_picture_is_an_error(format):
    whole = encoded(RGB, format)
    for content in (b"", b"no picture", whole[:40], whole[: len(whole) * 2 // 3]):
        with pytest.raises(ValueError, match="can't decode it"):
            decode(content)


def test_32_bits_are_an_error():
    with pytest.raises(ValueError, match="it has 32 bits a channel"):
        decode(encoded(RGB[..., 0].astype(np.float32), "TIFF"))
