"""`push`, from end to end: who is asking -> verify every byte -> one commit to the hub.

What does not verify is not published. The commit holds everything or nothing, and takes away what an older checkpoint
left in the repository: shards that no longer belong to it would be read by vLLM, and refused. Other files there stay;
beside patches alone also shards, for those may be the weights of the model itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from exporters.errors import SwquantError, first_line
from swquant.checkpoints.manifest import MANIFEST, is_patches, read_manifest
from swquant.checkpoints.origin import repository_id
from swquant.output.verification import verify
from swquant.progress import Progress, silent
from swquant.units import human_bytes

if TYPE_CHECKING:
    from huggingface_hub import HfApi

__all__ = ["Pushed", "push_folder"]

_OURS, _SHARDS = "swquant/*", "*.safetensors"


@dataclass(frozen=True)
class Pushed:
    """files: name -> bytes of what was sent, or would be. url: of the commit, None after a dry run."""

    repository: str
    files: Mapping[str, int]
    url: str | None


def push_folder(
    folder: Path, repository: str, *, private: bool = False, dry_run: bool = False, progress: Progress = silent
) -> Pushed:
    """Publish a folder with a manifest (a checkpoint, an export, patches alone) as repository OWNER/NAME, which is made
    where there is none.

    private: only of a repository that is made now. dry_run: verify and tell, ask the hub nothing. Raises SwquantError
    for a folder that does not verify, and for all that the hub or the network has against it.
    """
    from huggingface_hub import HfApi

    if repository_id(repository) != repository or "--" in repository or ".." in repository:
        raise SwquantError(f"{repository}: not the name of a repository; give OWNER/NAME, as on the hub")
    manifest = read_manifest(folder)
    api = HfApi()
    if not dry_run:
        with _one_line(repository), progress.step("Asking the hub who you are"):
            api.whoami()
    with progress.step("Verifying every byte"):
        problems = verify(folder)
    if problems:
        raise SwquantError(f"{folder}: does not verify ({problems[0]}); nothing was sent")
    names = sorted([*manifest["files"], MANIFEST])
    files = {name: (folder / name).stat().st_size for name in names}
    if dry_run:
        return Pushed(repository, files, None)
    with _one_line(repository), progress.step(f"Sending {len(files)} files, {human_bytes(sum(files.values()))}"):
        old = [_OURS] if is_patches(manifest) else [_OURS, _SHARDS]
        return Pushed(repository, files, _send(api, folder, repository, private, old))


def _send(api: HfApi, folder: Path, repository: str, private: bool, old: list[str]) -> str:
    """The commit. old: patterns of what goes, where it is no part of it. Returns its address."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    quiet = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        api.create_repo(repository, private=private or None, exist_ok=True)
        made = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message="Made by swquant",
            delete_patterns=old,
        )
    finally:
        if not quiet:
            enable_progress_bars()
    return made.commit_url


@contextmanager
def _one_line(repository: str) -> Iterator[None]:
    """Whatever the hub's client raises becomes one SwquantError with a remedy."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    try:
        yield
    except LocalTokenNotFoundError:
        raise SwquantError(
            f"{repository}: nobody is logged in to the hub; run hf auth login, or set HF_TOKEN"
        ) from None
    except OfflineModeIsEnabled:
        raise SwquantError(f"{repository}: HF_HUB_OFFLINE forbids the network; unset it to push") from None
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", 0)
        remedy = {
            401: "log in again (hf auth login) with a token that may write",
            403: "your token may not write there; make one that may, or give a repository of your own",
        }.get(status, "nothing was published; try again, or see what it says")
        raise SwquantError(f"{repository}: the hub refused ({_said(error)}); {remedy}") from None
    except Exception as error:  # no name server, no route, a proxy: the client's network library raises a zoo
        raise SwquantError(
            f"{repository}: the hub cannot be reached ({first_line(error)}); check the network (HF_ENDPOINT, proxies), "
            "then push again"
        ) from None


def _said(error: Exception) -> str:
    """The hub's own words, where there are any."""
    words = getattr(error, "server_message", None)
    return f"{first_line(error)}: {words}" if words else first_line(error)
