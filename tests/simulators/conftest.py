"""The fixtures of the tests of the CSMS."""

from csms_parts import hierarchies, make

__all__ = ["hierarchies", "make"]
