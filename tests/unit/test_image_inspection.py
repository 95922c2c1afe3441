"""What an encoded image says of itself, and that nothing but ``BadSample`` comes out of a damaged one."""

import contextlib
import io
import random
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from jobs.images.decoding import BadSample, decode_image
from jobs.images.inspection import ImageFacts, inspect_image

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
RGB = Image.fromarray(PIXELS)
URL = "s3://bucket/a.jpg"
Read = Callable[[bytes, str], object]


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def exif(orientation: object) -> Image.Exif:
    written = Image.Exif()
    written[ExifTags.Base.Orientation] = orientation
    return written


def deep_png() -> bytes:
    """A PNG with 16 bits a channel, which Pillow does not write: the header of one with 8 bits, changed."""
    content = bytearray(encoded(RGB, "PNG"))
    content[24] = 16
    content[29:33] = struct.pack(">I", zlib.crc32(bytes(content[12:29])))
    return bytes(content)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (encoded(RGB, "JPEG"), ImageFacts("JPEG", "RGB", 8, 6, 1, 1)),
        (encoded(RGB.convert("L"), "JPEG"), ImageFacts("JPEG", "L", 8, 6, 1, 1)),
        (encoded(RGB.convert("CMYK"), "JPEG"), ImageFacts("JPEG", "CMYK", 8, 6, 1, 1)),
        (encoded(RGB, "JPEG", exif=exif(6)), ImageFacts("JPEG", "RGB", 8, 6, 1, 6)),
        (encoded(RGB, "JPEG", exif=exif(99)), ImageFacts("JPEG", "RGB", 8, 6, 1, 1)),
        (encoded(RGB.convert("RGBA"), "PNG", exif=exif(3)), ImageFacts("PNG", "RGBA", 8, 6, 1, 3)),
        (encoded(RGB.convert("P"), "PNG", transparency=3), ImageFacts("PNG", "P", 8, 6, 1, 1)),
        (encoded(Image.fromarray(PIXELS[..., 0].astype(np.uint16)), "PNG"), ImageFacts("PNG", "I;16", 8, 6, 1, 1)),
        (deep_png(), ImageFacts("PNG", "RGB;16", 8, 6, 1, 1)),
        (encoded(RGB, "BMP"), ImageFacts("BMP", "RGB", 8, 6, 1, 1)),
        (
            encoded(RGB, "GIF", save_all=True, append_images=[ImageOps.mirror(RGB)]),
            ImageFacts("GIF", "P", 8, 6, 2, 1),
        ),
    ],
)
def test_a_header_says_it(content: bytes, expected: ImageFacts) -> None:
    facts = inspect_image(content, URL)
    assert facts == expected
    assert facts.is_rotated == (expected.orientation > 1)


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", encoded(RGB, "JPEG")[:10], encoded(RGB, "PNG")[:30]])
def test_what_is_no_image_is_named(content: bytes) -> None:
    with pytest.raises(BadSample, match=f"^{URL}: cannot be decoded, .+; repair or remove the file$"):
        inspect_image(content, URL)


@pytest.mark.parametrize("read", [inspect_image, decode_image])
class TestWhatIsBadFollowsFromTheFileAlone:
    def test_any_exception_of_a_decoder_names_the_file(self, read: Read) -> None:
        """A SPIDER header that is damaged is an AttributeError of Pillow's."""
        header = bytearray(encoded(RGB.convert("F"), "SPIDER"))
        header[26 * 4 : 27 * 4] = struct.pack("f", 1)
        with pytest.raises(BadSample, match=f"^{URL}: cannot be decoded, AttributeError: .* 'stkoffset'; repair or"):
            read(bytes(header), URL)

    @pytest.mark.parametrize("size", [(2**26, 1), (1, 2**26)])
    def test_what_is_too_long_for_a_decoder_is_refused_before(self, read: Read, size: tuple[int, int]) -> None:
        """It is no bomb, but its decoder would raise a MemoryError."""
        header = b"qoif" + struct.pack(">II", *size) + bytes([4, 0])
        with pytest.raises(BadSample, match=f"^{URL}: has {size[0]:,} x {size[1]:,} pixels, and at most 33,554,423 "):
            read(header, URL)

    @pytest.mark.parametrize("error", [MemoryError(), OSError("out of memory error when reading image file")])
    def test_a_lack_of_memory_names_the_file_and_does_not_make_it_bad(
        self, read: Read, error: Exception, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(_: Image.Image) -> Image.Exif:
            raise error

        monkeypatch.setattr(Image.Image, "getexif", fail)
        with pytest.raises(MemoryError, match=f"^{URL}: too little memory to decode it; "):
            read(encoded(RGB, "JPEG"), URL)

    def test_its_text_is_the_same_in_every_process(self, read: Read) -> None:
        texts = []
        for content in (b"no image", bytearray(b"no image")):
            with pytest.raises(BadSample) as caught:
                read(bytes(content), URL)
            texts.append(str(caught.value))
        assert texts == [f"{URL}: cannot be decoded, it has no header of an image that Pillow knows; repair or remove "
                         "the file"] * 2  # fmt: skip


def test_what_a_program_of_the_host_would_draw_is_bad_on_all_hosts() -> None:
    content = encoded(RGB, "EPS")
    assert inspect_image(content, URL).format == "EPS"
    with pytest.raises(BadSample, match=f"^{URL}: must hold pixels, got EPS, which a program draws; convert the file$"):
        decode_image(content, URL)


def test_a_header_can_be_whole_when_the_pixels_are_not() -> None:
    content = encoded(RGB.resize((64, 64)), "JPEG")[:-300]
    assert inspect_image(content, URL).width == 64
    with pytest.raises(BadSample, match="truncated"):
        decode_image(content, URL)


def test_a_bomb_is_not_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(BadSample, match="decompression bomb"):
        inspect_image(encoded(RGB, "PNG"), URL)


def test_the_pixels_are_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(_: Image.Image) -> None:
        raise AssertionError("the header is enough")

    contents = [encoded(RGB, "JPEG", exif=exif(6)), encoded(RGB, "PNG"), encoded(RGB, "PNG", exif=exif(6))]
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    assert [inspect_image(content, URL).orientation for content in contents] == [6, 1, 6]


@pytest.mark.parametrize("orientation", range(11))
def test_an_image_is_turned_as_pillow_turns_it(orientation: int) -> None:
    content = encoded(RGB, "PNG", exif=exif(orientation))
    turned = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content))))
    assert np.array_equal(decode_image(content, URL).permute(1, 2, 0).numpy(), turned)


def test_exif_that_pillow_cannot_write_again_does_no_harm() -> None:
    described = exif(6)
    described[ExifTags.Base.ImageWidth] = 8
    content = encoded(RGB, "JPEG", exif=described)
    odd = content.replace(struct.pack(">HHI", 0x0100, 4, 1), struct.pack(">HHI", 0x0100, 2, 1))  # a number as a text
    if odd == content:
        odd = content.replace(struct.pack("<HHI", 0x0100, 4, 1), struct.pack("<HHI", 0x0100, 2, 1))
    assert odd != content
    assert list(decode_image(odd, URL).shape) == [3, 8, 6]


@pytest.mark.filterwarnings("ignore")  # Pillow warns of what it finds odd
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP"])
def test_damage_is_a_bad_sample(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)  # a damaged size takes memory
    draw = random.Random(0)
    options = {} if kind in ("GIF", "BMP") else {"exif": exif(6)}
    whole = encoded(RGB, kind, **options)
    for _ in range(300):
        content = bytearray(whole[: draw.randrange(1, len(whole))] if draw.random() < 0.3 else whole)
        for _ in range(3):
            content[draw.randrange(min(len(content), 120))] = draw.choice([0, 1, 255, draw.randrange(256)])
        for read in (inspect_image, decode_image):
            with contextlib.suppress(BadSample):
                read(bytes(content), URL)
