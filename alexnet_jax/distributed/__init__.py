"""Devices and processes that train as one."""
