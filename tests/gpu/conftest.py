import os

# Before CUDA starts: cuBLAS repeats its sums in one order only with this.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
