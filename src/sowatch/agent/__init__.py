"""The agent: `sowatch serve`. One process that watches the host and answers over HTTP.

Needs the extra ``sowatch[agent]``.

* ``settings.py``: configuration file, environment and flags in one frozen value.
* ``hub.py``: the events of the watch, for any number of HTTP clients.
* ``debugger.py``: what is traced, what is blocked, attach and detach by hand.
* ``webapp.py``: the routes; `sowatch.web` serves them.
* ``outputs.py``: sinks and exporters, replaced while it runs.
* ``reload.py``: notices changes of the configuration file.
* ``daemon.py``: puts them together, and ends them.
"""
