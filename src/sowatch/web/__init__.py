"""HTTP served: sockets, the thread that serves them, and what no client may exceed; what a service logs and reports.

Needs the extra ``sowatch[agent]`` or ``sowatch[fleet]``.

* ``servers.py``: sockets and the thread that serves them.
* ``accepting.py``: how many connections a listening socket keeps.
* ``bounds.py``: what no client may exceed; ``limits.py``: what one client may ask over TCP.
* ``pages.py``: files of pages, and what pages share.
* ``notify.py``, ``logs.py``: systemd, log lines.
"""
