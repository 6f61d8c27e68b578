"""The kernel side: the BPF programs, the binding to libbpf, the records, the probes, the load ladder.

programs/    the BPF C, read `watch.bpf.c` top to bottom
shim.h, .c   the C between cffi and libbpf; `binding` is its one user
binding      `BpfObject`: open, load, attach, drain, iterate, close; libbpf's words in the errors
records      what the programs send, as Python tuples
compile      compiles the programs on this machine, and keeps what came out
probes       what this kernel and this user can do, found out by trying

Nothing outside this room sees libbpf.
"""
