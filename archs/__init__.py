"""Sequence architectures behind one contract (see archs/README.md)."""
