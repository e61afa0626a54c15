"""The installed version, from the distribution's metadata."""

from importlib.metadata import PackageNotFoundError, version

try:
    VERSION = version("heddle-server")
except PackageNotFoundError:  # run from a checkout that is not installed
    VERSION = "0+unknown"
