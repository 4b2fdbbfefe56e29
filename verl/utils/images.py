"""Images in questions and observations: what a policy that reads images makes of them.

In the text of a tool an image stands at `PLACE`, in the prompt of a row at `IMAGE_MARK`
(`verl.utils.tokenizer`). In a context the tokens of `Image.token_ids` stand for it, and its pixels
travel beside the context.
"""

import base64
import binascii
import hashlib
from collections.abc import Sequence
from io import BytesIO
from typing import Any

import numpy as np

from verl.agent import Image, Row
from verl.utils.answers import kind_of
from verl.utils.errors import DataError

PLACE = "\N{OBJECT REPLACEMENT CHARACTER}"
"""Where an image stands in a text of a tool."""
FAMILIES = ("idefics3",)
"""The `model_type` of the families that can be trained on images.

In these a position is one number, as packed rows have it, and all tiles have one size."""

USUAL_SIZE = (1024, 768)
"""Pixels of an ordinary picture, in width and height."""
MOST_KEPT = 64
"""Images that a reader keeps."""


class ImageReader:
    """The image processor of a policy."""

    def __init__(self, path: str, trust_remote_code: bool = False) -> None:
        """Raises OSError or ValueError if there is no processor of images at `path`."""
        from transformers import AutoProcessor

        self.processor: Any = AutoProcessor.from_pretrained(
            path, trust_remote_code=trust_remote_code
        )
        if not hasattr(self.processor, "image_processor"):
            raise ValueError(f"{path} has a tokenizer, and no processor of images")
        self.kept: dict[str, Image] = {}
        """What was read last, by digest: the trajectories of a group share an image."""

    def read(self, data: bytes) -> Image:
        """The image in a file of any format that Pillow reads. Raises DataError for any other."""
        digest = hashlib.sha256(data).hexdigest()
        if digest not in self.kept:
            if len(self.kept) >= MOST_KEPT:
                self.kept.pop(next(iter(self.kept)))
            self.kept[digest] = self._process(data, digest)
        return self.kept[digest]

    def _process(self, data: bytes, digest: str) -> Image:
        from PIL import Image as Pictures

        try:
            with Pictures.open(BytesIO(data)) as opened:
                picture = opened.convert("RGB")
            made = self.processor(
                text=self.processor.image_token,
                images=[[picture]],
                add_special_tokens=False,
                return_tensors="np",
            )
        # Pillow says SyntaxError of some broken files
        except (OSError, ValueError, SyntaxError, Pictures.DecompressionBombError) as error:
            raise DataError(f"no image that can be read ({error})") from error
        pixels = np.asarray(made["pixel_values"][0], dtype=np.float32)
        return Image(made["input_ids"][0].tolist(), pixels, digest)

    def tokens_of_picture(self) -> int:
        """How many tokens stand for a picture of `USUAL_SIZE`."""
        from PIL import Image as Pictures

        file = BytesIO()
        Pictures.new("RGB", USUAL_SIZE).save(file, "PNG")
        return len(self.read(file.getvalue()).token_ids)

    def read_text(self, encoded: str) -> Image:
        """The image in a file that is encoded in base64. Raises DataError."""
        try:
            data = base64.b64decode("".join(encoded.split()), validate=True)
        except (binascii.Error, ValueError) as error:
            raise DataError(f"an image is not encoded in base64 ({error})") from error
        return self.read(data)


def images_of(row: Row, reader: ImageReader | None) -> list[Image]:
    """The images of a row.

    Raises DataError for images that cannot be read, and for any if there is no reader.
    """
    files = files_of(row)
    if files and reader is None:
        raise DataError(
            f"the row has {len(files)} images, and the policy reads none: a model that does takes "
            "actor_rollout_ref.model.reads_images=true"
        )
    return [reader.read(file) for file in files] if reader is not None else []


def files_of(row: Row) -> list[bytes]:
    """The files of the images of a row: its `images`, each as bytes or as `{"bytes": ...}`.

    Raises DataError for anything else, naming the key and what was expected.
    """
    files: list[bytes] = []
    for number, entry in enumerate(row.get("images") or ()):
        data = entry.get("bytes") if isinstance(entry, dict) else entry
        if not isinstance(data, bytes):
            raise DataError(
                f"images[{number}]: expected the bytes of a file, or an object with them under "
                f"bytes, got {kind_of(data if isinstance(entry, dict) else entry)}"
            )
        files.append(data)
    return files


def digests_of(row: Row) -> list[str]:
    """The SHA-256 of the file of each image of a row. Raises DataError as `files_of` does."""
    return [hashlib.sha256(file).hexdigest() for file in files_of(row)]


def pixels_of(rows: Sequence[Sequence[Image]]) -> np.ndarray:
    """The tiles of the images of each row, in their order: [B, M, 3, H, W], 0 behind the last.

    M is the most tiles of a row. A tile of an image is never 0 in all of its pixels.
    """
    tiles = [[tile for image in images for tile in image.pixels] for images in rows]
    most = max(map(len, tiles))
    shape = next(tile.shape for of_row in tiles for tile in of_row)
    pixels = np.zeros((len(rows), most, *shape), dtype=np.float32)
    for number, of_row in enumerate(tiles):
        if of_row:
            pixels[number, : len(of_row)] = of_row
    return pixels
