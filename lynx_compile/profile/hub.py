"""Profiles on the Hugging Face hub, by its own client (`pip install lynx-compile[calibration]`)."""

from __future__ import annotations

from pathlib import Path

from .errors import ProfileError
from .io import HASHED, JSON, load_profile


def push(folder: str | Path, repo_id: str, *, private: bool = False, revision: str | None = None) -> str:
    """Check a profile folder and upload it to `repo_id`. Returns the commit's address.

    Raises ProfileError when the folder is no valid profile; huggingface_hub's errors pass through.
    """
    from huggingface_hub import HfApi

    load_profile(folder)
    api = HfApi()
    api.create_repo(repo_id, private=private, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=str(folder),
        allow_patterns=[JSON, *HASHED, "*.md", "*.png"],
        revision=revision,
        commit_message="Upload a Lynx profile",
    )
    return str(commit)


def pull(repo_id: str, *, revision: str | None = None) -> Path:
    """Download a profile and check it. Returns its folder in the hub's cache."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ProfileError(
            repo_id,
            "",
            "is no folder here, and huggingface_hub is not installed",
            "pip install 'lynx-compile[calibration]'",
        ) from error
    folder = Path(snapshot_download(repo_id, revision=revision, allow_patterns=[JSON, *HASHED]))
    load_profile(folder)
    return folder
