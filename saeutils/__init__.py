"""What several notebooks of the collection share. Import the module you need, e.g. ``from saeutils import text``."""

__version__ = "0.1.0"
