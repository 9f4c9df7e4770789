"""How quantized weights lie in memory and in files: panels of 16 rows, made for the kernels. No torch.

A matrix `[N, K]` (out, in) is padded to 16 rows (Np) and 32 columns (Kp). A block is 16 rows x 32 columns, and its codes stand in the
order in which a vector register takes them: four columns of 16 rows are 64 bytes, one load of AVX-512 (two of AVX2, four of NEON).

    q4, block of 256 bytes     bytes 0..63                            64..127       128..191      192..255
                               row 0       row 1  ...    row 15
                    low nibble col 0..3    col 0..3      col 0..3     col 4..7      col 8..11     col 12..15
                   high nibble col 16..19  col 16..19    col 16..19   col 20..23    col 24..27    col 28..31

    q8, block of 512 bytes     the same with a byte for each code: 8 times 64 bytes, col 0..3, 4..7, ..., 28..31

A code of q4 is an index into a codebook of 16 numbers, stored as 7 bits with an offset of 64: unsigned 7-bit times signed 8-bit products
can be added in pairs in 16 bits (AVX2's `maddubs`) without saturating. A code of q8 is the number itself. Each row has a float32 scale,
and each group of 32 (or 16) columns of a row a signed 8-bit multiple of it:

    weight = (codebook[code] - 64) * scale[group] * row_scale        4.25 bits a weight (4.5 with groups of 16), 8.25 for q8

Both signs of a group's scale are of use because the codebook is not symmetric.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmkit.errors import CheckpointError

PANEL = 16  # rows
BLOCK = 32  # columns
OFFSET = 64  # the codebook entry that means 0
SCHEMES = ("q4", "q8")
GROUPS = {"q4": (16, 32), "q8": (32,)}

# The numbers a 4-bit code stands for: those with the least square error on normally distributed weights whose scales were searched
# (Lloyd's algorithm, groups of 32), with an exact 0.
CODEBOOK = (1, 15, 25, 33, 40, 47, 53, 58, 64, 70, 76, 82, 89, 96, 105, 117)


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


@dataclass(frozen=True, eq=False)
class QuantizedMatrix:
    """A matrix in the layout above. Every size and dtype is checked, the values of codes and scales are not: any will do."""

    scheme: str  # q4 or q8
    group: int  # columns with one scale: 32, or 16 (q4 only)
    shape: tuple[int, int]  # [N, K] without padding
    codes: np.ndarray  # q4: uint8 [Np / 16, Kp / 32, 256]; q8: int8 [Np / 16, Kp / 32, 512]
    scales: np.ndarray  # int8 [Np / 16, Kp / group, 16]
    row_scale: np.ndarray  # float32 [Np]
    codebook: np.ndarray | None = None  # q4: uint8 [16], each at most 127; q8: None

    def __post_init__(self) -> None:
        expected = stored_shapes(self.scheme, self.group, self.shape)
        for name, (dtype, shape) in expected.items():
            found = getattr(self, name)
            if not isinstance(found, np.ndarray) or found.dtype != dtype or found.shape != shape:
                has = f"{found.dtype} {list(found.shape)}" if isinstance(found, np.ndarray) else type(found).__name__
                raise CheckpointError(
                    f"A {self.scheme} matrix {list(self.shape)} needs {name} {dtype} {list(shape)}, found {has}. Quantize the model again."
                )
            if not found.flags.c_contiguous:
                raise CheckpointError(f"The {name} of a {self.scheme} matrix are not contiguous. Copy them (numpy.ascontiguousarray).")
        if (self.codebook is None) != (self.scheme == "q8"):
            raise CheckpointError(f"A {self.scheme} matrix {'needs a' if self.scheme == 'q4' else 'has no'} codebook. Quantize it again.")
        if self.codebook is not None:
            check_codebook(self.codebook)

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes + self.row_scale.nbytes

    @property
    def bits_per_weight(self) -> float:
        """Bits of codes, scales and padding for each weight of the matrix."""
        return 8 * self.nbytes / (self.shape[0] * self.shape[1])

    def dequantize(self) -> np.ndarray:
        """float32 `[N, K]`."""
        return self.rows(np.arange(self.shape[0]))

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """Some rows, float32 `[len(ids), K]`: the embeddings of tokens."""
        ids = np.asarray(ids)
        panel, lane = ids // PANEL, ids % PANEL
        values = _values(self._codes_of(panel, lane), self.codebook)
        # Codes times scales are integers below 2^14: only the row's scale rounds.
        scales = self.scales[panel, :, lane].astype(np.float32)
        whole = values.reshape(*scales.shape, self.group) * scales[:, :, None]
        return whole.reshape(values.shape)[:, : self.shape[1]] * self.row_scale[ids, None]

    def unpack(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The arguments of `pack`: codes uint8 (q4) or int8 (q8) `[N, K]`, scales int8 `[N, groups]`, row_scale float32 `[N]`."""
        rows, columns = self.shape
        ids = np.arange(rows)
        panel, lane = ids // PANEL, ids % PANEL
        codes = np.ascontiguousarray(self._codes_of(panel, lane)[:, :columns])
        scales = self.scales[panel, :, lane][:, : -(-columns // self.group)]
        return codes, np.ascontiguousarray(scales), self.row_scale[:rows].copy()

    def _codes_of(self, panel: np.ndarray, lane: np.ndarray) -> np.ndarray:
        """The codes of rows by panel and lane, `[rows, Kp]`, one byte each."""
        panels, blocks, _ = self.codes.shape
        if self.scheme == "q8":
            return self.codes.reshape(panels, blocks, 8, PANEL, 4)[panel, :, :, lane].reshape(len(panel), blocks * BLOCK)
        packed = self.codes.reshape(panels, blocks, 4, PANEL, 4)[panel, :, :, lane]  # [rows, blocks, 4, 4]
        return np.stack((packed & 15, packed >> 4), 2).reshape(len(panel), blocks * BLOCK)


# A weight as the kernels take it: quantized, or float32, float16, or bfloat16 as its 16 bits in uint16.
Weight = np.ndarray | QuantizedMatrix


def pack(
    codes: np.ndarray, scales: np.ndarray, row_scale: np.ndarray, scheme: str = "q4", group: int = 32, codebook: Sequence[int] = CODEBOOK
) -> QuantizedMatrix:
    """Lays a quantized matrix out for the kernels.

    codes: `[N, K]`, q4: 0..15, q8: -127..127. scales: `[N, ceil(K / group)]`, -127..127. row_scale: `[N]`.
    """
    table = np.asarray(codebook, np.uint8) if scheme == "q4" else None
    rows, columns = codes.shape
    shapes = stored_shapes(scheme, group, (rows, columns))
    panels, blocks, size = shapes["codes"][1]
    fill = 0 if table is None else int(np.abs(table.astype(int) - OFFSET).argmin())
    full = np.full((panels * PANEL, blocks * BLOCK), fill, shapes["codes"][0])
    full[:rows, :columns] = codes
    # [panel, row, block, run of 4 columns, column] -> [panel, block, run, row, column]
    runs = full.reshape(panels, PANEL, blocks, BLOCK // 4, 4).transpose(0, 2, 3, 1, 4)
    if scheme == "q4":
        runs = runs[:, :, :4] | runs[:, :, 4:] << 4
    lanes = np.zeros((panels * PANEL, blocks * BLOCK // group), np.int8)
    lanes[:rows, : scales.shape[1]] = scales
    factors = np.zeros(panels * PANEL, np.float32)
    factors[:rows] = row_scale
    return QuantizedMatrix(
        scheme=scheme,
        group=group,
        shape=(rows, columns),
        codes=np.ascontiguousarray(runs).reshape(panels, blocks, size),
        scales=np.ascontiguousarray(lanes.reshape(panels, PANEL, -1).transpose(0, 2, 1)),
        row_scale=factors,
        codebook=table,
    )


def stored_shapes(scheme: str, group: int, shape: tuple[int, int]) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """dtype and shape of the arrays that hold a matrix, by their names; CheckpointError for what there is not."""
    if scheme not in SCHEMES:
        raise CheckpointError(f"The scheme {scheme!r:.80} is unknown; known are {', '.join(SCHEMES)}. Quantize the model again.")
    if type(group) is not int or group not in GROUPS[scheme]:
        raise CheckpointError(
            f"{scheme} has groups of {' or '.join(map(str, GROUPS[scheme]))}, not {group!r:.80}. Quantize the model again."
        )
    if len(shape) != 2 or not all(type(size) is int and 0 < size < 2**40 for size in shape):
        raise CheckpointError(f"A quantized matrix cannot have the shape {shape!r:.80}. Quantize the model again.")
    rows, columns = _up(shape[0], PANEL), _up(shape[1], BLOCK)
    code, size = (np.uint8, 256) if scheme == "q4" else (np.int8, 512)
    return {
        "codes": (np.dtype(code), (rows // PANEL, columns // BLOCK, size)),
        "scales": (np.dtype(np.int8), (rows // PANEL, columns // group, PANEL)),
        "row_scale": (np.dtype(np.float32), (rows,)),
    }


def check_codebook(codebook: np.ndarray) -> None:
    """CheckpointError where it is not uint8 [16] of 7-bit numbers."""
    if codebook.dtype != np.uint8 or codebook.shape != (16,) or int(codebook.max()) > 127:
        raise CheckpointError(f"A codebook has 16 numbers from 0 to 127, not {codebook.tolist()!r:.120}. Quantize the model again.")


def widen(array: np.ndarray) -> np.ndarray:
    """A weight that is not quantized as float32; uint16 is bfloat16."""
    if array.dtype == np.uint16:
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32, copy=False)


def _values(codes: np.ndarray, codebook: np.ndarray | None) -> np.ndarray:
    """What codes stand for, before scaling, float32."""
    return codes.astype(np.float32) if codebook is None else (codebook.astype(np.float32) - OFFSET)[codes]
