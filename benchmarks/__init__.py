"""Measurements: one question a file, a table on the screen, JSON with the device's name."""
