"""User-profile features, served fresh. `app/README.md` describes the packages."""

__version__ = "0.1.0"
