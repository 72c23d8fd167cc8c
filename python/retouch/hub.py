"""Ids of the Hugging Face Hub, taken wherever a path is."""

import os
import re
from pathlib import Path

_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
# weights as safetensors only, and what describes them: nothing that could run
_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]


def local(source: str | os.PathLike[str], revision: str | None = None) -> str:
    """A path as it is; an id of the Hub, fetched into its cache.

    Args:
        source: The path or id.
        revision: Branch, tag or commit on the Hub; None for the newest. Paths have none.

    Raises:
        FileNotFoundError: There is no such file or folder and no such repository.
    """
    text = os.fspath(source)
    if Path(text).exists():
        return text
    if not _ID.fullmatch(text):
        raise FileNotFoundError(2, "no such file or folder", text)
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as e:
        raise FileNotFoundError(
            2, "no such folder; for Hub ids `pip install 'retouch[hf]'`", text
        ) from e
    try:
        return str(snapshot_download(text, revision=revision, allow_patterns=_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError) as e:
        first = str(e).strip().splitlines()[0]
        raise FileNotFoundError(
            2, f"no such folder, and not to be had from the Hub ({first})", text
        ) from e
