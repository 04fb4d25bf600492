"""Opens files, lists them and keeps what is made of them: local ones and those of object stores."""

from distaccum.data.storage.files import RangeReader, list_files, open_file, read_range, size_and_version

__all__ = ["RangeReader", "list_files", "open_file", "read_range", "size_and_version"]
