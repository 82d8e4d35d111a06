"""Lane tiles: how feature maps lie in memory for the sparse kernels. Plain data.

A plane (one channel of an image) is cut into as many equal tiles as a vector has lanes, and lane l
of a vector holds the pixel at the same place of tile l. A shift by a pixel is then a shift by a
whole vector, so that every load of a 3x3 or strided convolution is aligned and no column is a gap.
With a batch, some or all of the lanes may be images.

For 4 lanes, and a plane of 4 x 4 pixels in 2 x 2 tiles:

    pixels   a b | e f       vectors   a e i m    b f j n
             c d | g h                 c g k o    d h l p
             ----+----
             i j | m n
             k l | o p
"""

import dataclasses
import functools
import math

import numpy as np

from feather_jax.cpu.graph import Padding

LINE = 64  # bytes of a cache line, and the alignment of all that is aligned
FLOAT = 4  # bytes

NO_HALO: Padding = ((0, 0), (0, 0))


@dataclasses.dataclass(frozen=True)
class Tiles:
    """The layout of an array [batch, height, width, channels] of float32 in lane tiles.

    In memory: for each group of as many images as share a vector, for each channel, a plane; a
    plane is (halo + tile height + halo) x (halo + tile width + halo) vectors, then a gap that makes
    it an odd number of cache lines, so that the same place of different planes does not fall into
    the same set of a cache.

    Attributes:
      batch, height, width, channels: of the array.
      grid: what the lanes of a vector are: images, rows of tiles, columns of tiles.
      tile: height and width of a tile, in pixels; the tiles may cover more than the plane.
      halo: rows above and below a tile, columns left and right of it: the neighbours' pixels.
      fill: what lies outside the plane, in tiles and halos.
      pitch: planes from one group of images to the next: more than `channels` where the array is
        part of a concatenation.
    """

    batch: int
    height: int
    width: int
    channels: int
    grid: tuple[int, int, int]
    tile: tuple[int, int]
    halo: Padding = NO_HALO
    fill: float = 0.0
    pitch: int = 0

    @property
    def lanes(self) -> int:
        return math.prod(self.grid)

    @property
    def groups(self) -> int:
        """How many vectors a position has for all images."""
        return -(-self.batch // self.grid[0])

    @property
    def vector(self) -> int:
        """Bytes of a vector."""
        return FLOAT * self.lanes

    @property
    def rows(self) -> int:
        return sum(self.halo[0]) + self.tile[0]

    @property
    def columns(self) -> int:
        return sum(self.halo[1]) + self.tile[1]

    @property
    def plane(self) -> int:
        """Bytes from one channel to the next."""
        return LINE * (-(-self.rows * self.columns * self.vector // LINE) | 1)

    @property
    def group(self) -> int:
        """Bytes from one group of images to the next."""
        return self.plane * (self.pitch or self.channels)

    @property
    def nbytes(self) -> int:
        return self.group * self.groups

    @property
    def exact(self) -> bool:
        """Whether the tiles cover the planes and no more."""
        (images, down, across), (height, width) = self.grid, self.tile
        return (self.batch % images, down * height, across * width) == (0, self.height, self.width)

    def at(self, row: int, column: int) -> int:
        """Byte offset in a plane of the vector at a row and column of the tile, from (0, 0)."""
        (top, _), (left, _) = self.halo
        return ((row + top) * self.columns + column + left) * self.vector

    def same_tiles(self, other: "Tiles") -> bool:
        """Whether each pixel is in the same lane and at the same place of its tile in both."""
        space = (self.batch, self.height, self.width, self.grid, self.tile)
        return space == (other.batch, other.height, other.width, other.grid, other.tile)

    def coordinates(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Image of its group, row and column of the array, for every row, column and lane.

        Three arrays that broadcast to [rows, columns, lanes], halos included; what is outside the
        plane has coordinates outside it.
        """
        lane = np.arange(self.lanes)
        _, down, across = self.grid
        (top, _), (left, _) = self.halo
        image = lane // (down * across)
        row = lane // across % down * self.tile[0] + np.arange(self.rows)[:, None, None] - top
        column = lane % across * self.tile[1] + np.arange(self.columns)[:, None] - left
        return image, row, column

    def inside(self) -> np.ndarray:
        """Whether a lane is a pixel of the plane, [rows, columns, lanes], for a full group."""
        _, row, column = self.coordinates()
        return (row >= 0) & (row < self.height) & (column >= 0) & (column < self.width)

    def __str__(self) -> str:
        images, down, across = self.grid
        lanes = f"{down}x{across}" if images == 1 else f"{images}x{down}x{across}"
        (top, bottom), (left, right) = self.halo
        edges = f" +{top},{bottom},{left},{right}" if self.halo != NO_HALO else ""
        return f"{lanes} tiles of {self.tile[0]}x{self.tile[1]}{edges}"


def mask_tiles(tiles: Tiles) -> Tiles:
    """The layout of a mask of an array in tiles: one plane, without halo."""
    return dataclasses.replace(tiles, batch=1, channels=1, halo=NO_HALO, pitch=0)


def mask_of(tiles: Tiles) -> np.ndarray:
    """int32 [tile height, tile width, lanes]: all bits set inside the plane, none outside."""
    return -mask_tiles(tiles).inside().astype(np.int32)


@functools.cache
def choose_tiles(shape: tuple[int, int, int, int], lanes: int, images: int = 1) -> Tiles:
    """The tiles, without halo, that hold an array in the fewest vectors.

    Of those that take as many, the ones that do not end beyond a row, and nearest to square.

    Args:
      shape: batch, height, width, channels.
      lanes: of a vector, a power of two.
      images: how many images share a vector.
    """
    batch, height, width, channels = shape
    own = lanes // images
    grids = [(1 << i, own >> i) for i in range(own.bit_length())]

    def tiles(grid: tuple[int, int]) -> Tiles:
        tile = (-(-height // grid[0]), -(-width // grid[1]))
        return Tiles(batch, height, width, channels, (images, *grid), tile)

    def cost(each: Tiles) -> tuple[float, ...]:
        beyond = each.tile[1] * each.grid[2] > width
        return math.prod(each.tile), beyond, abs(math.log2(each.tile[1] / each.tile[0]) - 0.1)

    return min(map(tiles, grids), key=cost)
