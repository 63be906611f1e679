"""The TVM back end: a program to a library of its own kernels and the weights beside it."""
