"""The operating system: streams, environment, disks, temporary folders."""
