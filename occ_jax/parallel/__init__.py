"""Devices and processes: where arrays lie, which process has which rows, how processes start."""
