"""Tests mirror the source; helpers are imported as `tests.NAME`."""
