"""A checkpoint from the hub; huggingface_hub itself honours HF_ENDPOINT, HF_HUB_OFFLINE, HF_HOME and the token."""

from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from models.errors import UserError

# Only what a decoder in Hugging Face format needs; pickled weights are not even fetched.
WANTED = [
    "config.json", "generation_config.json", "model.safetensors", "model-*.safetensors", "model.safetensors.index.json",
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "README.md", "LICENSE*", "LICENCE*", "NOTICE*",
]  # fmt: skip


def download(source: str, revision: str | None) -> tuple[Path, str]:
    """Folder in huggingface_hub's cache and the commit. UserError says whether offline, unknown, gated or out of room."""
    at = f"{source} at revision {revision}" if revision else source
    try:
        folder = snapshot_download(source, revision=revision, allow_patterns=WANTED, ignore_patterns=["*/*"])
    except GatedRepoError as error:
        raise UserError(f"{source} is gated on the hub; accept its terms there and set HF_TOKEN") from error
    except RepositoryNotFoundError as error:
        raise UserError(f"{source}: no such folder, no such repository on the hub; correct it or set HF_TOKEN") from error
    except RevisionNotFoundError as error:
        raise UserError(f"{source} has no revision {revision!r} on the hub; correct checkpoint.revision") from error
    except HFValidationError as error:
        raise UserError(f"{source}: no such folder and no valid hub id; give a folder or an id such as org/name") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        raise UserError(f"{at}: no such folder, not in the local cache, and {why}; connect, or give a local folder") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        raise UserError(f"{at}: the hub answered with status {status}; try again later, or give a local folder") from error
    except OSError as error:
        raise UserError(f"{at}: the download failed ({' '.join(str(error).split())[:200]}); make room or try again") from error
    return Path(folder), Path(folder).name
