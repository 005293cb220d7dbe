"""The neutral checkpoint and everything that reads or writes one."""
