"""Programs that measure; each prints a table with its device, versions and command."""
