"""Profiles on the Hugging Face hub, by its own client (`pip install lynx-compile[calibration]`)."""

from __future__ import annotations

from pathlib import Path

from .errors import ProfileError
from .io import HASHED, JSON, load_profile

INSTALL = "pip install 'lynx-compile[calibration]'"


def push(folder: str | Path, repo_id: str, *, private: bool = False, revision: str | None = None) -> str:
    """Check a profile folder and upload it to `repo_id`. Returns the commit's address.

    Raises ProfileError when the folder is no valid profile, or when the hub refuses or is out of reach.
    """
    load_profile(folder)
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise ProfileError(repo_id, "", "huggingface_hub is not installed", INSTALL) from error
    api = HfApi()
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=str(folder),
            allow_patterns=[JSON, *HASHED, "*.md", "*.png"],
            revision=revision,
            commit_message="Upload a Lynx profile",
        )
    except Exception as error:  # offline, no such user, no access: the hub has an error for each
        raise ProfileError(
            repo_id,
            "",
            f"could not be pushed to ({_short(error)})",
            "check the name and the connection, and log in with `hf auth login`",
        ) from error
    return str(commit)


def pull(repo_id: str, *, revision: str | None = None) -> Path:
    """Download a profile and check it. Returns its folder in the hub's cache.

    Raises ProfileError when it cannot be fetched or is no valid profile.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ProfileError(
            repo_id,
            "",
            "is no folder here, and huggingface_hub is not installed",
            INSTALL,
        ) from error
    try:
        folder = Path(snapshot_download(repo_id, revision=revision, allow_patterns=[JSON, *HASHED]))
    except Exception as error:  # offline, no such repository, no access: the hub has an error for each
        raise ProfileError(
            repo_id,
            "",
            f"is no folder here and could not be fetched from the hub ({_short(error)})",
            "check the name, the connection and `hf auth login`, or give a folder that holds lynx.json",
        ) from error
    load_profile(folder)
    return folder


def _short(error: Exception) -> str:
    return (
        f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no reason'}"
    )
