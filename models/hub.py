"""Hub ids to commits. Honours HF_ENDPOINT, HF_HUB_OFFLINE and the token through huggingface_hub itself."""

from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from models.errors import UserError


def resolve_commit(source: str, revision: str | None) -> str:
    """The commit that a hub id means now; without the hub, the one of the local cache.

    Raises UserError when ``source`` is neither a folder nor an id that the hub or the cache knows.
    """
    try:
        return f"hub:{source}@{HfApi().model_info(source, revision=revision).sha}"
    except HFValidationError as error:
        raise UserError(f"{source}: no such folder, and no hub id either; give a folder with config.json") from error
    except (HfHubHTTPError, OSError, ValueError):
        return f"hub:{source}@{cached_commit(source, revision)}"


def cached_commit(source: str, revision: str | None) -> str:
    """The commit of ``source`` in huggingface_hub's cache: the name of its snapshot folder."""
    try:
        return Path(snapshot_download(source, revision=revision, local_files_only=True)).name
    except (LocalEntryNotFoundError, OSError, ValueError) as error:
        raise UserError(
            f"{source}: no such folder, and the hub does not answer for that id; check the name, or download it where there is a network"
        ) from error
