"""What operations share: argument checks, chunking, the choice of a backend, launching Triton kernels, sparse rows."""
