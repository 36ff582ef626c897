"""Names of a model hub -> folders and files on disk, from its cache where the hub is out of reach.

Nothing here executes what it finds: `trust_remote_code` is off wherever a checkpoint is opened.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fusion_lens.errors import FusionLensError, ModelError, QuestionError


def find_checkpoint(source: str, revision: str | None = None) -> str:
    """A folder as it is; a hub name as it is, or its cached folder where the hub is out of reach.

    Raises:
        ModelError: if there is neither.
    """
    if Path(source).exists():
        if not (Path(source) / "config.json").is_file():
            raise ModelError(f"{source} must be a checkpoint folder, but it has no config.json.")
        return source
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise ModelError(f"{source} must be an existing checkpoint folder, but there is none.")

    import huggingface_hub

    unreachable = _unreachable()
    if unreachable is None:
        return source
    try:
        return huggingface_hub.snapshot_download(source, revision=revision, local_files_only=True)
    except Exception:
        raise ModelError(
            f"{source} must be a checkpoint folder or a model of a reachable hub or its cache; "
            f"there is none, and the hub gave {type(unreachable).__name__}."
        ) from unreachable


def find_table(dataset: str, revision: str | None = None) -> Path:
    """The one CSV file of a data set of the hub.

    Raises:
        QuestionError: if neither the hub nor its cache has it, or it holds another number of them.
    """
    import huggingface_hub

    unreachable = _unreachable()
    try:
        folder = huggingface_hub.snapshot_download(
            dataset,
            repo_type="dataset",
            revision=revision,
            allow_patterns="*.csv",
            local_files_only=unreachable is not None,
        )
    except Exception as error:  # whatever the hub's client raises is a data set that is not there
        cause = unreachable or error
        raise QuestionError(
            f"{dataset} must be a data set of a reachable hub or its cache, but there is none, and "
            f"the hub gave {type(cause).__name__}; give its CSV file instead."
        ) from cause
    tables = sorted(Path(folder).rglob("*.csv"))
    if len(tables) != 1:
        raise QuestionError(f"{dataset} must hold one CSV file, but holds {len(tables)}.")
    return tables[0]


@contextmanager
def opening(name: str, *, local: bool) -> Iterator[None]:
    """Open a checkpoint inside: whatever goes wrong is a `ModelError` of one line, and folders,
    which open in a blink, show none of transformers' loading bars."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    if local:
        logging.disable_progress_bar()
    try:
        yield
    except FusionLensError:
        raise
    except Exception as error:  # transformers and safetensors raise what they like on a bad folder
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(
            f"{name} must be a usable checkpoint folder or hub name, but: {reason[0]}"
        ) from error
    finally:
        if shown:
            logging.enable_progress_bar()


def _unreachable() -> Exception | None:
    """Why the hub cannot be reached; None if it can."""
    import huggingface_hub

    try:
        # one attempt: the clients themselves would retry for most of a minute
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=5)
    except Exception as error:
        return error
    return None
