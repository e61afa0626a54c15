"""Which requests carry files: their bodies may be long, go to disk as they arrive, and take as long as they move."""

from collections.abc import Iterable

FORM_BYTES = 2 << 20  # what a form adds to its files: fields, and a head for each part


def carries_files(method: str, path: str, headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Whether the body of this request is a file of an upload, or a form for an adapter. Names of `headers` are in
    lower case."""
    if path.startswith("/v1/uploads/"):
        return method in ("PUT", "PATCH") and "/files/" in path
    if (method, path) != ("POST", "/v1/adapters") and not (method == "PUT" and path.startswith("/v1/adapters/")):
        return False
    return any(name == b"content-type" and value.lower().startswith(b"multipart/form-data") for name, value in headers)
