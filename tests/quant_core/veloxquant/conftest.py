"""The checking harness as a back end."""

from tests.kernels.conftest import metal

__all__ = ["metal"]
