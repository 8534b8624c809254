"""Our kernels and models against public implementations: parity first, then time."""
