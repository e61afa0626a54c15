"""An adapter in one form: its files and a few fields, as multipart/form-data that goes to disk while it arrives."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress
from typing import Any, Literal, NamedTuple

from fastapi import Request
from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from adapters_store.errors import UploadNotFound
from adapters_store.uploads import FileWriter, Uploads
from server.api.catalogue.uploads import overload_is_told, pieces_of
from server.api.protocol.adapters import AdapterBody
from server.api.transport.cors import refuse_other_sites
from server.errors import InvalidRequest

MAX_FIELDS, MAX_FIELD_BYTES = 20, 1 << 20  # of all together
MAX_PART_HEADERS, MAX_PART_HEADER_BYTES = 8, 1024
PARSED_AT_ONCE = 16 << 10  # bytes, between which others have their turn
FIELDS = ("name", "manifest", "ignore_keys", "verify")
FILES = "files"
PLAIN = (b"binary", b"8bit", b"7bit")  # encodings that are none


def form_schema() -> dict[str, Any]:
    """Of the forms that are received here. Fields but the name hold JSON."""
    fields = AdapterBody.model_json_schema()["properties"]
    held = {name: {"type": "string", "contentMediaType": "application/json"} for name in FIELDS if name != "name"}
    files = {"type": "array", "items": {"type": "string", "format": "binary"}, "minItems": 1}
    return {
        "type": "object",
        "properties": {"name": fields["name"]["anyOf"][0], **held, FILES: files},
        "required": [FILES],
        "additionalProperties": False,
    }


class Form(NamedTuple):
    """`upload_id` is a new upload with the files; who has the form deletes it."""

    fields: dict[str, str]
    upload_id: str


async def receive_multipart(request: Request, uploads: Uploads) -> Form:
    """Read the request's form to its end. On any failure no upload is left.

    Raises InvalidRequest for what is no such form, Overloaded, ClientLeft, and AdapterError for a file.
    """
    refuse_other_sites(request)
    parts = _Parts(_boundary(request))
    with overload_is_told():
        upload_id = (await uploads.create()).id
        try:
            fields = await _receive(request, parts, uploads, upload_id)
        except BaseException:
            with suppress(UploadNotFound):
                await uploads.delete(upload_id)
            raise
    return Form(fields, upload_id)


async def _receive(request: Request, parts: "_Parts", uploads: Uploads, upload_id: str) -> dict[str, str]:
    fields: dict[str, bytearray] = {}
    names: set[str] = set()  # of files
    async with AsyncExitStack() as open_file:
        writer: FileWriter | None = None
        field = bytearray()
        async for event, value in _events(request, parts):
            if event == "field":
                field = fields.setdefault(value.decode(), bytearray())
            elif event == "file":
                name = value.decode(errors="replace")
                if name in names:
                    raise _invalid(f"two files are called {name[:128]!r}")
                names.add(name)
                writer = await open_file.enter_async_context(uploads.writing(upload_id, name))
            elif event == "end":
                writer = None
                await open_file.aclose()
            elif writer is not None:
                await writer.write(value)
            else:
                field += value
    if not names:
        raise _invalid(f"the form has no part called {FILES!r} with a filename")
    try:
        return {name: text.decode() for name, text in fields.items()}
    except UnicodeDecodeError:
        raise _invalid("a field of the form is not UTF-8") from None


Event = tuple[Literal["field", "file", "data", "end"], bytes]


async def _events(request: Request, parts: "_Parts") -> AsyncIterator[Event]:
    async for piece in pieces_of(request):
        for start in range(0, len(piece), PARSED_AT_ONCE):
            for event in parts.parse(piece[start : start + PARSED_AT_ONCE]):
                yield event
            await asyncio.sleep(0)
    if not parts.is_complete:
        raise _invalid("the form ends before its last boundary")


class _Parts:
    """The parser's callbacks, gathered as events: it knows nothing of waiting, and files are written by waiting."""

    def __init__(self, boundary: bytes) -> None:
        self.is_complete = False
        self._events: list[Event] = []
        self._name, self._value = bytearray(), bytearray()  # of a header of the part
        self._disposition: bytes | None = None
        self._is_field = False
        self._fields: set[bytes] = set()
        self._num_field_bytes = 0
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_header_field": lambda data, start, end: self._name.extend(data[start:end]),
                "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
                "on_header_end": self._end_header,
                "on_headers_finished": self._end_head,
                "on_part_data": self._data,
                "on_part_end": lambda: self._events.append(("end", b"")),
                "on_end": self._end,
            },
            max_header_count=MAX_PART_HEADERS,
            max_header_size=MAX_PART_HEADER_BYTES,
        )

    def parse(self, piece: bytes) -> list[Event]:
        """Raises InvalidRequest."""
        self._events = []
        try:
            self._parser.write(piece)
        except FormParserError:
            raise _invalid("the form is malformed, or the head of a part is too long") from None
        return self._events

    def _begin(self) -> None:
        self._disposition = None

    def _end_header(self) -> None:
        if self._name.lower() == b"content-disposition":
            if self._disposition is not None:
                raise _invalid("a part of the form has two Content-Dispositions")
            self._disposition = bytes(self._value)
        elif self._name.lower() == b"content-transfer-encoding" and bytes(self._value).lower() not in PLAIN:
            raise _invalid("a part of the form is encoded; send its bytes as they are")
        self._name, self._value = bytearray(), bytearray()

    def _end_head(self) -> None:
        kind, options = parse_options_header(self._disposition)
        name, filename = options.get(b"name", b""), options.get(b"filename")
        if kind != b"form-data":
            raise _invalid("a part of the form has no Content-Disposition: form-data")
        self._is_field = filename is None
        if filename is not None:
            if name != FILES.encode():
                raise _invalid(f"files are sent as parts called {FILES!r}, each with a filename")
            self._events.append(("file", filename))
            return
        if name.decode("latin-1") not in FIELDS:
            raise _invalid(f"the form may have the fields {', '.join(FIELDS)}, and {FILES} with a filename each")
        if name in self._fields or len(self._fields) >= MAX_FIELDS:
            raise _invalid(f"the form has the field {name.decode()!r} twice, or more than {MAX_FIELDS} fields")
        self._fields.add(name)
        self._events.append(("field", name))

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._is_field:
            self._num_field_bytes += end - start
            if self._num_field_bytes > MAX_FIELD_BYTES:
                raise _invalid(f"the fields of the form have more than {MAX_FIELD_BYTES:,} bytes")
        self._events.append(("data", data[start:end]))

    def _end(self) -> None:
        self.is_complete = True


def _boundary(request: Request) -> bytes:
    content_type = request.headers.get("content-type", "")
    kind, options = parse_options_header(content_type)
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not 1 <= len(boundary) <= 70:
        raise _invalid("the body must be multipart/form-data with a boundary of 1 to 70 characters")
    return boundary


def _invalid(message: str) -> InvalidRequest:
    return InvalidRequest(message, code="invalid_body")
