"""The other sides, for trials: Josev, a CSMS and its authority. Never used on a station."""
