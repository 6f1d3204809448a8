"""The Triton kernels behind the operations, and how each is launched. Imported only where that backend runs."""
