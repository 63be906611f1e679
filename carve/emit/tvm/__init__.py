"""TVM back end: Relax modules whose dialect operators are TIR kernels of carve's own."""
