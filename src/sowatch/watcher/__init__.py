"""The public API: `Watcher`, `watch`, `awatch` and `ProcessMonitor`."""
