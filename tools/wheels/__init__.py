"""`scripts/wheels`: the sdist and the wheels that need no compiler. Reasons: docs/decisions/0062-wheels.md.

place      directories, the machines, and what is pinned
sources    the C libraries' sources, from Debian
zig        the C compiler for glibc 2.28, and the headers that it brings
libraries  zlib, libelf and libbpf, compiled for a machine
package    the sdist with the BPF objects, and of it the wheels
bundle     what a wheel has of others: licences, an SBOM, the licence expression
verify     what a wheel must be, read off the file
"""
