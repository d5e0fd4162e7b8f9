"""Geometry of the codec: which channels form which sub-vectors, and how many bytes a vector takes.

Dimension key used throughout quant_core: L layers, B sequences, T tokens, Hq query heads, Hkv key/value heads,
D head_dim, M num_subvecs, d subvec_dim, C num_centroids, G tables per head, P page size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from quant_core.errors import SpecError

# Tokens of a page, in codec, pool and kernels alike. A process knows one: every array, kernel text and artifact id is
# made for it.
PAGE_SIZE = 64
NUM_CENTROIDS = 256
LEGAL_BITS = (1, 2, 3, 4)
# New positions taken at once in decode, and tokens that can always be rewound: they size the ring
# (docs/design.md, "Which tokens are exact").
MAX_DECODE_LEN = 8
MAX_REWIND = 16
# The sub-vector sizes of each bit width; two of them split the channels in half, by variance.
SUBVEC_DIMS = {1: (8,), 2: (4,), 3: (2, 4), 4: (2,)}

Positions = np.ndarray[Any, np.dtype[np.int64]]


def doubled_to(needed: int, smallest: int = 8) -> int:
    """Entries of a table that starts with `smallest`, a power of two, and doubles until it holds `needed`."""
    return max(smallest, 1 << (needed - 1).bit_length())


@dataclass(frozen=True)
class Section:
    """A run of transformed channels cut into sub-vectors of one size.

    Sub-vector `j` (of `num_subvecs`) covers channels `channel_start + j*subvec_dim ...` and is coded with table
    `floor(j * num_codebooks / num_subvecs)` of this section.
    """

    channel_start: int
    num_channels: int
    subvec_dim: int
    num_codebooks: int

    @property
    def num_subvecs(self) -> int:
        """Sub-vectors of this section; each is one code byte."""
        return self.num_channels // self.subvec_dim

    def codebook_of(self, subvec: int) -> int:
        """The table that sub-vector `subvec` of this section is coded with."""
        return subvec * self.num_codebooks // self.num_subvecs


@dataclass(frozen=True)
class VQSpec:
    """How one kind of vector (keys, or values) of one layer is coded: `head_dim` channels in `sections`."""

    head_dim: int
    sections: tuple[Section, ...]

    def __post_init__(self) -> None:
        if sum(s.num_channels for s in self.sections) != self.head_dim:
            raise SpecError(f"sections cover {[s.num_channels for s in self.sections]} of {self.head_dim} channels")
        for s in self.sections:
            if s.num_channels % s.subvec_dim or not 1 <= s.num_codebooks <= s.num_subvecs:
                raise SpecError(f"{s}: sub-vectors must divide the channels and number at least the tables")

    @classmethod
    def for_bits(cls, head_dim: int, bits: int, codebooks_per_head: int | None = None) -> VQSpec:
        """The spec of `bits` bits per channel with byte codes (docs/design.md, "The codec").

        `codebooks_per_head` defaults to 4, and to 2 at one bit, whose tables are twice as large (32 KB in all).

        Raises:
            SpecError: bits outside 1-4, or a head_dim that its sub-vectors do not divide.
        """
        if bits not in SUBVEC_DIMS:
            raise SpecError(f"bits must be one of {LEGAL_BITS}, got {bits}")
        dims = SUBVEC_DIMS[bits]
        tables = codebooks_per_head or (2 if bits == 1 else 4)
        channels = head_dim // len(dims)
        if head_dim <= 0 or head_dim % 8 or any(channels % d for d in dims):
            raise SpecError(f"head_dim {head_dim} cannot be cut into sub-vectors of {dims}; allowed: multiples of 8")
        return cls(
            head_dim,
            tuple(Section(i * channels, channels, d, min(tables, channels // d)) for i, d in enumerate(dims)),
        )

    @property
    def code_bytes(self) -> int:
        """Bytes of one coded vector: one per sub-vector. Sections follow one another."""
        return sum(s.num_subvecs for s in self.sections)

    @property
    def bits_per_channel(self) -> float:
        """True bits of code per channel."""
        return 8 * self.code_bytes / self.head_dim

    @property
    def table_bytes(self) -> int:
        """Bytes of one head's tables in float16."""
        return sum(s.num_codebooks * NUM_CENTROIDS * s.subvec_dim * 2 for s in self.sections)


@dataclass(frozen=True)
class WindowSpec:
    """Which tokens stay exact. For the query at position i the first np(i) pages count as codes.

    Attributes:
        window: tokens behind the query that are always exact; a multiple of 8, at least 16.
        num_sink_tokens: first tokens of the sequence that are always exact.
        bucket_len: tokens per rotation bucket of the keys, a multiple of the page size.
    """

    window: int = 64
    num_sink_tokens: int = 4
    bucket_len: int = 512

    def __post_init__(self) -> None:
        if self.window < 16 or self.window % 8:
            raise SpecError(f"window must be a multiple of 8 and at least 16, got {self.window}")
        if not 0 <= self.num_sink_tokens <= PAGE_SIZE:
            raise SpecError(f"num_sink_tokens must be 0-{PAGE_SIZE}, got {self.num_sink_tokens}")
        if self.bucket_len < PAGE_SIZE or self.bucket_len % PAGE_SIZE:
            raise SpecError(f"bucket_len must be a multiple of {PAGE_SIZE}, got {self.bucket_len}")

    def num_code_pages(self, position: int) -> int:
        """np(i): pages the query at `position` reads as codes."""
        return max(0, (position + 1 - self.window) // PAGE_SIZE)

    def code_ends(self, positions: Positions) -> Positions:
        """P np(i) of every query position i: the first position that the query does not read as codes."""
        return np.maximum(0, (positions + 1 - self.window) // PAGE_SIZE) * PAGE_SIZE

    @property
    def ring_slots(self) -> int:
        """Exact vectors a sequence holds per layer and head, besides the sinks: window + 88 at 64 tokens a page."""
        return self.window + PAGE_SIZE - 1 + MAX_REWIND + MAX_DECODE_LEN + 1
