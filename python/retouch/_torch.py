"""Checks the installed torch before the extension is loaded.

The default build is linked with one version of libtorch: with another one the dynamic linker may
crash the process, so the check reads versions only and must run first. The `dlpack` build (stable
ABI, recognised by its file name) is not linked with libtorch and takes any torch from 2.10 on.
"""

import importlib.util

BUILT_FOR = "2.13.0"
DLPACK_FROM = (2, 10)


def check(installed: str, origin: str) -> None:
    """Raises ImportError if the torch `installed` cannot serve the extension at path `origin`."""
    version = installed.split("+")[0]
    if ".abi3." in origin:
        if tuple(int(x) for x in version.split(".")[:2]) < DLPACK_FROM:
            least = ".".join(map(str, DLPACK_FROM))
            raise ImportError(
                f"this build of retouch needs torch >= {least}, but torch {installed} is installed: "
                f"`pip install 'torch>={least}'`."
            )
    elif version != BUILT_FOR:
        raise ImportError(
            f"retouch is built for torch {BUILT_FOR}, but torch {installed} is installed: "
            f"`pip install torch=={BUILT_FOR}`, or build retouch for any torch as "
            "'Other torch versions' in the README says."
        )


def extension() -> str:
    """Where the extension is, without loading it ("" if it was never built)."""
    spec = importlib.util.find_spec("retouch._core")
    return (spec.origin or "") if spec else ""
