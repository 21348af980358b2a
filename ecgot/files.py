"""Files: the cache's folder, and writing so that no half of a file is ever seen."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def default_cache_dir() -> Path:
    """``$ECGOT_CACHE``, else ``~/.cache/ecgot``."""
    return Path(os.environ.get("ECGOT_CACHE") or Path.home() / ".cache" / "ecgot")


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file in the folder of ``path``, then rename it to ``path``.

    Where ``write`` raises, ``path`` stays as it was and the temporary file goes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o644)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink()
        raise


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically."""
    packed = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_atomically(path, lambda temporary: save_file(packed, temporary, metadata))


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, in UTF-8 with line feeds as they are."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8", newline=""))
