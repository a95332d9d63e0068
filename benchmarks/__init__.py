"""Programs that measure time; each prints a table with its device and versions."""
