"""Check and execute Metal kernels on a Linux CPU: the text a Mac would compile, checked thread by thread.

`metal_kernel` has the signature of `mx.fast.metal_kernel`; `installed()` puts it in its place. See README.md.
"""

from tests.msl_on_cpu.kernel import Options, installed, last_results, metal_kernel, options
from tests.msl_on_cpu.lint import lint
from tests.msl_on_cpu.text import KernelFault

__all__ = ["KernelFault", "Options", "installed", "last_results", "lint", "metal_kernel", "options"]
