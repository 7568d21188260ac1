"""Pushes a folder to the Hub."""

from pathlib import Path


def push_folder(folder: str | Path, repository: str, *, repo_type: str, private: bool = False) -> str:
    """Upload a folder; a second upload of the same files does nothing.

    Args:
        folder: what was built.
        repository: owner/name, created if absent.
        repo_type: "model", "dataset" or "space".
        private: of a repository that is created.

    Returns:
        Its address.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    address = api.create_repo(repository, repo_type=repo_type, private=private, exist_ok=True)
    api.upload_folder(folder_path=folder, repo_id=repository, repo_type=repo_type)
    return str(address)
