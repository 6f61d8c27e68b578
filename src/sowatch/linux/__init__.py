"""Everything that reads Linux: /proc, ELF files, descriptors, capabilities, containers."""
