"""Adapters on a Hugging Face hub: `hub:org/name` or `hub:org/name@revision`.

HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE of the server's environment count. A branch or tag is resolved to its commit
first, and every file is then asked for by that.
"""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adapters_store.errors import SourceFailed, SourceNotFound, SourceRefused
from adapters_store.sources import Fetched, FetchLimits
from adapters_store.sources.choice import chosen

_COMMIT = re.compile(r"[0-9a-f]{40}")
_ASK_TIMEOUT_S = 30.0


class HubSource:
    def fetch(self, reference: str, into: Path, limits: FetchLimits) -> Fetched:
        from huggingface_hub import HfApi, constants

        repo, _, revision = reference.partition("@")
        if repo.count("/") != 1:
            raise SourceRefused("a hub's adapters are called org/name, with @revision if it matters")
        if constants.HF_HUB_OFFLINE:
            raise SourceFailed("this server runs with HF_HUB_OFFLINE=1, so it asks no hub; start it without")
        token = os.environ.get("HF_TOKEN") or False  # False: nor what `hf auth login` has left
        api = HfApi(token=token)
        with _reported(repo):
            info = api.model_info(repo, revision=revision or None, files_metadata=True, timeout=_ASK_TIMEOUT_S)
        if info.id != repo:  # hubs lead from a repository's old name to its new one, which nobody has allowed
            raise SourceRefused(f"the hub answers for {repo} with another repository; ask for that by its own name")
        if info.sha is None or not _COMMIT.fullmatch(info.sha):
            raise SourceFailed(f"the hub does not say which commit of {repo} it shows")
        files = chosen({file.rfilename: file.size for file in info.siblings or ()}, limits, repo)
        with _reported(repo):
            for name in files:
                api.hf_hub_download(repo, name, revision=info.sha, local_dir=into)
        shutil.rmtree(into / ".cache", ignore_errors=True)  # the client's notes on what it has downloaded
        for name, size in files.items():
            if (into / name).stat().st_size != size:
                raise SourceFailed(f"{name} of {repo} has another size than the hub said")
        return Fetched(f"{repo}@{info.sha}")


@contextmanager
def _reported(repo: str) -> Iterator[None]:
    """The client's errors in our words: theirs hold addresses."""
    from httpx import HTTPError
    from huggingface_hub import errors

    try:
        yield
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.EntryNotFoundError) as error:
        if isinstance(error, errors.LocalEntryNotFoundError):
            raise SourceFailed(f"the hub did not send the files of {repo}; try again later") from None
        raise SourceNotFound(
            f"the hub has no such adapter, revision or file as {repo}, or does not show it to this server (HF_TOKEN)"
        ) from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        raise SourceFailed(f"the hub answers for {repo} with status {status}; try again later") from None
    except HTTPError as error:
        raise SourceFailed(f"the hub could not be reached ({type(error).__name__}); try again later") from None
