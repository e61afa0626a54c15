"""Which files of a remote directory are fetched, decided by their names and sizes."""

from collections.abc import Mapping

from adapters_store.errors import InvalidAdapter, SourceFailed, UnsupportedAdapter, UploadTooLarge, shown
from adapters_store.file_names import is_adapter_file, is_pickle
from adapters_store.sources import FetchLimits


def chosen(sizes: Mapping[str, int | None], limits: FetchLimits, place: str) -> dict[str, int]:
    """The files of an adapter among these, with their sizes in bytes.

    Raises UnsupportedAdapter where there are only pickles, InvalidAdapter where there are no weights, UploadTooLarge.
    """
    files = {name: size for name, size in sorted(sizes.items()) if is_adapter_file(name)}
    if not any(name.endswith(".safetensors") for name in files):
        pickles = sorted(filter(is_pickle, sizes))
        if pickles:
            raise UnsupportedAdapter(
                f"{place} has its weights as a pickle ({shown(pickles[0])}), which is never opened; save as safetensors"
            )
        raise InvalidAdapter(f"{place} has no .safetensors files; an adapter's own directory has them at its top")
    known = {name: size for name, size in files.items() if size is not None}
    if len(known) < len(files):
        raise SourceFailed(f"{place} does not say how large its files are")
    total = sum(known.values())
    if total > limits.max_bytes:
        raise UploadTooLarge(f"{place} has {total:,} bytes; at most {limits.max_bytes:,} are fetched")
    if len(known) > limits.max_files:
        raise UploadTooLarge(f"{place} has {len(known):,} files; at most {limits.max_files} are fetched")
    return known
