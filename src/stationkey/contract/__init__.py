"""The wire with Josev, as data: messages, certificate profiles."""
