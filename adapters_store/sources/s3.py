"""Adapters in object stores that speak S3: `s3:bucket/prefix`, the files directly below the prefix.

boto3 (the extra `s3`) takes region, credentials and AWS_ENDPOINT_URL from the server's environment.
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from adapters_store.errors import SourceFailed, SourceNotFound, SourceRefused
from adapters_store.sources import Fetched, FetchLimits
from adapters_store.sources.choice import chosen

MAX_LISTED = 10_000
_CHUNK_BYTES = 1 << 20
_NOT_FOUND = ("NoSuchBucket", "NoSuchKey", "404", "403", "AccessDenied", "AllAccessDisabled")


class S3Source:
    def fetch(self, reference: str, into: Path, limits: FetchLimits) -> Fetched:
        bucket, _, prefix = reference.partition("/")
        if "@" in reference or not prefix:
            raise SourceRefused("an S3 store's adapters are called bucket/prefix; they have no revisions")
        with _reported(reference):
            client = _client()
            listed = _listed(client, bucket, f"{prefix}/")
            files = chosen({name: size for name, (size, _) in listed.items()}, limits, reference)
            for name, size in files.items():
                _download(client, bucket, f"{prefix}/{name}", listed[name][1], into / name, size)
        tags = "".join(f"{name}:{listed[name][1]};" for name in files)
        return Fetched(f"{reference}@{hashlib.sha256(tags.encode()).hexdigest()[:40]}")


def _client() -> Any:
    try:
        import boto3
        from botocore.config import Config
    except ImportError:
        raise SourceFailed("this server has no boto3, which s3: needs; install heddle-server[s3]") from None
    config = Config(connect_timeout=10, read_timeout=30, retries={"max_attempts": 3, "mode": "standard"})
    return boto3.client("s3", config=config)


def _listed(client: Any, bucket: str, prefix: str) -> dict[str, tuple[int, str]]:
    """Size and ETag by name, of what lies directly below the prefix."""
    found: dict[str, tuple[int, str]] = {}
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix, Delimiter="/")
    for page in pages:
        for item in page.get("Contents", ()):
            found[item["Key"].removeprefix(prefix)] = (item["Size"], item["ETag"])
        if len(found) > MAX_LISTED:
            raise SourceFailed(f"there are more than {MAX_LISTED:,} objects below the prefix; give the adapter its own")
    if not found:
        raise SourceNotFound("the store has nothing below that prefix, or does not show it to this server")
    return found


def _download(client: Any, bucket: str, key: str, etag: str, path: Path, size: int) -> None:
    """Exactly the object that was listed: another one would have another ETag."""
    body = client.get_object(Bucket=bucket, Key=key, IfMatch=etag)["Body"]
    written = 0
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "wb") as file:
        for chunk in body.iter_chunks(_CHUNK_BYTES):
            written += len(chunk)
            if written > size:
                break
            file.write(chunk)
    if written != size:
        raise SourceFailed(f"{path.name} has another size than the store said")


@contextmanager
def _reported(reference: str) -> Iterator[None]:
    """boto3's errors in our words: theirs hold addresses."""
    try:
        from botocore.exceptions import BotoCoreError, ClientError
    except ImportError:
        raise SourceFailed("this server has no boto3, which s3: needs; install heddle-server[s3]") from None
    try:
        yield
    except ClientError as error:
        code = str(error.response.get("Error", {}).get("Code", ""))
        if code in _NOT_FOUND:
            raise SourceNotFound(f"the store has no {reference}, or does not show it to this server") from None
        raise SourceFailed(
            f"the store answers for {reference} with {code[:40] or 'an error'}; try again later"
        ) from None
    except BotoCoreError as error:
        raise SourceFailed(f"the store could not be asked ({type(error).__name__}); try again later") from None
