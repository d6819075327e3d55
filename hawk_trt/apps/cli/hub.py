"""Checkpoints of the Hugging Face hub, by their ids: owner/name."""

import re
from pathlib import Path

from hawk_trt.errors import CheckpointError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Weights, configs, tokenizer and chat template; not the pickled copies, images and papers that lie beside them.
_PATTERNS = ["model*.safetensors", "transformer/*.safetensors", "vision_encoder/*.safetensors", "*.json", "*.jinja"]


def is_hub_id(checkpoint: str) -> bool:
    """Whether the argument names a hub repository (owner/name) rather than a folder that is there."""
    return not Path(checkpoint).exists() and _HUB_ID.fullmatch(checkpoint) is not None


def download(hub_id: str, revision: str | None = None) -> Path:
    """The local folder of a hub checkpoint; files already in the cache are not downloaded again.

    Raises:
        CheckpointError: huggingface_hub is missing, the checkpoint does not exist, or cannot be downloaded.
    """
    try:
        from huggingface_hub import snapshot_download  # only hub ids need it
        from huggingface_hub.errors import (
            GatedRepoError,
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
        )
    except ImportError as error:
        raise CheckpointError(
            f"{hub_id}: no such folder, and a download needs huggingface_hub. Install it: pip install huggingface_hub"
        ) from error
    at = f"{hub_id}, revision {revision}" if revision else hub_id
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=_PATTERNS))
    except GatedRepoError as error:
        raise CheckpointError(f"{at}: access must be granted on its page first; then log in: hf auth login") from error
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{at}: no such folder, and the hub cannot be reached. Download it where there is a network "
            f"(hf download {hub_id} --local-dir DIR) and give the folder"
        ) from error
    except (HFValidationError, HfHubHTTPError, OSError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{at}: no such folder, and the hub says: {first_line}") from error
