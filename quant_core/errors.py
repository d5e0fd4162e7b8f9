"""Errors of the mathematics and the memory.

QuantError
├── SpecError       a geometry or option no codec can have
├── ShapeError      an array's dimensions disagree with the spec
├── CodecError      fitting refused: unusable samples, NaN activations, singular transform
├── ArtifactError   a stored codec that cannot be used: corrupt, foreign, of another version
│   ├── ArtifactNotFoundError   there is none of that name
│   ├── ArtifactInUseError      another process serves with it
│   └── ArtifactStorageError    its folder cannot be written or read: disk full, read-only
├── PoolError       the page pool cannot do what was asked
│   └── PoolFullError   no page is free
└── KernelError     a back end cannot be used, or a kernel failed its self-test
"""


class QuantError(Exception):
    """Base of every error raised by quant_core. The message says what, got, allowed, remedy."""


class SpecError(QuantError, ValueError):
    """A geometry or option no codec can have."""


class ShapeError(QuantError, ValueError):
    """An array's dimensions disagree with the spec."""


class CodecError(QuantError):
    """Fitting was refused: unusable samples, NaN activations, a singular transform."""


class ArtifactError(QuantError):
    """A stored codec cannot be used: corrupt, foreign, of another version."""


class ArtifactNotFoundError(ArtifactError):
    """There is no artifact of that name."""


class ArtifactInUseError(ArtifactError):
    """Another process serves with the artifact."""


class ArtifactStorageError(ArtifactError):
    """The folder of artifacts cannot be written: disk full, read-only, not allowed."""


class PoolError(QuantError):
    """The page pool cannot do what was asked."""


class PoolFullError(PoolError):
    """No page is free."""


class KernelError(QuantError):
    """A back end cannot be used, or a kernel failed its self-test."""
