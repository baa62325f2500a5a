"""The version, in a module of its own so that no other module has to import the package's names."""

__version__ = "0.1.0"
