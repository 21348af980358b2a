"""The cache's folder, and atomic writes: nobody ever sees half a file or half a folder."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def default_cache_dir() -> Path:
    """``$ECGOT_CACHE``, else ``~/.cache/ecgot``."""
    return Path(os.environ.get("ECGOT_CACHE") or Path.home() / ".cache" / "ecgot")


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then rename it to ``path``.

    If ``write`` raises, ``path`` stays as it was and the temporary file is deleted.
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


@contextmanager
def atomic_folder(out: Path, *, first_wins: bool = False) -> Iterator[Path]:
    """A temporary folder beside ``out`` for the block to fill, renamed to ``out`` at the end of the block.

    If the block raises, ``out`` stays as it was and the temporary folder is deleted.

    Args:
        out: must not exist or be an empty folder.
        first_wins: keep a folder that another process has put at ``out`` meanwhile, and drop this one.

    Raises:
        OSError: there is something at ``out`` that cannot be replaced.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        yield temporary
        temporary.chmod(0o755)
        if out.is_dir() and not any(out.iterdir()):
            out.rmdir()  # Windows does not rename onto a folder
        try:
            temporary.rename(out)
        except OSError:
            if not (first_wins and out.is_dir()):
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically; ``metadata`` goes into its header."""
    packed = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_atomically(path, lambda temporary: save_file(packed, temporary, metadata))


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, in UTF-8, line endings as they are in ``text``.

    What is no character, as in the name of a file whose bytes are no UTF-8, is escaped.
    """
    content = text.encode("utf-8", errors="backslashreplace")
    write_atomically(path, lambda temporary: temporary.write_bytes(content))
