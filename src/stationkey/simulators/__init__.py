"""The other side, for trying: Josev, a CSMS and its authority. A station needs none of it."""
