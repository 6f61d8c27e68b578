"""The kernel side: the BPF programs, the binding to libbpf, records, links, features.

programs/     the BPF C, read `watch.bpf.c` top to bottom
shim*.[ch]    the C between cffi and libbpf
binding       `BpfObject`: open, load, attach, drain, iterate, close; libbpf's words in the errors
probe_object  `ProbeObject`: what uprobes need; links that end one by one
records       what the programs send, as Python tuples
hooks         the hook sets, and which of them works here
compile       compiles the programs on this machine, and keeps what came out
objects       the compiled programs of this installation, by hash
features      what this kernel and this user can do, found out by trying

Nothing outside this package sees libbpf.
"""
