"""Runs the kernel tests under other kernels: QEMU guests that share this machine's root.

Where things are, from the ground up; imports go downwards only, and nothing here is part of the package:

kernels     the kernels, and what each must show: plain data
cache       where kernels and images are kept
packages    kernels from Debian's mirror, unpacked
image       the little initramfs that finds the shared root
guest       one command in one guest
inside      what runs in a guest: reads every cell of the table, then runs tests
at_once     a plugin of pytest that shows failures when they happen
judge       what a guest said, against the table
page        docs/kernels.md
__main__    the command, `scripts/matrix`
"""
